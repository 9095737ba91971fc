"""Starting a job from Python: in processes of its own, watched line by line, stopped for good.

For notebooks, benchmarks and tests; in a terminal, torchrun does it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil


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
    """What a job says, line by line, until it ends."""
    for line in job.stdout:
        yield line.rstrip()
    job.wait()


def kill(job: subprocess.Popen) -> None:
    """SIGKILL to all processes of a job: none of them can do anything about it.

    torchrun starts its workers in sessions of their own, so each is named.
    """
    for process in workers(job):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    job.kill()
    job.wait()
    if job.stdout:
        job.stdout.close()


def workers(job: subprocess.Popen) -> list[psutil.Process]:
    """The processes of a job that do its work; none when it has ended."""
    try:
        launcher = psutil.Process(job.pid)
        started = launcher.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [one for one in started if "python" in one.name()] or [launcher]
