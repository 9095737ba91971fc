"""Starting a job from Python: in processes of its own, watched line by line, stopped for good.

For notebooks, benchmarks and tests; in a terminal, torchrun does it.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from support.job.errors import JobFailed


def launched(
    arguments: Sequence[str],
    processes: int = 1,
    folder: Path | None = None,
    threads: int | None = None,
) -> subprocess.Popen:
    """`python -m support.job` with these arguments, by torchrun if there are several processes.

    It runs in `folder`, by default here, with `threads` for each process, by default as many as make
    all of them as many as the cores. What it says comes line by line from its `stdout`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = threads or max(1, (cores or 1) // processes)
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), "-m", "support.job", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def lines(job: subprocess.Popen) -> Iterator[str]:
    """What a job says, line by line, until it ends.

    Raises `JobFailed` after its last line if it ended before its work was done.
    """
    said = []
    with job.stdout:
        for line in job.stdout:
            said.append(line.rstrip())
            yield said[-1]
    if job.wait():
        everything = "\n".join(said).strip()
        raise JobFailed(f"The job ended with code {job.returncode}. It said:\n{everything}")


def finished(job: subprocess.Popen) -> str:
    """All that a job says to its end. Raises `JobFailed` if it ended before its work was done."""
    return "\n".join(lines(job))


def kill(job: subprocess.Popen) -> None:
    """SIGKILL to all processes of a job: none of them can do anything about it. Back when all are gone.

    torchrun starts its workers in sessions of their own, so each is named.
    """
    at_work = workers(job)
    job.kill()
    for process in at_work:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait()
    # The signal is only sent: until the system has taken a worker's memory back, it may hold its lock.
    while any(at_large(process) for process in at_work):
        time.sleep(0.01)
    if job.stdout:
        job.stdout.close()


def at_large(process: psutil.Process) -> bool:
    """Whether a process is alive; one that has ended and waits for its parent to notice is not.

    While threads of it are still being taken down, it may look ended and hold its lock.
    """
    try:
        ended = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return process.is_running() and not (ended and process.num_threads() <= 1)
    except psutil.NoSuchProcess:
        return False


def workers(job: subprocess.Popen) -> list[psutil.Process]:
    """The processes of a job that do its work; none when it has ended."""
    if job.poll() is not None:
        return []
    try:
        launcher = psutil.Process(job.pid)
        started = launcher.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [one for one in started if _is_python(one)] or [launcher]


def _is_python(process: psutil.Process) -> bool:
    try:
        return "python" in process.name()
    except psutil.NoSuchProcess:
        return False
