"""The engine's fit in pieces, as it will be; gone when the engine has them itself."""

from dataclasses import dataclass

import torch

from support.ekfac.blocks import blocks_of
from support.ekfac.curvature import LayerCurvature, kfac_curvature
from support.ekfac.fisher import Fisher
from support.ekfac.fitting import generator


class CovarianceSums:
    def __init__(self, passes, likelihood):
        self.fisher = Fisher(passes, likelihood)
        self.covariances = self.fisher.no_covariances()
        self.tensors = {
            f"{name}/{part}": tensor
            for name, covariances in self.covariances.items()
            for part, tensor in covariances.sums().items()
        }

    def add(self, blocks, draws):
        return self.fisher.add_to_covariances(self.covariances, blocks, draws)

    def basis(self, name):
        return kfac_curvature(self.covariances.pop(name), self.fisher.passes.precision).basis


class EigenvalueSums:
    def __init__(self, passes, likelihood, bases):
        self.fisher = Fisher(passes, likelihood)
        self.curvature = {
            name: LayerCurvature(
                basis,
                torch.zeros(
                    basis.output_gradient_eigenvalues.shape[0],
                    basis.activation_eigenvalues.shape[0],
                    dtype=basis.activation.dtype,
                    device=basis.activation.device,
                ),
            )
            for name, basis in bases.items()
        }
        self.tensors = {name: layer.eigenvalues for name, layer in self.curvature.items()}

    def add(self, blocks, draws):
        return self.fisher.add_to_eigenvalues(self.curvature, blocks, draws)


def passes_of(engine):
    return engine.fisher().passes if hasattr(engine, "fisher") else engine.passes


def plan_of(engine, train, test=()):
    plan = engine.plan(train, test)
    return _Plan(
        plan.examples,
        plan.tokens,
        plan.queries,
        plan.query_blocks,
        plan.fit.seconds,
        plan.self_influences.seconds,
        plan.score and plan.score.seconds,
        plan.curvature_bytes,
        plan.factor_bytes,
        _held() + plan.peak_bytes,
    )


def _held():
    import psutil

    return psutil.Process().memory_info().rss


@dataclass(frozen=True)
class _Plan:
    examples: int
    tokens: int
    queries: int
    query_groups: int
    fit_seconds: float
    self_seconds: float
    score_seconds: float | None
    curvature_bytes: int
    factor_bytes: int
    peak_bytes: int


_ = blocks_of


def passes_device(engine):
    return next(iter(engine.layers.values())).device


_ = generator
