"""A model, its layers that require gradients, and the settings by which they are looked at."""

import copy
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import compress

from torch import Tensor, nn
from tqdm.auto import tqdm

from support.ekfac import storage
from support.ekfac.batches import Inputs, count_of
from support.ekfac.blocks import Block, blocks_of
from support.ekfac.curvature import (
    DEFAULT_REGULARIZATION,
    LayerCurvature,
    Regularization,
    check_regularization,
)
from support.ekfac.errors import BadSetting, NotFitted, NothingAsked, SlowPrecision, refuse_unknown
from support.ekfac.layers import TrackedLayer, tracked_layers
from support.ekfac.likelihood import Categorical, Likelihood, loss_directions
from support.ekfac.matrix_products import PRECISIONS, has_bfloat16
from support.ekfac.memory import SHARE_OF_FREE_MEMORY, check_budget, layer_groups, room_for
from support.ekfac.passes import Pass, Passes
from support.ekfac.scores import refuse_not_finite

POSITIONS = "all", "gradient", "weighted"
SLOW = (
    "This processor has no instructions for bfloat16, which takes several times as long on it as "
    'precision="full". Leave precision out, or move the model to a GPU first.'
)


class Engine:
    """A model with the EK-FAC curvature of its linear layers that require gradients, once it is known."""

    def __init__(
        self,
        model: nn.Module,
        update_diagonal: bool = True,
        hessian_regularization: Regularization = DEFAULT_REGULARIZATION,
        progress: bool = False,
        likelihood: Likelihood | None = None,
        seed: int = 0,
        memory_budget: int | float | None = None,
        precision: str = "full",
        covariance_positions: str = "gradient",
        query_rank: int | None = None,
    ):
        """`model` maps an input tensor `(batch, …)` to outputs `(batch, classes)`, or, called with a
        mapping's names, to something that has them as `logits`. When it has a method `token_mask(inputs)`,
        `(batch, tokens)` and True at real tokens, or a mapping an `attention_mask`, padding takes no part in
        anything. `update_diagonal=False` gives K-FAC. `hessian_regularization` is λ ≥ 0, or "auto" for 0.1
        times each layer's mean eigenvalue; it may be changed at any time. `progress` draws bars.
        `covariance_positions` says where the covariance of a layer's activations is taken: at positions that
        carry "gradient" in some direction of the Fisher, for no other adds to it; at "all" real ones, as
        Kronfluence does; or "weighted", with each row of either side weighing as much as the other side's,
        which agreed best with retraining for a model that writes (chapter 10). `query_rank` keeps the factors
        of queries at that rank, None whole. `likelihood` is the loss, `Categorical()` by default; `seed`
        decides which labels it draws when there are too many classes for the exact Fisher.
        `memory_budget` is the number of bytes that the factors of queries may take while scoring, and what
        the first pass of a fit saw beside the curvature, kept for the second to need no model: by default a
        quarter of the memory that is free. So may the curvature in a fit, by default three quarters. Where
        all layers of one query, or of a fit, take more, `score` and `fit` take the layers in groups, with
        passes over the data for each, and a fit puts its groups aside on the disk; what is asked of one batch
        (`influences`, `self_influences`, …) takes all layers at once.

        Eigenproblems are solved in float64. With `precision="float32"` they are in float32, which is
        quicker: another basis of directions that are hardly curved, with scores good to two or three digits,
        and to more where λ is large. With "bfloat16" also the model's matrix products and the rotations
        into the eigenbases are in bfloat16, summed in float32; covariances, eigenvalues and scores stay as
        they are. That is good to about two digits, faster on a GPU or a processor that has instructions for
        it, and several times slower on one that has none.

        Raises `LayerNotSupported`, `LayerHalfFrozen` or `NothingToTrack` when the layers that require
        gradients are not all plain linear layers, and `BadSetting`; warns of a `SlowPrecision`.
        """
        check_budget(memory_budget)
        refuse_unknown("covariance_positions", covariance_positions, POSITIONS)
        refuse_unknown("precision", precision, PRECISIONS)
        if query_rank is not None and query_rank < 1:
            raise BadSetting(f"query_rank={query_rank!r}: use a whole number from 1, or None for all.")
        self.model = model
        self.update_diagonal = update_diagonal
        self.hessian_regularization = hessian_regularization
        self.progress = progress
        self.likelihood = likelihood or Categorical()
        self.seed, self.memory_budget = seed, memory_budget
        self.precision, self.covariance_positions = precision, covariance_positions
        self.query_rank = query_rank
        self.layers = tracked_layers(model)
        self.curvature: dict[str, LayerCurvature] = {}
        self.examples, self.probe = 0, None
        self._whole = True
        if precision == "bfloat16" and not has_bfloat16(self.passes.device):
            warnings.warn(SlowPrecision(SLOW), stacklevel=2)

    def __repr__(self) -> str:
        size = sum(layer.d_out * layer.d_in for layer in self.layers.values())
        layers = f"{len(self.layers)} layers, {self.layer_names[0]} to {self.layer_names[-1]}"
        fit = f"fitted on {self.examples:,} examples" if self.is_fitted else "not fitted"
        about = (
            f"{layers}, {size:,} parameters; {self.likelihood!r}, λ = {self.hessian_regularization}, {fit}"
        )
        return f"{type(self).__name__}: {about}"

    @property
    def hessian_regularization(self) -> Regularization:
        return self._hessian_regularization

    @hessian_regularization.setter
    def hessian_regularization(self, regularization: Regularization) -> None:
        check_regularization(regularization)
        self._hessian_regularization = regularization

    @property
    def layer_names(self) -> list[str]:
        """The tracked layers, from input to output."""
        return list(self.layers)

    @property
    def is_fitted(self) -> bool:
        return bool(self.curvature)

    def batches(self, loader: Iterable) -> Iterable:
        """What a loader gives, as batches: themselves. Engines that read something else say how."""
        return loader

    @property
    def passes(self) -> Passes:
        """How examples are sent through the model."""
        return Passes(self.model, self.layers, PRECISIONS[self.precision], self._whole)

    def parts(
        self, taken: Callable[[dict[str, TrackedLayer]], int], share: float = SHARE_OF_FREE_MEMORY
    ) -> list["Engine"]:
        """The engine itself, where the bytes `taken` by all of its layers fit the budget or this share of the
        free memory; else several that see some of its layers each."""
        groups = layer_groups(self.layers, room_for(self.layers, self.memory_budget, share), taken)
        if len(groups) == 1:
            return [self]
        parts = [copy.copy(self) for _ in groups]
        for part, layers in zip(parts, groups, strict=True):
            part.layers, part._whole = layers, False
        return parts

    def curvature_of(self, name: str) -> LayerCurvature:
        """A layer's curvature, where the layer is, wherever it was put aside."""
        return self.curvature[name].to(self.passes.device)

    def _losses(self, blocks: Iterable[Block]) -> Iterator[Pass]:
        """Passes that send back the gradient of the loss of each example's own label."""
        return self.passes.over(blocks, loss_directions(self.likelihood))

    def _counted(self, blocks: Iterable[Block], total: int | None, what: str) -> Iterator[Block]:
        """The blocks, with a bar that counts their examples, unless there is one block only. Warns
        `NothingAsked` in the end when some have no target."""
        hidden = not self.progress or (isinstance(blocks, list) and len(blocks) == 1)
        unasked: list[int] = []
        with tqdm(total=total, desc=what, unit="example", disable=hidden) as bar:
            for block in blocks:
                yield block
                bar.update(len(block.rows))
                if block.labels is not None:
                    asked = self.likelihood.asked(block.labels, self.passes.token_mask(block.inputs))
                    unasked += compress(block.rows, self.likelihood.unasked(asked).tolist())
        if unasked:
            told = f"Examples without a target: {len(unasked)}, the first in row {min(unasked)}"
            cure = "Their influence is zero, and a fit counts them. Leave them out."
            warnings.warn(NothingAsked(f"{told}. {cure}"), stacklevel=2)

    def identity(self) -> dict[str, str]:
        """What a saved curvature must agree in with this engine, λ apart."""
        return {
            "model": storage.model_fingerprint(self.model),
            "layers": json.dumps(self.layer_names),
            "update_diagonal": str(self.update_diagonal),
            "likelihood": repr(self.likelihood),
            "seed": str(self.seed),
            "precision": self.precision,
            "covariance_positions": self.covariance_positions,
        }

    def _require_fit(self) -> None:
        if not self.is_fitted:
            raise NotFitted("The curvature is not known yet. Call fit(loader) first.")

    def _blocks(self, x: Inputs, y: Tensor | None, what: str) -> Iterator[Block]:
        """The examples of one batch. Raises `NotFitted` and `LabelsMismatch`."""
        self._require_fit()
        return self._counted(blocks_of(x, y, *self.passes.together), count_of(x), what)

    def _finite(self, result: Tensor) -> Tensor:
        return refuse_not_finite(result, self.hessian_regularization)
