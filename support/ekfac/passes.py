"""Passes of many examples through the model: forward once for each block, back once for each direction.

Hooks remember what the tracked layers saw, and where they stand in the graph. Weight gradients are never
computed: the parameters stay out of autograd and the graph starts at the output of the first tracked
layer, so a backward pass costs what gradients of activations cost.

    for one in passes.over(blocks, directions):
        for name, gradients in one.gradients():
            ...
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from support.ekfac.batches import Inputs, TokenMask
from support.ekfac.blocks import ON_CPU, ON_GPU, AtATime, Block
from support.ekfac.draws import drawn
from support.ekfac.errors import BatchNotSupported, BlockHalved, LayerNotSupported
from support.ekfac.gradients import LayerGradients, activation_rows, all_finite, check_finite, layer_gradients
from support.ekfac.layers import TrackedLayer, undisturbed, widest_outputs
from support.ekfac.likelihood import Directions, refuse_no_logits
from support.ekfac.matrix_products import FULL, Arithmetic, Precision, arithmetic
from support.ekfac.memory import parts_that_fit

Item = TypeVar("Item")


class Pass:
    """A block's forward pass, and what came back to each layer of the direction sent last.

    `rows` says where its examples stand among those that the block was chosen from. `outputs` are
    `(batch, classes)`, or `(batch, positions, vocabulary)`, out of autograd and float32 at least, whatever
    the model's `dtype`. `number` counts the directions from 0; they may be `drawn`.
    """

    def __init__(self, passes: "Passes", block: Block, arithmetic: Arithmetic):
        self.layers, self.rows, self.examples = passes.layers, block.rows, len(block.rows)
        self.mask, self.device = passes.token_mask(block.inputs), passes.device
        self.number, self.drawn = -1, False
        self._seen: dict[str, Tensor] = {}
        self._sums: list[Tensor] = []
        self._versions: dict[str, int] = {}
        self._edges: dict[str, GradientEdge] = {}
        self._received: dict[str, Tensor | None] = {}
        handles = [
            layer.module.register_forward_hook(partial(self._remember, name), with_kwargs=True)
            for name, layer in self.layers.items()
        ]
        try:
            with arithmetic():
                outputs = passes.outputs(block.inputs)
        finally:
            for handle in handles:
                handle.remove()
        for name in self.layers.keys() - self._seen.keys():
            raise LayerNotSupported(
                f"{name!r} requires gradients but was not called in the forward pass. Freeze it before "
                f"the engine is made: "
                f"model.get_submodule({name!r}).requires_grad_(False)"
            )
        self._refuse_not_finite()
        refuse_no_logits(outputs, self.examples, passes.whole)
        self._graph: Tensor | None = outputs
        self.dtype = outputs.dtype
        # Probabilities are worth more digits than matrix products.
        precise = torch.promote_types(self.dtype, torch.float32)
        self.outputs: Float[Tensor, "batch ..."] = outputs.detach().to(precise)

    @cached_property
    def where(self) -> Int[Tensor, " batch"]:
        """`rows` where results are, to index them without waiting for the device."""
        return torch.tensor(self.rows).to(self.device, non_blocking=True)

    def _remember(self, name: str, module: nn.Module, inputs: tuple, named: dict, output: Tensor) -> Tensor:
        if name in self._seen:
            raise LayerNotSupported(
                f"{name!r} is called more than once in one forward pass, which EK-FAC does not "
                f"cover. Freeze it before the engine is made: "
                f"model.get_submodule({name!r}).requires_grad_(False)"
            )
        if not torch.is_grad_enabled():
            raise LayerNotSupported(
                f"{name!r} is called under torch.no_grad(), as reentrant gradient checkpointing does. "
                f"Switch that off, or freeze it before the engine is made: "
                f"model.get_submodule({name!r}).requires_grad_(False)"
            )
        seen = next(iter((*inputs, *named.values())))
        self._seen[name], self._versions[name] = seen.detach(), seen._version
        self._sums.append(self._seen[name].sum())
        if not output.requires_grad:
            # The model may go on in place, which a leaf would refuse.
            output = output.detach().requires_grad_().clone()
        self._edges[name] = get_gradient_edge(output)
        return output

    def _refuse_not_finite(self) -> None:
        """Raise `NotFinite` at the first layer that sees it, unless it is padding."""
        if all_finite(self._sums):
            return
        for name in self._seen:
            check_finite(self.layers[name], self.activations(name), "activations")

    def send_back(self, direction: Float[Tensor, "batch ..."], more_to_come: bool) -> None:
        """A backward pass of `direction`, a gradient with respect to the outputs."""
        self.number += 1
        self._received.clear()
        if not self._graph.requires_grad:
            return
        received = torch.autograd.grad(
            self._graph,
            list(self._edges.values()),
            direction.to(self._graph.dtype),
            retain_graph=more_to_come,
            allow_unused=True,
        )
        self._received = dict(zip(self._edges, received, strict=True))
        if not more_to_come:
            self._graph = None

    def gradients(self) -> Iterator[tuple[str, LayerGradients]]:
        """Every tracked layer with its gradients, from input to output; without rows where nothing
        came back. Raises `NotFinite` and `LayerNotSupported`."""
        seen = {name: self._unchanged(name) for name in self.layers}
        return layer_gradients(self.layers, seen, self._received, self.mask, self.examples)

    def activations(self, name: str) -> Float[Tensor, "positions d_in"]:
        """What went into a layer, at all real positions. Raises as `gradients` does."""
        seen = self._unchanged(name)
        return activation_rows(self.layers[name], seen, self.mask, self.examples, self._real)

    @cached_property
    def _real(self) -> Tensor | None:
        if self.mask is None or self.mask.all():
            return None
        return self.mask.flatten().nonzero()[:, 0]

    def _unchanged(self, name: str) -> Tensor:
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

    def forget(self) -> None:
        """Let go of all tensors: the next block's pass wants their room."""
        self._graph = None
        del self.outputs
        for kept in (self._seen, self._edges, self._received):
            kept.clear()


@dataclass(frozen=True)
class Passes:
    """The model that examples are sent through, and its layers.

    `whole` says that no other layers require gradients: the outputs then depend on one of these.
    """

    model: nn.Module
    layers: dict[str, TrackedLayer]
    precision: Precision = FULL
    whole: bool = True

    def token_mask(self, inputs: Inputs) -> Tensor | None:
        """Which tokens are real, as the inputs' `attention_mask` or the model's `token_mask` say."""
        if isinstance(inputs, Mapping):
            mask = inputs.get("attention_mask")
            return None if mask is None else mask.bool()
        return self.model.token_mask(inputs).bool() if hasattr(self.model, "token_mask") else None

    def outputs(self, inputs: Inputs) -> object:
        """What the model says; of a Hugging Face output the logits. Raises `BatchNotSupported` when it knows
        no such token or position."""
        try:
            said = self.model(**inputs) if isinstance(inputs, Mapping) else self.model(inputs)
        except IndexError as error:
            ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
            what = "" if ids is None else f"; the largest is {ids.max().item()}, the shape {tuple(ids.shape)}"
            raise BatchNotSupported(
                f"The model can't look up what a batch has ({error}){what}. Is this its own tokenizer, and "
                "is no text longer than it reads?"
            ) from error
        return getattr(said, "logits", said)

    @property
    def together(self) -> tuple[TokenMask, AtATime]:
        """By what examples are taken together."""
        return self.token_mask, ON_CPU if self.device.type == "cpu" else ON_GPU

    @property
    def device(self) -> torch.device:
        return next(iter(self.layers.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """That of curvature and results."""
        return next(iter(self.layers.values())).dtype

    def zeros(self, *shape: int) -> Tensor:
        """Room for a result, filled outside inference mode even when called inside."""
        with torch.inference_mode(False):
            return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    def over(self, blocks: Iterable[Block], directions: Directions, seed: str = "") -> Iterator[Pass]:
        """A pass for every block and direction. It is good until the next one is asked for. `seed` is for
        directions that are drawn.

        A block of more logits than `OUTPUTS_AT_A_TIME` is cut into parts. One whose way forward, or
        first way back, does not fit into memory is halved, with a
        `BlockHalved` warning; a single example that does not fit raises what the model raised.
        Between two passes the model is as it was found. Raises `ModelInTrainingMode`,
        `LayerNotSupported`, `NotFinite`, `OutputsNotSupported`.
        """
        context, outputs = arithmetic(self.precision.products, self.device), widest_outputs(self.model)
        for block in blocks:
            waiting = block.parts(parts_that_fit(len(block.rows), block.tokens(self.token_mask), outputs))[
                ::-1
            ]
            while waiting:
                part = waiting.pop()
                passes = self._of_block(part, directions, seed, context)
                first = _first(passes, part)
                if first is None:
                    waiting += reversed(part.parts(2))
                else:
                    yield first
                    yield from passes

    def _of_block(
        self, block: Block, directions: Directions, seed: str, context: Arithmetic
    ) -> Iterator[Pass]:
        with undisturbed(self.model):
            block = block.ordinary(self.device)
            one = Pass(self, block, context)

            def draws() -> list[torch.Generator]:
                one.drawn = True
                return drawn(seed, block.inputs, one.mask)

            to_send = _with_more_to_come(directions(one.outputs, block.labels, one.mask, draws))
        try:
            more_to_come = True
            while more_to_come:
                with undisturbed(self.model):
                    direction, more_to_come = next(to_send)
                    one.send_back(direction, more_to_come)
                yield one
        finally:
            one.forget()


def _first(passes: Iterator[Pass], block: Block) -> Pass | None:
    """The first of a block's passes; None, with a warning, when it wants more memory than there is."""
    try:
        return next(passes)
    except RuntimeError as error:
        if len(block.rows) == 1 or not _is_out_of_memory(error):
            raise
    # Not while the exception is held, and with it all that the failed pass had in memory.
    one, other = (len(half.rows) for half in block.parts(2))
    warnings.warn(
        BlockHalved(
            f"{one + other} examples at a time are too many for the memory; going on with {one} and {other}."
        ),
        stacklevel=3,
    )
    return None


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _with_more_to_come(items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Each item, and whether another follows: the last direction needs no graph kept behind it."""
    ahead = iter(items)
    for item in ahead:
        for following in ahead:
            yield item, True
            item = following
        yield item, False
