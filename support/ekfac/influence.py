"""`EkfacInfluence`: fit the curvature once, then ask which training examples a prediction rests on."""

from collections.abc import Callable, Iterable, Sequence

from jaxtyping import Float, Shaped
from torch import Tensor

from support.ekfac.blocks import Pool
from support.ekfac.capture import Consume, Trace
from support.ekfac.curvature import Regularization, check_regularization, damped_inverse
from support.ekfac.errors import FactorsMismatch, LabelsMismatch
from support.ekfac.fitting import EkfacCurvature
from support.ekfac.passes import every_label, labelled
from support.ekfac.plan import Plan, make_plan
from support.ekfac.scorer import ByLayer, Scorer, divided_by_root, sum_over_layers
from support.ekfac.scoring import (
    Factors,
    add_scores_by_label,
    add_scores_by_token,
    add_self_influences,
    keep_rotated,
)


class EkfacInfluence(EkfacCurvature):
    """Influence functions with EK-FAC curvature for the linear layers that require gradients.

    The influence of a training example on a test example is ⟨(F + λ)⁻¹ ∇loss(test), ∇loss(train)⟩,
    summed over layers, with F the Fisher of each layer in its Kronecker-factored eigenbasis. Positive
    means: giving the training example more weight lowers the test loss. It is not divided by the
    number of training examples.

    Construction, `fit`, `save`, `load` and `to` are those of `EkfacCurvature`.
    """

    def plan(self, train_loader: Iterable, test_loader: Iterable = ()) -> Plan:
        """What `fit`, `self_influences` and `score` will cost with these examples; needs no fit.

        Batches are `(inputs, …)`. Goes over the loaders once, and sends three blocks of training
        examples through the model to see how fast this machine is. Raises `EmptyLoader`, and what a
        forward pass raises.
        """
        return make_plan(
            self._passes(),
            ((inputs, None) for inputs, *_ in train_loader),
            ((inputs, None) for inputs, *_ in test_loader),
            self.memory_budget,
            self.eigenbasis_share,
            self.update_diagonal,
        )

    def influence_factors(
        self, x: Shaped[Tensor, "test ..."], y: Shaped[Tensor, "labels ..."]
    ) -> Factors:
        """(F + λ)⁻¹ ∇loss of each example, layer by layer: precondition once, score many.

        `(test, d_out, d_in)` each. Raises `NotFitted`, `LabelsMismatch`, `NotFinite`,
        `ModelInTrainingMode`.
        """
        return self._scorer().factors([self._pool(x, y, "influence factors")], len(x))

    def influences_by_layer(
        self,
        x_test: Shaped[Tensor, "test ..."],
        y_test: Shaped[Tensor, "test_labels ..."],
        x: Shaped[Tensor, "train ..."] | None = None,
        y: Shaped[Tensor, "labels ..."] | None = None,
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
        if x is None or y is None:
            x, y = x_test, y_test
        return self._scorer().scores(factors, self._pool(x, y, "influences"))

    def influences(
        self,
        x_test: Shaped[Tensor, "test ..."],
        y_test: Shaped[Tensor, "test_labels ..."],
        x: Shaped[Tensor, "train ..."] | None = None,
        y: Shaped[Tensor, "labels ..."] | None = None,
    ) -> Float[Tensor, "test train"]:
        """Influence of every training example (column) on every test example (row).

        Without `x` and `y`, the influences of the test examples on each other, a symmetric matrix.
        Raises as `influence_factors` does.
        """
        return sum_over_layers(self.influences_by_layer(x_test, y_test, x, y))

    def influences_from_factors(
        self,
        factors: Factors,
        x: Shaped[Tensor, "train ..."],
        y: Shaped[Tensor, "labels ..."],
    ) -> Float[Tensor, "test train"]:
        """`influences` of the examples `factors` were made of, from training examples `x`, `y`.

        Raises `FactorsMismatch` for factors of other layers, and as `influence_factors` does.
        """
        return sum_over_layers(self.influences_by_layer_from_factors(factors, x, y))

    def influences_by_layer_from_factors(
        self,
        factors: Factors,
        x: Shaped[Tensor, "train ..."],
        y: Shaped[Tensor, "labels ..."],
    ) -> ByLayer:
        """Each layer's part of `influences_from_factors`. Raises as that does."""
        self._require_fit()
        self._check_factors(factors)
        return self._scorer().scores(factors, self._pool(x, y, "influences"))

    def self_influences(
        self, x: Shaped[Tensor, "batch ..."], y: Shaped[Tensor, "labels ..."]
    ) -> Float[Tensor, " batch"]:
        """⟨(F + λ)⁻¹ ∇loss, ∇loss⟩ of each example with itself, never negative.

        Raises as `influence_factors` does.
        """
        result = self._scorer().zeros(len(x))

        def into(rows: list[int], _: Trace) -> Consume:
            return add_self_influences(result, rows, self.curvature, self.hessian_regularization)

        self._over(x, y, into, "self-influences")
        return result

    def relative_influences(
        self,
        x_test: Shaped[Tensor, "test ..."],
        y_test: Shaped[Tensor, "test_labels ..."],
        x: Shaped[Tensor, "train ..."],
        y: Shaped[Tensor, "labels ..."],
    ) -> Float[Tensor, "test train"]:
        """Influences divided by √(self-influence of the training example).

        How much a training example says about this test example, among all it says: an outlier that
        pulls on everything no longer wins every row (θ-RelatIF, Barshan et al. 2020). Zero where the
        self-influence is zero. Raises as `influence_factors` does.
        """
        factors = self.influence_factors(x_test, y_test)
        pool = self._pool(x, y, "relative influences")
        scores, own = self._scorer().scores_and_self_influences(factors, pool)
        return divided_by_root(sum_over_layers(scores), own)

    def unit_residual_influences(
        self,
        x_test: Shaped[Tensor, "test ..."],
        y_test: Shaped[Tensor, "test_labels ..."],
        x: Shaped[Tensor, "train ..."],
        y: Shaped[Tensor, "labels ..."],
    ) -> Float[Tensor, "test train"]:
        """Influences divided by the size ‖∂loss/∂outputs‖ of the training example's residual.

        At the end of training that size says how well an example was learned, not how hard it pushed
        on the way. Zero where the residual is. Raises as `influence_factors` does.
        """
        factors = self.influence_factors(x_test, y_test)
        scorer = self._scorer().with_unit_residuals()
        return sum_over_layers(scorer.scores(factors, self._pool(x, y, "influences")))

    def score(
        self, test_loader: Iterable, train_loader: Iterable, normalisation: str = "plain"
    ) -> Float[Tensor, "test train"]:
        """Influence of all training on all test examples of two loaders.

        `normalisation` is "plain", "relative" (as `relative_influences`) or "unit residual" (as
        `unit_residual_influences`). Batches are `(inputs, labels, …)`. As many test examples at a time
        as have factors that fit `memory_budget`; the training examples pass by once for each such
        group. Raises `EmptyLoader`, `BadNormalisation`, and as `influence_factors` does.
        """
        return self._scorer().over_loaders(
            test_loader, train_loader, normalisation, self.memory_budget
        )

    def influences_by_label(
        self,
        x_test: Shaped[Tensor, "test ..."],
        y_test: Shaped[Tensor, "test_labels ..."],
        x: Shaped[Tensor, "train ..."],
    ) -> Float[Tensor, "test train classes"]:
        """Influences for every label that the training examples could have had.

        One backward pass for two classes, C for C classes. Raises as `influence_factors` does, and
        `LabelsMismatch` when the likelihood's labels are not classes.
        """
        factors = self.influence_factors(x_test, y_test)
        scores: list[Tensor] = []

        def into(rows: list[int], weights: Tensor) -> Consume:
            if not scores:
                scores.append(self._scorer().zeros(len(x_test), len(x), weights.shape[1]))
            return add_scores_by_label(scores[0], rows, factors, weights)

        passes = self._passes()
        work = every_label(self.likelihood, into)
        passes.over(passes.blocks(x, None, "influences by label"), work)
        return scores[0]

    def token_influences(
        self,
        x_test: Shaped[Tensor, "test ..."],
        y_test: Shaped[Tensor, "test_labels ..."],
        x: Shaped[Tensor, "train ..."],
        y: Shaped[Tensor, "labels ..."],
    ) -> Float[Tensor, "test train tokens"]:
        """What each token of a training example adds to its influence; zero at padding.

        A token's share is what flows through its position in the tracked layers, where the model has
        already mixed in its context. A layer fed with one vector per example adds to the first token.
        Raises as `influence_factors` does.
        """
        factors = self.influence_factors(x_test, y_test)
        scores: list[Tensor] = []

        def into(rows: list[int], trace: Trace) -> Consume:
            if not scores:
                tokens = trace.tokens if trace.mask is None else x.shape[1]
                scores.append(self._scorer().zeros(len(x_test), len(x), tokens))
            return add_scores_by_token(scores[0], rows, factors)

        self._over(x, y, into, "token influences")
        return scores[0]

    def explore_hessian_regularization(
        self,
        x: Shaped[Tensor, "batch ..."],
        y: Shaped[Tensor, "labels ..."],
        regularization_values: Sequence[Regularization],
    ) -> dict[Regularization, dict[str, Float[Tensor, "batch batch"]]]:
        """By-layer influences of examples on each other for several λ; gradients are taken once.

        Raises `BadRegularization`, and as `influence_factors` does.
        """
        for value in regularization_values:
            check_regularization(value)
        scorer = self._scorer()
        rotated = {
            name: scorer.zeros(len(x), layer.d_out, layer.d_in)
            for name, layer in self.layers.items()
        }
        self._over(x, y, lambda rows, _: keep_rotated(rotated, rows, self.curvature), "gradients")
        flat = {name: gradients.flatten(1) for name, gradients in rotated.items()}
        return {
            value: {
                name: (rows * damped_inverse(self.curvature[name].eigenvalues, value).flatten())
                @ rows.T
                for name, rows in flat.items()
            }
            for value in self._bar(regularization_values, "regularization", "value")
        }

    def _scorer(self) -> Scorer:
        self._require_fit()
        return Scorer(self._passes(), self.likelihood, self.curvature, self.hessian_regularization)

    def _over(
        self, x: Tensor, y: Tensor, into: Callable[[list[int], Trace], Consume], what: str
    ) -> None:
        self._passes().over(self._pool(x, y, what).blocks, labelled(self.likelihood, into))

    def _pool(self, x: Tensor, y: Tensor, what: str) -> Pool:
        self._require_fit()
        return Pool([(x, y)], self._passes().blocks(x, y, what))

    def _check_factors(self, factors: Factors) -> None:
        if list(factors) != self.layer_names:
            raise FactorsMismatch(
                f"The factors belong to layers {list(factors)}, this engine tracks "
                f"{self.layer_names}. Make them with this engine's influence_factors."
            )
        for name, layer in self.layers.items():
            if factors[name].shape[1:] != (layer.d_out, layer.d_in):
                raise FactorsMismatch(
                    f"The factors of {name!r} have shape {tuple(factors[name].shape)}, expected "
                    f"(test, {layer.d_out}, {layer.d_in})."
                )
