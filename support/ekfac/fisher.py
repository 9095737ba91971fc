"""The Fisher's directions of many examples, sent back through the model and added up.

Sums over parts of the examples add up to the sums over all of them, in any order: a fit may take its
examples at once, in pieces, or spread over processes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from support.ekfac.blocks import Block
from support.ekfac.capture import Consume, Trace
from support.ekfac.curvature import Covariances, LayerCurvature, add_squares
from support.ekfac.likelihood import Likelihood
from support.ekfac.passes import Once, Passes, in_float32, with_more_to_come
from support.ekfac.positions import LayerGradients


@dataclass(frozen=True)
class Fisher:
    """The model whose Fisher is wanted, and the loss that defines it.

    Each method adds the examples of some blocks to sums that the caller keeps, draws labels from
    `generator` where the likelihood samples them, and returns the number of examples. Each raises
    `NotFinite`, `ModelInTrainingMode` and `LayerNotSupported`.
    """

    passes: Passes
    likelihood: Likelihood

    def no_covariances(self) -> dict[str, Covariances]:
        """The sums over no example, from input to output."""
        return {
            name: Covariances(layer.d_out, layer.d_in, layer.dtype, layer.device)
            for name, layer in self.passes.layers.items()
        }

    def add_to_covariances(
        self,
        covariances: dict[str, Covariances],
        blocks: Iterable[Block],
        generator: torch.Generator,
    ) -> int:
        """Σ a aᵀ and Σ g gᵀ of every layer."""

        def add(name: str, gradients: LayerGradients) -> None:
            covariances[name].add_output_gradients(gradients.output_gradients)

        def add_activations(trace: Trace, once: Once) -> None:
            for name, covariance in covariances.items():
                if once.is_first("activations", name):
                    covariance.add_activations(trace.activations(name), trace.examples)
                    once.finish("activations", name)

        return self._send(blocks, generator, add, add_activations)

    def add_to_eigenvalues(
        self,
        curvature: dict[str, LayerCurvature],
        blocks: Iterable[Block],
        generator: torch.Generator,
    ) -> int:
        """Σ (Q_gᵀ G Q_a)² into `eigenvalues` of every layer."""

        def add(name: str, gradients: LayerGradients) -> None:
            add_squares(curvature[name].eigenvalues, gradients, curvature[name].basis)

        return self._send(blocks, generator, add)

    def _send(
        self,
        blocks: Iterable[Block],
        generator: torch.Generator,
        consume: Consume,
        beforehand: Callable[[Trace, Once], None] = lambda trace, once: None,
    ) -> int:
        counted: list[int] = []

        def work(block: Block, trace: Trace, once: Once) -> None:
            beforehand(trace, once)
            outputs = in_float32(trace.outputs.detach())
            directions = enumerate(self.likelihood.fisher_directions(outputs, generator))
            for (number, direction), more in with_more_to_come(directions):
                trace.backward(direction, once(number, consume), keep_graph=more)
            counted.append(trace.examples)

        self.passes.over(blocks, work)
        return sum(counted)
