"""What can go wrong with a job, each with a name of its own; each message says what to do."""

import torch
from datasets.exceptions import DatasetGenerationError


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


def cause(error: BaseException) -> str:
    """What went wrong, in short: what is behind an error that only says that there is one."""
    while type(error) is DatasetGenerationError and (behind := error.__cause__ or error.__context__):
        error = behind
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None):
        raise error  # neither the file's fault nor the model's
    told = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return told if len(told) <= 300 else f"{told[:299]}…"
