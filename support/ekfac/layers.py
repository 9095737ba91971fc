"""Which layers EK-FAC covers, and how one of them turns its inputs and output gradients into
per-example gradients.

Layout, everywhere in the engine: activations are `(batch, positions, d_in)`, output gradients
`(batch, positions, d_out)`, gradients and everything shaped like a weight `(d_out, d_in)`. `d_in`
counts the 1 that is appended to the activations of a layer with a bias, so that weight and bias are
one matrix. A layer fed with one vector per example has one position. Padded positions are zero in
both activations (the 1 included) and output gradients, so that sums over positions are sums over
real ones. `at_the_door` brings what a hook saw into this layout; nothing further in knows another.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from support.ekfac.errors import LayerHalfFrozen, LayerNotSupported, NotFinite, NothingToTrack


@dataclass(frozen=True)
class TrackedLayer:
    """A linear layer whose parameters require gradients; `d_in` counts the bias.

    `nn.Linear`, or GPT-2's `Conv1D`.
    """

    name: str
    module: nn.Module
    d_out: int
    d_in: int
    has_bias: bool

    @property
    def dtype(self) -> torch.dtype:
        """In which its curvature is accumulated: the weight's, but float32 at least."""
        return torch.promote_types(self.module.weight.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.module.weight.device


def tracked_layers(model: nn.Module) -> dict[str, TrackedLayer]:
    """The model's linear layers that require gradients, from input to output.

    Raises `LayerNotSupported` for any other module with a parameter of its own that requires a
    gradient and for a weight shared by two modules, `LayerHalfFrozen` when only one of weight and
    bias requires it, and `NothingToTrack` when nothing does.
    """
    layers = {}
    owners: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not any(parameter.requires_grad for parameter in own.values()):
            continue
        shape = _weight_shape(module)
        if shape is None:
            raise LayerNotSupported(
                f"{name!r} ({type(module).__name__}) requires gradients, but EK-FAC covers Linear "
                f"and Conv1D layers only. Freeze it: model.get_submodule({name!r}).requires_grad_(False)"
            )
        _refuse_half_frozen(name, own)
        for parameter in own.values():
            if parameter in owners:
                raise LayerNotSupported(
                    f"{name!r} and {owners[parameter]!r} share a parameter. EK-FAC has no form for "
                    f"tied weights. Freeze one: model.get_submodule({name!r}).requires_grad_(False)"
                )
            owners[parameter] = name
        has_bias = module.bias is not None
        d_out, d_in = shape
        layers[name] = TrackedLayer(name, module, d_out, d_in + has_bias, has_bias)
    if not layers:
        raise NothingToTrack(
            "No layer requires gradients. Choose linear layers: "
            "model.get_submodule(NAME).requires_grad_(True)"
        )
    return layers


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


def _refuse_half_frozen(name: str, parameters: dict[str, nn.Parameter]) -> None:
    frozen = [key for key, parameter in parameters.items() if not parameter.requires_grad]
    if frozen:
        wanted = [key for key in parameters if key not in frozen]
        raise LayerHalfFrozen(
            f"{name!r}: {wanted[0]} requires gradients, {frozen[0]} does not. Track the whole layer "
            f"or none of it: model.get_submodule({name!r}).requires_grad_(True), or (False)"
        )


def activations_at_the_door(
    layer: TrackedLayer, seen: Tensor, mask: Bool[Tensor, "batch tokens"] | None, examples: int
) -> Float[Tensor, "batch positions d_in"]:
    """What a hook saw as the layer's input, in the engine's layout, at least float32.

    Raises `LayerNotSupported` when its shape is neither `(batch, d)` nor `(batch, positions, d)` with
    the mask's positions, and `NotFinite`.
    """
    activations = _at_the_door(layer, seen, mask, examples, "activations")
    if not layer.has_bias:
        return activations
    ones = activations.new_ones(activations.shape[:2])
    if mask is not None and seen.ndim == 3:
        ones = ones.masked_fill(~mask, 0)
    return torch.cat([activations, ones.unsqueeze(-1)], dim=-1)


def output_gradients_at_the_door(
    layer: TrackedLayer, seen: Tensor, mask: Bool[Tensor, "batch tokens"] | None, examples: int
) -> Float[Tensor, "batch positions d_out"]:
    """What a hook saw as the gradient of the layer's output, in the engine's layout.

    Raises as `activations_at_the_door` does.
    """
    return _at_the_door(layer, seen, mask, examples, "output gradients")


def _at_the_door(
    layer: TrackedLayer, seen: Tensor, mask: Tensor | None, examples: int, what: str
) -> Tensor:
    by_position = seen.unsqueeze(1) if seen.ndim == 2 else seen
    if by_position.ndim != 3 or len(by_position) != examples:
        raise LayerNotSupported(
            f"{layer.name!r} has {what} of shape {tuple(seen.shape)} for a batch of {examples}. "
            "EK-FAC covers (batch, features) and (batch, positions, features)."
        )
    by_position = by_position.to(torch.promote_types(by_position.dtype, torch.float32))
    if mask is not None and seen.ndim == 3:
        if by_position.shape[:2] != mask.shape:
            raise LayerNotSupported(
                f"{layer.name!r} has {what} of shape {tuple(seen.shape)}, but the token mask has "
                f"shape {tuple(mask.shape)}. EK-FAC must know which positions are padding."
            )
        by_position = by_position.masked_fill(~mask.unsqueeze(-1), 0)
    if not by_position.isfinite().all():
        raise NotFinite(
            f"{layer.name!r} has NaN or infinite {what}. Check the weights of the layers up to it "
            "and the inputs of this batch."
        )
    return by_position


def number_of_positions(seen: Tensor, mask: Bool[Tensor, "batch tokens"] | None) -> int:
    """Real positions in a layer's input as a hook saw it."""
    if mask is not None and seen.ndim == 3:
        return int(mask.sum())
    return seen.shape[:-1].numel()


def without_silent_positions(
    activations: Float[Tensor, "batch positions d_in"],
    output_gradients: Float[Tensor, "batch positions d_out"],
) -> tuple[Float[Tensor, "batch heard d_in"], Float[Tensor, "batch heard d_out"]]:
    """Both without the positions at which no example of the batch has a gradient.

    They add nothing to any gradient. In a classifier's last block all but the first are silent.
    """
    heard = output_gradients.abs().amax(dim=(0, 2)) > 0
    if heard.all():
        return activations, output_gradients
    return activations[:, heard], output_gradients[:, heard]


def per_example_gradients(
    activations: Float[Tensor, "batch positions d_in"],
    output_gradients: Float[Tensor, "batch positions d_out"],
) -> Float[Tensor, "batch d_out d_in"]:
    """G_n = Σ_t g_nt a_ntᵀ, the gradient of each example, summed over positions."""
    return output_gradients.mT @ activations
