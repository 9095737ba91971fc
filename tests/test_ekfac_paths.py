"""Short cuts give what the long way gives: every path of the arithmetic against plain loops."""

import pytest
import torch

from support.ekfac import rank_update
from support.ekfac.curvature import Eigenbasis, LayerCurvature, add_squares, rotated_one_by_one
from support.ekfac.positions import LayerGradients
from support.ekfac.rank_update import add_gram, fill_other_triangle
from support.ekfac.scoring import products, squared_norms
from tests.dense import vectors

D_OUT, D_IN = 3, 4
COUNTS = {
    "one position each": [1, 1, 1],
    "one position or none": [1, 0, 1],
    "few positions": [2, 1, 3],
    "more positions than one width": [4, 4, 3],
    "more positions than either width": [7, 5, 0],
}
every_count = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)


def layer_gradients(counts: list[int]) -> LayerGradients:
    tokens = max(counts)
    places = [n * tokens + t for n, count in enumerate(counts) for t in range(count)]
    return LayerGradients(
        vectors(sum(counts), D_IN, seed=1),
        vectors(sum(counts), D_OUT, seed=2),
        torch.tensor(places),
        examples=len(counts),
        tokens=tokens,
    )


def dense(counts: list[int]) -> torch.Tensor:
    """G_n = Σ_t g_t a_tᵀ, one product at a time."""
    gradients = layer_gradients(counts)
    result = torch.zeros(len(counts), D_OUT, D_IN, dtype=torch.float64)
    for n, a, g in zip(
        gradients.owners, gradients.activations, gradients.output_gradients, strict=True
    ):
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


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@every_count
def test_gradients_are_sums_of_outer_products(counts):
    assert_same(layer_gradients(counts).per_example(), dense(counts))


@every_count
def test_rotating_before_or_after_the_outer_product_is_the_same(counts):
    basis = curvature().basis
    found = {n: matrix.clone() for n, matrix in rotated_one_by_one(layer_gradients(counts), basis)}
    assert_same(torch.stack([found[n] for n in range(len(counts))]), rotated(counts))


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


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)],
)
def test_symmetric_updates_are_matrix_products(rows, dtype, tolerance):
    total = torch.zeros(D_IN, D_IN, dtype=dtype)
    batches = [vectors(rows, D_IN, seed).to(dtype) for seed in (0, 1)]
    for batch in batches:
        add_gram(total, batch)
    expected = sum(batch.double().T @ batch.double() for batch in batches)
    torch.testing.assert_close(
        fill_other_triangle(total).double(), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("width", [4, 5, 7, 12])
def test_symmetric_updates_of_a_wide_total_are_done_in_parts(width, monkeypatch):
    monkeypatch.setattr(rank_update, "NARROW", 3)
    monkeypatch.setattr(rank_update, "ALIGNED", 2)
    rows = vectors(3, width)
    total = torch.zeros(width, width, dtype=rows.dtype)
    add_gram(total, rows)
    above = torch.triu(torch.ones(width, width, dtype=torch.bool), diagonal=1)
    assert (total[above] == 0).any()  # half of it need not be computed
    assert_same(fill_other_triangle(total), rows.T @ rows)


def test_symmetric_updates_read_rows_in_any_memory_order():
    rows = vectors(D_IN, 5).T
    total = torch.zeros(D_IN, D_IN, dtype=torch.float64)
    add_gram(total, rows)
    assert_same(fill_other_triangle(total), rows.T @ rows)
