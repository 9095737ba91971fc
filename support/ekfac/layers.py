"""Which layers EK-FAC covers, and how a model is left as it was found."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor, nn

from support.ekfac.errors import LayerHalfFrozen, LayerNotSupported, ModelInTrainingMode, NothingToTrack


@dataclass(frozen=True)
class TrackedLayer:
    """A linear layer whose parameters require gradients; `d_in` counts the bias.

    `nn.Linear`, or GPT-2's `Conv1D`. `dtype` is that in which curvature and scores are accumulated: the
    widest of all the layers', but float32 at least.
    """

    name: str
    module: nn.Module
    d_out: int
    d_in: int
    has_bias: bool
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.module.weight.device


def tracked_layers(model: nn.Module) -> dict[str, TrackedLayer]:
    """The model's linear layers that require gradients, from input to output.

    Raises `LayerNotSupported` for any other module with a parameter of its own that requires a
    gradient, for a weight shared by two modules and for a model made in inference mode,
    `LayerHalfFrozen` when only one of weight and bias requires it, and `NothingToTrack` when nothing does.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise LayerNotSupported(
            "The model was made under torch.inference_mode(), where autograd can't follow. Make it outside, "
            "or take copy.deepcopy(model) outside."
        )
    wanted = [parameter.dtype for parameter in model.parameters() if parameter.requires_grad]
    dtype = reduce(torch.promote_types, wanted, torch.float32)
    layers = {}
    owners: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter].append(name)
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not any(parameter.requires_grad for parameter in own.values()):
            continue
        for parameter in own.values():
            _refuse_tied(owners[parameter])
        shape = _weight_shape(module)
        if shape is None:
            raise LayerNotSupported(
                f"{name!r} ({type(module).__name__}) requires gradients, but EK-FAC covers Linear "
                f"and Conv1D layers only. Freeze it: model.get_submodule({name!r}).requires_grad_(False)"
            )
        if "weight" not in own or own.keys() - {"weight", "bias"}:
            raise LayerNotSupported(
                f"{name!r} has parameters {', '.join(own)} of its own where EK-FAC knows weight and bias; is "
                f"it parametrised? Freeze all of it: model.get_submodule({name!r}).requires_grad_(False)"
            )
        _refuse_half_frozen(name, own)
        has_bias = module.bias is not None
        d_out, d_in = shape
        layers[name] = TrackedLayer(name, module, d_out, d_in + has_bias, has_bias, dtype)
    if not layers:
        raise NothingToTrack(
            "No layer requires gradients. Choose linear layers: "
            "model.get_submodule(NAME).requires_grad_(True)"
        )
    return layers


def widest_outputs(model: nn.Module) -> int:
    """How many numbers the widest linear layer gives for a token, tracked or not: of a model that writes,
    as a rule one for every token that it knows."""
    shapes = (_weight_shape(module) for module in model.modules())
    return max(shape[0] for shape in shapes if shape is not None)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model's parameters out of autograd inside, everything as it was found afterwards.

    Raises `ModelInTrainingMode`, naming the first module that is.
    """
    for name, module in model.named_modules():
        if module.training:
            who = repr(name) if name else "The model"
            raise ModelInTrainingMode(
                f"{who} is in training mode: dropout would make every pass another one. "
                "Call model.eval() first."
            )
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for parameter in wanted:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@torch.no_grad()
def uncovered(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, str]:
    """Why EK-FAC doesn't cover a linear layer, by the name of each that it doesn't: of "12 layers called more
    than once", what follows the number and "layers". A head over a vocabulary is one of them: the covariance
    of what comes back to it has a row for every token.

    `inputs` are what the model is called with, its `attention_mask` `(batch, tokens)` among them, with two
    examples and three tokens at least. Raises what the model's forward pass raises.
    """
    linear = {name: module for name, module in model.named_modules() if _weight_shape(module) is not None}
    owners = Counter(id(weight) for part in model.modules() for weight in part.parameters(recurse=False))
    seen: dict[str, list[str]] = {name: [] for name in linear}
    outputs: dict[str, Tensor] = {}
    vocabulary = max(
        (part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)), default=0
    )

    def look(name: str, module: nn.Module, given: tuple, named: dict, output: Tensor) -> None:
        read = next(iter((*given, *named.values())))
        outputs[name] = output
        seen[name].append(_misuse(module, read, output, inputs["attention_mask"].shape))

    hooks = [
        module.register_forward_hook(partial(look, name), with_kwargs=True) for name, module in linear.items()
    ]
    try:
        said = model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    reasons = {}
    for name, module in linear.items():
        if any(owners[id(weight)] > 1 for weight in module.parameters(recurse=False)):
            reasons[name] = "that share a weight with another"
        elif len(seen[name]) != 1:
            reasons[name] = "called more than once" if seen[name] else "not called"
        elif seen[name][0]:
            reasons[name] = seen[name][0]
        elif outputs[name] is getattr(said, "logits", said) and _weight_shape(module)[0] == vocabulary:
            reasons[name] = "as wide as the vocabulary"
    return reasons


def _misuse(module: nn.Module, read: Tensor, output: Tensor, sizes: torch.Size) -> str:
    """What is wrong with one call of a linear layer, as `uncovered` puts it; empty if nothing is."""
    if read.ndim not in (2, 3) or read.shape[: read.ndim - 1] != sizes[: read.ndim - 1]:
        return "that are not fed with (batch, tokens, features)"
    own = dict(module.named_parameters(recurse=False))
    if "weight" not in own or own.keys() - {"weight", "bias"}:
        return "with other parameters than weight and bias"
    weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
    expected = nn.functional.linear(read, weight, module.bias)
    if not torch.allclose(output, expected, rtol=1e-3, atol=1e-5, equal_nan=True):
        return "that compute something else than a linear layer does"
    return ""


def _weight_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear layer's weight, None for any other module.

    GPT-2's Conv1D is a linear layer that keeps its weight transposed. It is known by its name,
    because the engine doesn't import transformers.
    """
    if isinstance(module, nn.Linear):
        return tuple(module.weight.shape)
    if type(module).__name__ == "Conv1D" and module.weight.ndim == 2:
        return tuple(module.weight.shape[::-1])
    return None


def _refuse_tied(owners: list[str]) -> None:
    if len(owners) > 1:
        raise LayerNotSupported(
            f"{owners[0]!r} and {owners[1]!r} share a parameter, as a head does that is tied to the words. "
            f"EK-FAC has no form for tied weights. Freeze them: for name in {tuple(owners)}: "
            "model.get_submodule(name).requires_grad_(False)"
        )


def _refuse_half_frozen(name: str, parameters: dict[str, nn.Parameter]) -> None:
    frozen = [key for key, parameter in parameters.items() if not parameter.requires_grad]
    if frozen:
        wanted = [key for key in parameters if key not in frozen]
        raise LayerHalfFrozen(
            f"{name!r}: {wanted[0]} requires gradients, {frozen[0]} does not. Track the whole layer "
            f"or none of it: model.get_submodule({name!r}).requires_grad_(True), or (False)"
        )
