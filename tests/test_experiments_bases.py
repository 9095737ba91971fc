"""The bases that are compared: those of the engine are the engine's, and Λ in each is the Fisher's."""

import pytest
import torch

from experiments.bases import BASES, Share, covariances, curvatures, scored
from support.ekfac import EkfacInfluence
from tests.dense import fisher_blocks, label_gradients, labels, sentences, token_classifier

X, Y, QUERIES, ASKED = sentences(5, 3, 4, 2, 5), labels(5), sentences(3, 5, seed=1), labels(2, seed=1)
TRAIN, QUERY = [(X[:3], Y[:3]), (X[3:], Y[3:])], [(QUERIES, ASKED)]


@pytest.fixture(scope="module")
def engine():
    return EkfacInfluence(token_classifier())


@pytest.fixture(scope="module")
def found(engine):
    return curvatures(engine, TRAIN)


@pytest.mark.parametrize(
    ("kind", "positions"), [("all positions", "all"), ("gradient",) * 2, ("weighted",) * 2]
)
def test_in_the_engines_bases_scores_are_the_engines(engine, found, kind, positions):
    expected = EkfacInfluence(token_classifier(), covariance_positions=positions, hessian_regularization=0.01)
    expected.fit(TRAIN)
    by_layer = scored(engine, found[kind], QUERY, TRAIN, (0.01, 1.0), count=10**6)[0.01]
    influences = torch.stack(list(expected.influences_by_layer(QUERIES, ASKED, X, Y).values()))
    torch.testing.assert_close(by_layer.influences, influences)
    own = by_layer.self_influences.sum(dim=0)
    torch.testing.assert_close(own, expected.self_influences(X, Y))


def test_a_hundred_bins_of_eigenvalues_say_what_the_eigenvalues_say(engine, found):
    fine, coarse = (
        scored(engine, found["gradient"], QUERY, TRAIN, (1e-4, Share(0.1, "mean")), count=count)
        for count in (10**6, 100)
    )
    for value, expected in fine.items():
        difference = (coarse[value].influences - expected.influences).norm()
        assert difference < 0.02 * expected.influences.norm()


@pytest.mark.parametrize("kind", BASES)
def test_eigenvalues_add_up_to_the_trace_of_the_fisher_in_any_basis(engine, found, kind):
    blocks = fisher_blocks(label_gradients(token_classifier(), X))
    for name, layer in found[kind].items():
        torch.testing.assert_close(layer.eigenvalues.sum(), blocks[name].trace(), rtol=1e-8, atol=1e-8)


def test_factors_per_example_are_means_of_products_of_gradients(engine):
    weighted = label_gradients(token_classifier(), X)
    for name, (a, g) in covariances(engine, TRAIN)["per example"].items():
        products = [(p * G[name].T @ G[name], p * G[name] @ G[name].T) for one in weighted for p, G in one]
        for found, parts in zip((a, g), zip(*products, strict=True), strict=True):
            expected = torch.stack(parts).sum(dim=0)
            torch.testing.assert_close(found, expected / expected.trace(), rtol=1e-8, atol=1e-10)


def test_kronecker_factors_are_nearer_to_the_fisher_than_those_per_example(engine):
    blocks, found = fisher_blocks(label_gradients(token_classifier(), X)), covariances(engine, TRAIN)
    for name, block in blocks.items():
        per_example, best = (distance(block, *found[kind][name]) for kind in ("per example", "Kronecker"))
        assert best <= per_example * (1 + 1e-9)


def distance(block, a, g):
    """Of a multiple of g ⊗ a, the nearest one."""
    product = torch.kron(g, a)
    return (block - (block * product).sum() / product.square().sum() * product).norm()
