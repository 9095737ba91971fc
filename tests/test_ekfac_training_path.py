"""Influence along the training path, against engines at its checkpoints."""

import gc
import weakref

import pytest
import torch

from support import EkfacInfluence
from support.ekfac import Checkpoint, PathInfluence
from support.ekfac.errors import BadCheckpoints
from support.ekfac.scorer import NORMALISATIONS
from tests.dense import labels, perceptron, vectors

TRAIN = (vectors(5, 4), labels(5))
TEST = (vectors(3, 4, seed=1), labels(3, seed=1))
DAMPING = 0.03


def checkpoint(seed, weight=1.0):
    return Checkpoint(f"step {seed}", lambda: perceptron(4, 3, 2, seed=seed), weight)


def score(*checkpoints, normalisation="plain", **settings):
    path = PathInfluence(list(checkpoints), hessian_regularization=DAMPING, **settings)
    return path.score([TRAIN], [TEST], [TRAIN], normalisation)


def score_at(seed, normalisation="plain"):
    engine = EkfacInfluence(perceptron(4, 3, 2, seed=seed), hessian_regularization=DAMPING)
    return engine.fit([TRAIN]).score([TEST], [TRAIN], normalisation)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_one_checkpoint_is_the_engine_itself(normalisation):
    torch.testing.assert_close(
        score(checkpoint(1), normalisation=normalisation),
        score_at(1, normalisation),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_several_checkpoints_are_the_weighted_mean(normalisation):
    found = score(checkpoint(1, 3.0), checkpoint(2, 1.0), normalisation=normalisation)
    expected = 0.75 * score_at(1, normalisation) + 0.25 * score_at(2, normalisation)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_only_ratios_of_weights_matter():
    torch.testing.assert_close(
        score(checkpoint(1, 2.0), checkpoint(2, 5.0)),
        score(checkpoint(1, 0.2), checkpoint(2, 0.5)),
    )


def test_one_model_is_in_memory_at_a_time():
    made = []

    def model():
        gc.collect()
        assert not any(reference() for reference in made)
        fresh = perceptron(4, 3, 2, seed=len(made))
        made.append(weakref.ref(fresh))
        return fresh

    score(*[Checkpoint(str(number), model) for number in range(3)])
    assert len(made) == 3


def test_factors_may_come_from_elsewhere():
    engines = []

    def fit(engine, loader):
        engines.append(engine.layer_names)
        return engine.fit(loader)

    torch.testing.assert_close(
        score(checkpoint(1), checkpoint(2), fit=fit), score(checkpoint(1), checkpoint(2))
    )
    assert engines == [["0", "2"]] * 2


@pytest.mark.parametrize(
    ("checkpoints", "message"),
    [([], "One is enough"), ([checkpoint(1), checkpoint(2, 0.0)], "'step 2' has weight 0.0")],
)
def test_bad_checkpoints_are_refused(checkpoints, message):
    with pytest.raises(BadCheckpoints, match=message):
        PathInfluence(checkpoints)
