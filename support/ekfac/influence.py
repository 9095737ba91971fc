"""`EkfacInfluence`: fit the curvature once, then ask which training examples a prediction rests on."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from support.ekfac.batches import Batch, InOrder, Inputs, Labels, count_of, number_of_examples
from support.ekfac.blocks import Block, loader_blocks
from support.ekfac.curvature import (
    Regularization,
    check_regularization,
    damped_inverse,
    rotated_in_parts,
    take_out_of_basis,
)
from support.ekfac.errors import EmptyLoader, LabelsMismatch, refuse_unknown
from support.ekfac.fit import EkfacCurvature
from support.ekfac.gradients import LayerGradients
from support.ekfac.low_rank import LowRank, joined, of_rank
from support.ekfac.memory import factor_bytes, in_groups, queries_at_a_time
from support.ekfac.plan import Plan, make_plan
from support.ekfac.scores import (
    NORMALISATIONS,
    ByLayer,
    Factors,
    check_factors,
    divided_by_root,
    of_each_other,
    products,
    products_by_row,
    squared_norms,
    sum_over_layers,
)


class EkfacInfluence(EkfacCurvature):
    """Influence functions with EK-FAC curvature for the linear layers that require gradients.

    The influence of a training example on a test example is ⟨(F + λ)⁻¹ ∇loss(test), ∇loss(train)⟩,
    summed over layers, with F the Fisher of each layer in its Kronecker-factored eigenbasis. Positive
    means: giving the training example more weight lowers the test loss. It is not divided by the
    number of training examples.

    Construction is that of `Engine`; `fit`, `save`, `load` and `to` are those of `EkfacCurvature`.
    """

    def plan(self, train_loader: Iterable, test_loader: Iterable = ()) -> Plan:
        """What `fit`, `self_influences` and `score` will cost with these examples; needs no fit.

        Batches are as in `score`. Goes over the loaders twice, keeping nothing, and times three blocks of
        training examples. Raises `EmptyLoader`, and what a forward pass raises.
        """
        return make_plan(self, self.batches(train_loader), self.batches(test_loader))

    def influence_factors(
        self, x: Inputs, y: Labels, weights: Float[Tensor, "test examples"] | None = None
    ) -> Factors:
        """(F + λ)⁻¹ ∇loss of each example, layer by layer: precondition once, score many.

        `(test, d_out, d_in)` each. With `weights` a query is a sum of losses: 1 and −1 say the loss of one
        example less that of another, which a low rank then knows as one. Raises `NotFitted`,
        `LabelsMismatch`, `NotFinite`, `ModelInTrainingMode`.
        """
        return self._factors(self._blocks(x, y, "influence factors"), count_of(x), weights)

    def influences_by_layer(
        self, x_test: Inputs, y_test: Labels, x: Inputs | None = None, y: Labels | None = None
    ) -> ByLayer:
        """Each layer's part of `influences`, from input to output; they add up to it.

        Without `x` and `y`, the influences of the test examples on each other. Raises as
        `influence_factors` does.
        """
        if (x is None) != (y is None):
            raise LabelsMismatch(
                "Training inputs and labels come together, or not at all: one of x and y is missing."
            )
        factors = self.influence_factors(x_test, y_test)
        x, y = (x_test, y_test) if x is None else (x, y)
        return self.influences_by_layer_from_factors(factors, x, y)

    def influences(
        self, x_test: Inputs, y_test: Labels, x: Inputs | None = None, y: Labels | None = None
    ) -> Float[Tensor, "test train"]:
        """Influence of every training example (column) on every test example (row).

        Without `x` and `y`, the influences of the test examples on each other, a symmetric matrix.
        Raises as `influence_factors` does.
        """
        return sum_over_layers(self.influences_by_layer(x_test, y_test, x, y))

    def influences_from_factors(self, factors: Factors, x: Inputs, y: Labels) -> Float[Tensor, "test train"]:
        """`influences` of the examples `factors` were made of, from training examples `x`, `y`.

        Raises `FactorsMismatch` for factors of other layers, and as `influence_factors` does.
        """
        return sum_over_layers(self.influences_by_layer_from_factors(factors, x, y))

    def influences_by_layer_from_factors(self, factors: Factors, x: Inputs, y: Labels) -> ByLayer:
        """Each layer's part of `influences_from_factors`. Raises as that does."""
        self._require_fit()
        check_factors(factors, self.layers)
        scores = {name: self.passes.zeros(len(factor), count_of(x)) for name, factor in factors.items()}
        for one in self._losses(self._blocks(x, y, "influences")):
            for name, gradients in one.gradients():
                scores[name][:, one.where] = products(factors[name], gradients)
        for part in scores.values():
            self._finite(part)
        return scores

    def self_influences(self, x: Inputs, y: Labels) -> Float[Tensor, " batch"]:
        """⟨(F + λ)⁻¹ ∇loss, ∇loss⟩ of each example with itself, never negative.

        Raises as `influence_factors` does.
        """
        result = self.passes.zeros(count_of(x))
        for one in self._losses(self._blocks(x, y, "self-influences")):
            result[one.where] = sum(
                self._squared_norms(name, gradients) for name, gradients in one.gradients()
            )
        return self._finite(result)

    def relative_influences(
        self, x_test: Inputs, y_test: Labels, x: Inputs, y: Labels
    ) -> Float[Tensor, "test train"]:
        """Influences divided by √(self-influence of the training example).

        How much a training example says about this test example, among all it says: an outlier that
        pulls on everything no longer wins every row (θ-RelatIF, Barshan et al. 2020). Zero where the
        self-influence is zero. Raises as `influence_factors` does.
        """
        return self.score([(x_test, y_test)], [(x, y)], "relative")

    def score(
        self, test_loader: Iterable, train_loader: Iterable, normalisation: str = "plain"
    ) -> Float[Tensor, "test train"]:
        """Influence of all training on all test examples of two loaders.

        `normalisation` is "plain" or "relative", as `relative_influences`. Batches are
        `(inputs, labels, …)` or mappings. As many test examples at a time, or layers of one, as have factors
        that fit `memory_budget`; the training examples pass by once for each such group. Raises
        `EmptyLoader`, `LoaderShuffles`, `BadSetting`, and as `influence_factors` does.
        """
        self._require_fit()
        refuse_unknown("normalisation", normalisation, NORMALISATIONS)
        test_loader, train_loader = self.batches(test_loader), self.batches(train_loader)
        training, total = InOrder(train_loader), number_of_examples(train_loader)
        # All at once: one loader may be both, and gives one iterator at a time.
        queries, relative = list(InOrder(test_loader)), normalisation == "relative"
        parts = self.parts(partial(factor_bytes, rank=self.query_rank))
        scores, own = zip(*(part._scores(queries, training, total, relative) for part in parts), strict=True)
        result = self._finite(sum(scores))
        return divided_by_root(result, self._finite(sum(own))) if relative else result

    def _scores(
        self, test: list[Batch], training: Iterable[Batch], total: int | None, with_own: bool
    ) -> tuple[Float[Tensor, "test train"], Float[Tensor, " train"] | None]:
        """What `score` says by these layers, and the self-influences of the training examples."""
        scores, own, order = [], None, []
        at_a_time = queries_at_a_time(self.layers, self.memory_budget, self.query_rank)
        for blocks, rows in in_groups(loader_blocks(test, *self.passes.together), at_a_time):
            factors = self._factors(self._counted(blocks, len(rows), "test examples"), len(rows))
            columns, norms = self._columns(factors, training, total, with_own and own is None)
            own = norms if own is None else own
            scores.append(columns)
            order += rows
        if not scores:
            raise EmptyLoader("The test loader gave no batch.")
        return torch.cat(scores)[torch.tensor(order).argsort()], own

    def _columns(
        self, factors: Factors, batches: Iterable[Batch], total: int | None, with_own: bool
    ) -> tuple[Float[Tensor, "test train"], Float[Tensor, " train"] | None]:
        """The scores of all examples of a loader, and their self-influences from the same passes."""
        blocks = loader_blocks(batches, *self.passes.together)
        blocks = self._counted(blocks, total, "training examples")
        columns, own, rows = [], [], []
        for one in self._losses(blocks):
            columns.append(0)
            own.append(0)
            for name, gradients in one.gradients():
                columns[-1] = columns[-1] + products(factors[name], gradients)
                if with_own:
                    own[-1] = own[-1] + self._squared_norms(name, gradients)
            rows += one.rows
        if not columns:
            raise EmptyLoader(
                "The training loader gave no batch. It must give all of them again for every group "
                "of queries and layers (a DataLoader or a list, no generator)."
            )
        in_order = torch.tensor(rows).argsort().to(self.passes.device)
        scores = torch.cat(columns, dim=1)[:, in_order]
        return scores, torch.cat(own)[in_order] if with_own else None

    def influences_by_label(
        self, x_test: Inputs, y_test: Labels, x: Inputs
    ) -> Float[Tensor, "test train classes"]:
        """Influences for every label that the training examples could have had.

        One backward pass for two classes, C for C classes. Raises as `influence_factors` does, and
        `LabelsMismatch` when the likelihood's labels are not classes.
        """
        factors = self.influence_factors(x_test, y_test)

        def directions(outputs: Tensor, *_: object) -> Iterator[Tensor]:
            return (direction for direction, _ in self.likelihood.label_directions(outputs))

        result = self.passes.zeros(count_of(x_test), count_of(x), 0)
        for one in self.passes.over(self._blocks(x, None, "influences by label"), directions):
            _, weights = list(self.likelihood.label_directions(one.outputs))[one.number]
            if not result.shape[2]:
                result = self.passes.zeros(count_of(x_test), count_of(x), weights.shape[1])
            for name, gradients in one.gradients():
                scores = products(factors[name], gradients)
                result[:, one.where] += scores.unsqueeze(-1) * weights.to(result)
        return self._finite(result)

    def token_influences(
        self, x_test: Inputs, y_test: Labels, x: Inputs, y: Labels
    ) -> Float[Tensor, "test train tokens"]:
        """What each token of a training example adds to its influence; zero at padding.

        A token's share is what flows through its position in the tracked layers, where the model has
        already mixed in its context. A layer fed with one vector per example adds to the first token.
        Raises as `influence_factors` does.
        """
        factors = self.influence_factors(x_test, y_test)
        result = self.passes.zeros(count_of(x_test), count_of(x), 0)
        for one in self._losses(self._blocks(x, y, "token influences")):
            if not result.shape[2]:
                tokens = one.tokens if one.mask is None else self.passes.token_mask(x).shape[1]
                result = self.passes.zeros(count_of(x_test), count_of(x), tokens)
            for name, gradients in one.gradients():
                by_row = products_by_row(factors[name], gradients)
                result[:, one.where[gradients.example], gradients.token] += by_row
        return self._finite(result)

    def explore_hessian_regularization(
        self, x: Inputs, y: Labels, regularization_values: Sequence[Regularization]
    ) -> dict[Regularization, dict[str, Float[Tensor, "batch batch"]]]:
        """By-layer influences of examples on each other for several λ; gradients are taken once.

        Raises `BadSetting`, and as `influence_factors` does.
        """
        for value in regularization_values:
            check_regularization(value)
        self._require_fit()
        rotated = {
            name: self.passes.zeros(count_of(x), layer.d_out, layer.d_in)
            for name, layer in self.layers.items()
        }
        for one in self._losses(self._blocks(x, y, "gradients")):
            for name, gradients in one.gradients():
                for examples, matrices in rotated_in_parts(gradients, self.curvature_of(name).basis):
                    rotated[name][one.where[examples]] = matrices
        curvature = {name: self.curvature_of(name) for name in rotated}
        return {
            value: of_each_other(rotated, curvature, value)
            for value in tqdm(regularization_values, "λ", unit="value", disable=not self.progress)
        }

    def _squared_norms(self, name: str, gradients: LayerGradients) -> Float[Tensor, " batch"]:
        return squared_norms(gradients, self.curvature_of(name), self.hessian_regularization)

    def _factors(self, blocks: Iterable[Block], examples: int, weights: Tensor | None = None) -> Factors:
        if self.query_rank is None:
            return self._whole_factors(blocks, examples, weights)
        parts: dict[str, list[LowRank]] = {name: [] for name in self.layers}
        order: list[int] = []
        at_a_time, held = queries_at_a_time(self.layers, self.memory_budget), 1
        if weights is not None:  # what is weighed against each other is held at once
            at_a_time = held = examples
        for own, rows in in_groups(blocks, at_a_time):
            order += rows if weights is None else range(len(weights))
            of_own = None if weights is None else weights[:, rows]
            for some in self.parts(lambda layers: held * factor_bytes(layers)):
                for name, factors in some._whole_factors(own, len(rows), of_own).items():
                    parts[name].append(of_rank(factors, self.query_rank))
        return {name: joined(of_layer, order) for name, of_layer in parts.items()}

    def _whole_factors(self, blocks: Iterable[Block], examples: int, weights: Tensor | None) -> Factors:
        factors = {
            name: self.passes.zeros(examples, layer.d_out, layer.d_in) for name, layer in self.layers.items()
        }
        for one in self._losses(blocks):
            for name, gradients in one.gradients():
                layer = self.curvature_of(name)
                inverse = damped_inverse(layer.eigenvalues, self.hessian_regularization)
                for part, rotated in rotated_in_parts(gradients, layer.basis):
                    factors[name][one.where[part]] = rotated.mul_(inverse)
        if weights is not None:
            factors = {name: torch.tensordot(weights.to(one), one, 1) for name, one in factors.items()}
        for name, solved in factors.items():  # so far in the eigenbasis: out of it once for all
            take_out_of_basis(solved, self.curvature_of(name).basis)
        return factors
