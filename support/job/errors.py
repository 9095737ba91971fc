"""What can go wrong with a job, each with a name of its own; each message says what to do."""

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets.exceptions import DatasetGenerationError
from safetensors import SafetensorError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class JobError(Exception):
    """Base of every error that a job raises on purpose."""


class BadSetting(JobError):
    """A setting has a value that means nothing."""


class ModelNotUsable(JobError):
    """The model can't be loaded, or can't be asked about text."""


class DatasetNotUsable(JobError):
    """The data set can't be loaded, or lacks the texts and labels that are asked for."""


class StoreMismatch(JobError):
    """The store belongs to another model, other examples or other settings."""


class StoreBusy(JobError):
    """Another job is at work on the store."""


class StoreDamaged(JobError):
    """A part of the store can't be read."""


class StepMissing(JobError):
    """The store lacks the result of a step that has to come before."""


class ToldElsewhere(JobError):
    """The first process has given up, and says why."""


class DiskFull(JobError):
    """There is no room left for the next part of the result."""


def refuse_all(refused: Iterable[Exception]) -> None:
    """Raise all that is refused, if anything is, as an error of the first one's kind; before that, what is
    none of a job's own errors."""
    each = {str(error): error for error in refused}
    for error in each.values():
        if len(each) == 1 or not isinstance(error, JobError):
            raise error
    if each:
        raise type(next(iter(each.values())))("\n".join(each))


def cause(error: BaseException) -> str:
    """What went wrong, in short: what is behind an error that only says that there is one."""
    while type(error) is DatasetGenerationError and (behind := error.__cause__ or error.__context__):
        error = behind
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None):
        raise error  # neither the file's fault nor the model's
    told = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return told if len(told) <= 300 else f"{told[:299]}…"


@contextmanager
def damage_is_told(part: Path | str, cure: str) -> Iterator[None]:
    """Raises `StoreDamaged` where a part can't be read, or is not what was written."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        told = f"{part} is not as this job wrote it ({type(error).__name__}: {error})"
        raise StoreDamaged(f"{told}. {cure}.") from error


@contextmanager
def disk_full_is_told(folder: Path) -> Iterator[None]:
    """Raises `DiskFull` where the system says that there is no room."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors hands the system's number on as text only.
        in_text = any(f"(os error {number})" in str(error) for number in NO_ROOM)
        if not in_text and getattr(error, "errno", None) not in NO_ROOM:
            raise
        cure = "What is finished is kept: make room and run the same command again, it goes on from there."
        raise DiskFull(f"No room left for {folder} ({error}). {cure}") from error
