"""Hooks: one forward pass through a model that remembers what its tracked layers saw, and backward
passes that hand each layer's activations and output gradients on as the gradient flows by.

Weight gradients are never computed. The parameters stay out of autograd and the graph starts at the
output of the first tracked layer, so a backward pass costs what gradients of activations cost.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from support.ekfac.arithmetic import Arithmetic
from support.ekfac.errors import (
    LayerNotSupported,
    ModelInTrainingMode,
    OutputsNotSupported,
)
from support.ekfac.layers import TrackedLayer
from support.ekfac.positions import LayerGradients, activation_rows, is_finite, layer_gradients

Consume = Callable[[str, LayerGradients], None]
"""Receives a layer's name and its gradients for the batch."""


class Trace:
    """One forward pass: its outputs, and what the tracked layers saw.

    `outputs` is `(batch, classes)`. The model runs inside `arithmetic()`. `activations(name)` is
    `(positions, d_in)`. Raises `LayerNotSupported` for a layer called twice or never, `NotFinite` at
    the first layer that sees NaN, and `OutputsNotSupported`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, TrackedLayer],
        inputs: Tensor,
        arithmetic: Arithmetic = nullcontext,
    ):
        self.layers = layers
        self.examples = len(inputs)
        self.mask: Bool[Tensor, "batch tokens"] | None = (
            model.token_mask(inputs) if hasattr(model, "token_mask") else None
        )
        self._seen: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._consume: Consume | None = None
        self._graph_starts: list[Tensor] = []
        handles = [
            layer.module.register_forward_hook(self._remember(name))
            for name, layer in layers.items()
        ]
        try:
            with arithmetic():
                self.outputs = model(ordinary(inputs))
        finally:
            for handle in handles:
                handle.remove()
        for name in layers.keys() - self._seen.keys():
            raise LayerNotSupported(
                f"{name!r} requires gradients but was not called in the forward pass. Freeze it: "
                f"model.get_submodule({name!r}).requires_grad_(False)"
            )
        _check_outputs(self.outputs, self.examples)

    def _remember(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if name in self._seen:
                raise LayerNotSupported(
                    f"{name!r} is called more than once in one forward pass, which EK-FAC does not "
                    f"cover. Freeze it: model.get_submodule({name!r}).requires_grad_(False)"
                )
            self._seen[name] = inputs[0].detach()
            self._versions[name] = inputs[0]._version
            if not is_finite(inputs[0].detach()):
                # Raises now, at the first layer that sees it, unless it is in the padding.
                self.activations(name)
            if not output.requires_grad:
                start = output.detach().requires_grad_()
                self._graph_starts.append(start)
                # The model may go on in place, which a leaf would refuse.
                output = start.clone()
            output.register_hook(partial(_hand_on, weakref.ref(self), name))
            return output

        return hook

    def hand_on(self, name: str, gradient: Tensor) -> None:
        """Give a layer's activations and output gradients to the consumer of this backward pass."""
        layer, seen = self.layers[name], self._unchanged(name)
        self._consume(
            name, layer_gradients(layer, seen, gradient.detach(), self.mask, self.examples)
        )

    def activations(self, name: str) -> Float[Tensor, "positions d_in"]:
        """What went into a layer, at real positions."""
        return activation_rows(self.layers[name], self._unchanged(name), self.mask, self.examples)

    def _unchanged(self, name: str) -> Tensor:
        """A layer's input. Raises `LayerNotSupported` when the model has overwritten it."""
        seen = self._seen[name]
        if seen._version != self._versions[name]:
            raise LayerNotSupported(
                f"The input of {name!r} was changed in place after the layer had read it. "
                "Make that operation out of place (x = x + y instead of x += y)."
            )
        return seen

    @property
    def tokens(self) -> int:
        """The length of the inputs: the mask's, or else that of the longest layer input."""
        if self.mask is not None:
            return self.mask.shape[1]
        return max(seen.shape[1] if seen.ndim == 3 else 1 for seen in self._seen.values())

    def backward(
        self, direction: Float[Tensor, "batch classes"], consume: Consume, keep_graph: bool = False
    ) -> None:
        """Send `direction`, a gradient with respect to the outputs, back through the model.

        `consume` is called once per layer that the gradient reaches, from output to input.
        """

        self._consume = consume
        try:
            torch.autograd.backward(
                self.outputs,
                direction.to(self.outputs.dtype),
                retain_graph=keep_graph,
                inputs=self._graph_starts,
            )
        finally:
            self._consume = None
            for start in self._graph_starts:
                start.grad = None


def _check_outputs(outputs: object, examples: int) -> None:
    if not isinstance(outputs, Tensor):
        raise OutputsNotSupported(
            f"The model returned a {type(outputs).__name__}, but the engine wants a tensor of logits, "
            "(batch, classes). Wrap the model in a module that returns them."
        )
    if outputs.ndim != 2 or len(outputs) != examples:
        raise OutputsNotSupported(
            f"The model returned shape {tuple(outputs.shape)} for a batch of {examples}, but the "
            "engine wants (batch, classes): one row of logits per example."
        )
    if not outputs.requires_grad:
        raise OutputsNotSupported(
            "The model's outputs don't depend on any tracked layer. Is there a detach() or a "
            "torch.no_grad() in its forward pass?"
        )


def _hand_on(trace: "weakref.ref[Trace]", name: str, gradient: Tensor) -> None:
    # Weakly: the graph would hold the trace that holds the graph, and neither would ever be freed.
    trace().hand_on(name, gradient)


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that autograd accepts if it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


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
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for parameter in wanted:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)
