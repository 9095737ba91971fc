"""Jobs in processes of their own: started as one types it, waited for, stopped for good."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import psutil


def launched(arguments: Sequence[str], processes: int = 1, threads: int = 1) -> subprocess.Popen:
    """`python -m support.job` with these arguments, by torchrun if there are several processes, with
    `threads` for each. What it says comes from its `stdout`."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), "-m", "support.job", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(job: subprocess.Popen) -> tuple[int, str]:
    """Exit status of a job, when it ends, and all that it said."""
    said, _ = job.communicate()
    return job.returncode, said


def finished(job: subprocess.Popen) -> str:
    """All that a job said to its end. Raises `RuntimeError` if it ended before its work was done."""
    status, said = ended(job)
    if status:
        raise RuntimeError(f"The job ended with code {status}. It said:\n{said.strip()}")
    return said


def await_moment(job: subprocess.Popen, moment: Callable[[], bool]) -> None:
    """Until it has come; the job must be at work until then."""
    while not moment():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.005)


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
    job.stdout.close()


def at_large(process: psutil.Process) -> bool:
    """Whether a process is alive; one that has ended and waits for its parent to notice is not.

    While threads of it are still being taken down, it may look ended and hold its lock.
    """
    try:
        gone = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return process.is_running() and not (gone and process.num_threads() <= 1)
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
