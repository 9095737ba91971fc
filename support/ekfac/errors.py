"""What can go wrong in the engine, each with a name of its own."""


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


class LabelsMismatch(EkfacError):
    """The labels don't fit the inputs: another number, a class that doesn't exist, another type."""


class FactorsMismatch(EkfacError):
    """Influence factors belong to other layers or have other shapes."""


class NotFinite(EkfacError):
    """NaN or infinity, with the name of the layer where it was first seen."""


class BadRegularization(EkfacError):
    """The Hessian regularization is not a number ≥ 0 and not "auto"."""


class BadBudget(EkfacError):
    """A memory budget is not a number of bytes above zero."""


class BadPrecision(EkfacError):
    """A precision that the engine has no passes for."""


class BadShare(EkfacError):
    """A share of the training set is not above 0 and at most 1."""


class DamagedFile(EkfacError):
    """A saved curvature can't be read: truncated, altered, or no such file at all."""


class WrongModel(EkfacError):
    """A saved curvature belongs to another model."""


class BadNormalisation(EkfacError):
    """There is no such normalisation of influences."""


class BlockHalved(UserWarning):
    """A block of examples did not fit into memory and is taken in two halves."""
