"""What can go wrong in the engine, each with a name of its own."""

from collections.abc import Iterable


class EkfacError(Exception):
    """Base of every error that the engine raises on purpose."""


class LayerNotSupported(EkfacError):
    """A module requires gradients that EK-FAC has no form for, or is used in a way it doesn't cover."""


class LayerHalfFrozen(EkfacError):
    """A layer's weight requires gradients and its bias doesn't, or the other way round."""


class NothingToTrack(EkfacError):
    """No layer of the model requires gradients."""


class OutputsNotSupported(EkfacError):
    """The model's outputs are not a matrix (batch, classes) that depends on the tracked layers."""


class ModelInTrainingMode(EkfacError):
    """Dropout and the like would make every pass another one."""


class NotFitted(EkfacError):
    """Influences were asked for before `fit`."""


class EmptyLoader(EkfacError):
    """A loader gave no batch, or gave batches only once."""


class BatchNotSupported(EkfacError):
    """A batch is neither (inputs, labels, …) with tensors nor a mapping of tensors."""


class LoaderShuffles(EkfacError):
    """A loader gives its examples in another order each time, so nobody could tell which is which."""


class LabelsMismatch(EkfacError):
    """The labels don't fit the inputs: another number, a class that doesn't exist, another type."""


class FactorsMismatch(EkfacError):
    """Influence factors belong to other layers or have other shapes."""


class NotFinite(EkfacError):
    """NaN or infinity, with the name of the layer where it was first seen."""


class BadSetting(EkfacError):
    """A setting of the engine has a value that means nothing."""


class DamagedFile(EkfacError):
    """A saved curvature can't be read: truncated, altered, or no such file at all."""


class WrongModel(EkfacError):
    """A saved curvature belongs to another model."""


class BlockHalved(UserWarning):
    """A block of examples did not fit into memory and is taken in two halves."""


class SlowPrecision(UserWarning):
    """What was to be quicker is slower on this processor."""


class NothingAsked(UserWarning):
    """Some examples have no target, and so no influence."""


def refuse_unknown(setting: str, value: object, known: Iterable[str]) -> None:
    """Raise `BadSetting` unless the value of a setting is one of those there are."""
    if value not in known:
        raise BadSetting(f"{setting}={value!r}: there are {', '.join(map(repr, known))}.")
