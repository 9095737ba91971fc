"""What an index is compared with estimates the same influences."""

import pytest
import torch

from experiments.index import projected, rows
from support.ekfac import EkfacInfluence
from support.judge import Bank
from tests.dense import labels, perceptron, vectors

TRAIN, ASKED = [(vectors(5, 3), labels(5))], [(vectors(4, 3, seed=1), labels(4, seed=1))]


def test_projections_estimate_influences_without_bias():
    engine = EkfacInfluence(perceptron(3, 4, 2).double()).fit(TRAIN)
    estimates = [projected(engine, TRAIN, ASKED, 6, seed) for seed in range(300)]
    expected = engine.score(ASKED, TRAIN)
    mean = torch.stack([scores for scores, _ in estimates]).mean(dim=0)
    assert (mean - expected).norm() < 0.2 * expected.norm()
    assert estimates[0][1] == 2 * 6**2


def test_an_index_with_all_numbers_is_judged_as_the_scores_are():
    engine = EkfacInfluence(perceptron(3, 4, 2).double())
    member = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)) > 0
    margins = torch.randn(30, 2, 4, generator=torch.Generator().manual_seed(1))
    found = {
        (row["sketch"], row["numbers"]): row
        for row in rows("tiny", engine, Bank(member, margins), TRAIN, ASKED, compared=True)
    }
    whole, index = found["none", 0], found["EK-FAC entries", 4096]
    assert index["share"] == pytest.approx(1)
    assert abs(index["report"] - whole["report"]) < 0.02
    assert {sketch for sketch, _ in found} == {"none", "random projection", "EK-FAC entries", "K-FAC entries"}
