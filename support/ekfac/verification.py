"""Whether what hooks see of a model is what autograd says of it: looked at once, on two short examples.

A layer may be used in ways that no hook can tell, say by a subclass that scales its output, and a model
may let padding or its neighbours in a batch into the outputs of an example. Either would make every
number wrong, and nothing else would say so.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from support.ekfac.blocks import Block, Inputs, blocks_of, of_each
from support.ekfac.errors import LayerNotSupported, OutputsNotSupported, WrongModel
from support.ekfac.layers import TrackedLayer
from support.ekfac.passes import Passes

LONGEST = 32
"""Tokens of an example, where they can be cut: enough to see, and cheap."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Of relative differences, by the dtype of the model's outputs; lower precisions have a tenth."""


def verify(passes: Passes, block: Block) -> tuple[Block, Float[Tensor, "batch classes"]]:
    """Compare the first examples of a block, taken together, with autograd and with each taken alone.

    Returns them, short, with what the model says of them. Raises `LayerNotSupported`, naming the layer,
    when its gradient is not autograd's, and `OutputsNotSupported` when the outputs of an example change
    with padding or with its neighbours.
    """
    block = _short(block.ordinary(), passes)
    for one in passes.over([block], lambda outputs, _: [_on_the_first(outputs)]):
        found = {name: gradients.per_example() for name, gradients in one.gradients()}
        outputs, tolerance = one.outputs, TOLERANCE.get(one.dtype, 0.1)
    for row in range(len(block.rows)):
        alone = _alone(passes, block, row).to(outputs.dtype)
        if (outputs[row] - alone).norm() > tolerance * outputs.norm():
            raise OutputsNotSupported(
                f"The model says {outputs[row].tolist()} of an example beside others and "
                f"{alone.tolist()} when it is alone without padding, so influences would depend on "
                "how examples are batched. Does the model see padding, or other examples?"
            )
    expected = _by_autograd(passes, block)
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        difference = (found[name][0] - gradient).norm() + found[name][1:].norm()
        # What is small beside the other layers may be rounding.
        if difference > tolerance * max(gradient.norm(), 1e-3 * largest):
            raise LayerNotSupported(
                f"The gradient of {name!r} is not the product of what goes into the layer and what "
                f"comes back to it (relative difference {difference / gradient.norm():.1e}). Is it a "
                "subclass of Linear with a forward of its own, or are batch and positions exchanged? "
                f"Freeze it: model.get_submodule({name!r}).requires_grad_(False)"
            )
    return block, _said(passes, block.inputs)


def refuse_another_model(passes: Passes, block: Block, outputs: Float[Tensor, "batch classes"]) -> None:
    """Raise `WrongModel` unless the model says of these examples what it said when it was fitted."""
    said = _said(passes, of_each(block.inputs, lambda x: x.to(passes.device)))
    found, tolerance = said.to(outputs), TOLERANCE.get(said.dtype, 0.1)
    if found.shape != outputs.shape or (found - outputs).norm() > tolerance * outputs.norm():
        raise WrongModel(
            "The curvature was fitted on a model with the same weights that does something else with "
            f"them: it said {outputs[0].tolist()} where this one says {found[0].tolist()}. Fit this one."
        )


def _on_the_first(outputs: Tensor) -> Float[Tensor, "batch classes"]:
    """A direction that concerns the first example only, and no two of its outputs alike."""
    direction = torch.zeros_like(outputs)
    direction[0] = torch.linspace(1, 2, outputs.shape[1], dtype=outputs.dtype)
    return direction


def _short(block: Block, passes: Passes) -> Block:
    """Two examples of the block, the second one shorter where the block shows what padding is."""
    mask, two = passes.token_mask(block.inputs), block.part(slice(2))
    if mask is None or mask.ndim != 2:
        return two
    inputs = of_each(two.inputs, lambda x: x[:, :LONGEST] if x.shape[:2] == mask[:2].shape else x)
    if isinstance(inputs, Tensor) and len(inputs) == 2 and not mask.all():
        inputs = inputs.clone()
        inputs[1, (inputs.shape[1] + 1) // 2 :] = block.inputs[~mask][0]
    return Block(two.rows, inputs, None)


def _by_autograd(passes: Passes, block: Block) -> dict[str, Float[Tensor, "d_out d_in"]]:
    with torch.enable_grad():
        outputs = passes.outputs(block.inputs)
        scalar = (outputs * _on_the_first(outputs.detach())).sum()
        return {name: _gradient(layer, scalar).to(layer.dtype) for name, layer in passes.layers.items()}


def _gradient(layer: TrackedLayer, scalar: Tensor) -> Float[Tensor, "d_out d_in"]:
    parameters = list(layer.module.parameters(recurse=False))
    weight, *bias = torch.autograd.grad(
        scalar, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    if type(layer.module).__name__ == "Conv1D":
        weight = weight.T
    return torch.cat([weight, *(one.unsqueeze(1) for one in bias)], dim=1)


def _alone(passes: Passes, block: Block, row: int) -> Float[Tensor, " classes"]:
    one = block.part(slice(row, row + 1))
    (trimmed,) = blocks_of(one.inputs, None, passes.token_mask)
    return _said(passes, trimmed.inputs)[0]


def _said(passes: Passes, inputs: Inputs) -> Float[Tensor, "batch classes"]:
    with torch.no_grad():
        return passes.outputs(inputs)
