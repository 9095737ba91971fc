"""Short cuts give what the long way gives: every path of the arithmetic against plain loops."""

import pytest
import torch

from support.ekfac.curvature import Eigenbasis, LayerCurvature, add_squares, rotated_in_parts
from support.ekfac.exact import inner_products
from support.ekfac.gradients import LayerGradients
from support.ekfac.scores import products, products_by_row, squared_norms
from tests.dense import assert_same, vectors

D_OUT, D_IN = 3, 4
COUNTS = {
    "one position each": [1, 1, 1],
    "one position or none": [1, 0, 1],
    "few positions": [2, 1, 3],
    "more positions than one width": [4, 4, 3],
    "more positions than either width": [7, 5, 0],
    "no position at all": [0, 0, 0],
}
every_count = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)


def layer_gradients(counts: list[int], seed: int = 0) -> LayerGradients:
    places = [(n, t) for n, count in enumerate(counts) for t in range(count)]
    example, token = torch.tensor(places, dtype=torch.long).view(-1, 2).T
    return LayerGradients(
        vectors(sum(counts), D_IN, seed + 1), vectors(sum(counts), D_OUT, seed + 2), example, token, counts
    )


def dense(counts: list[int], seed: int = 0) -> torch.Tensor:
    """G_n = Σ_t g_t a_tᵀ, one product at a time."""
    gradients = layer_gradients(counts, seed)
    result = torch.zeros(len(counts), D_OUT, D_IN, dtype=torch.float64)
    for n, a, g in zip(gradients.example, gradients.activations, gradients.output_gradients, strict=True):
        result[n] += torch.outer(g, a)
    return result


def curvature() -> LayerCurvature:
    activation = torch.linalg.qr(vectors(D_IN, D_IN, seed=3)).Q
    output_gradient = torch.linalg.qr(vectors(D_OUT, D_OUT, seed=4)).Q
    basis = Eigenbasis(activation, output_gradient, torch.ones(D_IN), torch.ones(D_OUT))
    return LayerCurvature(basis, vectors(D_OUT, D_IN, seed=5).square())


def rotated(counts: list[int]) -> torch.Tensor:
    basis = curvature().basis
    return basis.output_gradient.T @ dense(counts) @ basis.activation


@every_count
def test_gradients_are_sums_of_outer_products(counts):
    assert_same(layer_gradients(counts).per_example(), dense(counts))
    assert_same(layer_gradients(counts).at_once(), dense(counts))
    last = slice(1, len(counts))
    assert_same(layer_gradients(counts).part(last).at_once(), dense(counts)[last])


@every_count
def test_rotating_before_or_after_the_outer_product_is_the_same(counts):
    basis = curvature().basis
    found = torch.full((len(counts), D_OUT, D_IN), torch.nan, dtype=torch.float64)
    for examples, matrices in rotated_in_parts(layer_gradients(counts), basis):
        found[examples] = matrices
    assert_same(found, rotated(counts))


@every_count
def test_squares_are_added_to_what_is_there(counts):
    total = torch.ones(D_OUT, D_IN, dtype=torch.float64)
    add_squares(total, layer_gradients(counts), curvature().basis)
    assert_same(total, 1 + rotated(counts).square().sum(dim=0))


@every_count
def test_squared_norms_are_those_of_the_rotated_gradients(counts):
    found = squared_norms(layer_gradients(counts), curvature(), 0.5)
    weights = 1 / (curvature().eigenvalues + 0.5)
    assert_same(found, (rotated(counts).square() * weights).sum(dim=(1, 2)))


@every_count
@pytest.mark.parametrize("queries", [1, 2, 5])
def test_scores_are_inner_products_with_the_gradients(counts, queries):
    factors = vectors(queries * D_OUT, D_IN, seed=6).view(queries, D_OUT, D_IN)
    found = products(factors, layer_gradients(counts))
    assert_same(found, torch.einsum("qoi,noi->qn", factors, dense(counts)))


@every_count
def test_products_by_row_add_up_to_those_of_the_example(counts):
    factors, gradients = (vectors(2 * D_OUT, D_IN, seed=6).view(2, D_OUT, D_IN), layer_gradients(counts))
    by_row = products_by_row(factors, gradients)
    found = by_row.new_zeros(2, len(counts)).index_add_(1, gradients.example, by_row)
    assert_same(found, products(factors, gradients))


@every_count
@pytest.mark.parametrize("others", COUNTS.values(), ids=COUNTS)
def test_inner_products_are_those_of_the_dense_gradients(counts, others):
    left, right = dense(counts).flatten(1), dense(others, seed=7).flatten(1)
    assert_same(inner_products(layer_gradients(counts), layer_gradients(others, seed=7)), left @ right.T)
