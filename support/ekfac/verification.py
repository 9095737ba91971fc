"""Whether what hooks see of a model is what autograd says of it: looked at once, on two examples.

A layer may be used in ways that no hook can tell, say by a subclass that scales its output, and a model
may let padding or its neighbours in a batch into the outputs of an example. Either would make every
number wrong, and nothing else would say so.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from support.ekfac.batches import Batch, Inputs, count_of, of_each
from support.ekfac.blocks import Block, blocks_of, taken
from support.ekfac.errors import EmptyLoader, LayerNotSupported, OutputsNotSupported, WrongModel
from support.ekfac.gradients import LayerGradients
from support.ekfac.layers import TrackedLayer, undisturbed
from support.ekfac.matrix_products import FULL, exact_products
from support.ekfac.passes import Passes

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Of relative differences, by the dtype of the model's outputs; lower precisions have a tenth."""


@torch.inference_mode(False)
@exact_products()
def verify(passes: Passes, batches: list[Batch]) -> tuple[Block, Float[Tensor, "batch classes"]]:
    """Compare two of the first batches' examples, taken together, with autograd and with each taken alone,
    in the model's own precision and without rounding of what goes into products: a check must tell a wrong
    gradient from a coarse one.

    Returns them with what the model says of them. Raises `LayerNotSupported`, naming the layer, when its
    gradient is not autograd's, `OutputsNotSupported` when the outputs of an example change with padding
    or with its neighbours, and `EmptyLoader`.
    """
    if not batches:
        raise EmptyLoader("The loader gave no batch. It must hold at least one.")
    passes = replace(passes, precision=FULL)
    block = _pair(batches, passes).ordinary(passes.device)
    mask = passes.token_mask(block.inputs)
    for one in passes.over(
        [block], lambda outputs, *_: [_of(row, outputs, mask) for row in range(len(outputs))]
    ):
        found, row = dict(one.gradients()), one.number
        outputs, tolerance = one.outputs, TOLERANCE.get(one.dtype, 0.1)
        alone = _alone(passes, block, row).to(outputs.dtype)
        beside = _last(outputs, passes.token_mask(block.inputs))[row]
        if (beside - alone).norm() > tolerance * beside.norm():
            raise OutputsNotSupported(
                f"The model says {_in_short(beside)} of an example beside others and "
                f"{_in_short(alone)} when it is alone without padding, so influences would depend on "
                "how examples are batched. Does the model see padding, or other examples?"
            )
        _compare(found, _by_autograd(passes, block, row), row, tolerance)
    return block, _said(passes, block.inputs)


def _compare(
    found: dict[str, LayerGradients],
    expected: dict[str, Float[Tensor, "d_out d_in"]],
    row: int,
    tolerance: float,
) -> None:
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        others = found[name].per_example()
        others[row] -= gradient
        # What is small beside the other layers may be rounding.
        if others.norm() > tolerance * max(gradient.norm(), 1e-3 * largest):
            raise LayerNotSupported(
                f"The gradient of {name!r} is not the product of what goes into the layer and what "
                f"comes back to it (relative difference {others.norm() / gradient.norm():.1e}). Does the "
                "mask call tokens padding that the model looks at? Are batch and positions exchanged? If it "
                "is a subclass of Linear with a forward of its own, freeze it before the engine is made: "
                f"model.get_submodule({name!r}).requires_grad_(False)"
            )


@exact_products()
def refuse_another_model(passes: Passes, block: Block, outputs: Float[Tensor, "batch classes"]) -> None:
    """Raise `WrongModel` unless the model says of these examples what it said when it was fitted."""
    said = _said(passes, of_each(block.inputs, lambda x: x.to(passes.device)))
    found, tolerance = said.to(outputs), TOLERANCE.get(said.dtype, 0.1)
    if found.shape != outputs.shape or (found - outputs).norm() > tolerance * outputs.norm():
        raise WrongModel(
            "The curvature was fitted on a model with the same weights that does something else with "
            f"them: it said {_in_short(outputs[0])} where this one says {_in_short(found[0])}. Fit this one."
        )


def _of(row: int, outputs: Float[Tensor, "batch ..."], mask: Tensor | None) -> Float[Tensor, "batch ..."]:
    """A direction that concerns one example only, no two of its classes alike, and no padding."""
    direction = torch.zeros_like(outputs)
    direction[row] = torch.linspace(1, 2, outputs.shape[-1]).to(outputs)
    if outputs.ndim == 3 and mask is not None:
        direction *= mask.unsqueeze(2)
    return direction


def _last(outputs: Float[Tensor, "batch ..."], mask: Tensor | None) -> Float[Tensor, "batch classes"]:
    """Outputs, of a model that writes those at each example's last token."""
    if outputs.ndim == 2:
        return outputs
    if mask is None:
        return outputs[:, -1]
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask
    return outputs[torch.arange(len(outputs), device=mask.device), places.argmax(dim=1)]


def _in_short(outputs: Float[Tensor, " classes"]) -> str:
    return f"{outputs[:5].tolist()}{' and so on' if len(outputs) > 5 else ''}"


def _pair(batches: list[Batch], passes: Passes) -> Block:
    """The shortest example and the next longer one, with a column of padding more where there is one."""
    inputs, _ = batches[0]
    if count_of(inputs) == 1 and len(batches) > 1 and isinstance(inputs, Tensor):
        other, _ = batches[1]
        inputs = torch.cat([inputs, other[:1]]) if inputs.shape[1:] == other.shape[1:] else inputs
    mask = passes.token_mask(inputs)
    if mask is None or mask.ndim != 2:
        return Block([0, 1], inputs, None).part(slice(min(2, count_of(inputs))))
    lengths = mask.sum(dim=1)
    order = lengths.argsort(stable=True)
    longer = order[lengths[order] > lengths[order[0]]]
    rows = torch.cat([longer[:1] if len(longer) else order[1:2], order[:1]])
    real = mask[rows].any(dim=0).nonzero()[:, 0]
    columns = slice(max(int(real.min()) - 1, 0), int(real.max()) + 2)
    return Block(list(range(len(rows))), taken(inputs, mask, rows.tolist(), columns), None)


def _by_autograd(passes: Passes, block: Block, row: int) -> dict[str, Float[Tensor, "d_out d_in"]]:
    parameters = [
        parameter
        for layer in passes.layers.values()
        for parameter in (layer.module.weight, *([layer.module.bias] if layer.has_bias else []))
    ]
    with torch.enable_grad():
        outputs = passes.outputs(block.inputs)
        scalar = (outputs * _of(row, outputs.detach(), passes.token_mask(block.inputs))).sum()
        found = iter(torch.autograd.grad(scalar, parameters, allow_unused=True, materialize_grads=True))
    return {name: _as_one(layer, found) for name, layer in passes.layers.items()}


def _as_one(layer: TrackedLayer, found: Iterator[Tensor]) -> Float[Tensor, "d_out d_in"]:
    """The next gradients, of a layer's weight and, if it has one, its bias, as one matrix."""
    weight = next(found)
    if type(layer.module).__name__ == "Conv1D":
        weight = weight.T
    bias = [next(found).unsqueeze(1)] if layer.has_bias else []
    return torch.cat([weight, *bias], dim=1).to(layer.dtype)


def _alone(passes: Passes, block: Block, row: int) -> Float[Tensor, " classes"]:
    one = block.part(slice(row, row + 1))
    (trimmed,) = blocks_of(one.inputs, None, passes.token_mask)
    return _said(passes, trimmed.inputs)[0]


def _said(passes: Passes, inputs: Inputs) -> Float[Tensor, "batch classes"]:
    with undisturbed(passes.model), torch.no_grad():
        return _last(passes.outputs(inputs), passes.token_mask(inputs))
