"""Relations that hold for every model and every data set, tried on sizes nobody chose."""

import itertools
from typing import NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from support.ekfac import Categorical, EkfacInfluence
from tests import dense
from tests.dense import PAD, labels, perceptron, sentences, token_classifier, vectors

theorem = settings(max_examples=15, deadline=None, derandomize=True)

DAMPING = 1e-2
seeds = st.integers(0, 99)
classes = st.integers(2, 5)
regularizations = st.floats(1e-4, 1e4)
kinds = st.sampled_from([{}, {"update_diagonal": False}, {"likelihood": Categorical(exact_classes=1)}])
"""EK-FAC, K-FAC, and EK-FAC on sampled labels."""


class Problem(NamedTuple):
    model: nn.Module
    x: Tensor
    y: Tensor

    def fitted(self, batches=None, **settings) -> EkfacInfluence:
        settings = {"hessian_regularization": DAMPING, **settings}
        return EkfacInfluence(self.model, **settings).fit(batches or [(self.x,)])


@st.composite
def texts(draw) -> Problem:
    """Up to five sentences of one to six tokens, and a model of any width for them."""
    seed, number = draw(seeds), draw(classes)
    sizes = {"width": draw(st.integers(2, 4)), "hidden": draw(st.integers(2, 5))}
    model = token_classifier(seed, classes=number, bias=draw(st.booleans()), **sizes)
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    return Problem(model, sentences(*lengths, seed=seed), labels(len(lengths), number, seed))


@st.composite
def tables(draw) -> Problem:
    """Up to six vectors, and one to three linear layers of any width for them."""
    seed = draw(seeds)
    widths = [*draw(st.lists(st.integers(2, 5), min_size=1, max_size=3)), draw(classes)]
    model = perceptron(*widths, bias=draw(st.booleans()), seed=seed)
    examples = draw(st.integers(1, 6))
    return Problem(model, vectors(examples, widths[0], seed), labels(examples, widths[-1], seed))


problems = texts() | tables()


@st.composite
def split(draw, problem: Problem) -> list[tuple[Tensor, Tensor]]:
    """The examples in order, in batches of any size, each padded to any length."""
    starts = [row for row in range(1, len(problem.x)) if draw(st.booleans())]
    rows = itertools.starmap(slice, itertools.pairwise([0, *starts, len(problem.x)]))
    return [(padded(problem.x[part], draw(st.integers(0, 3))), problem.y[part]) for part in rows]


def padded(ids: Tensor, extra: int) -> Tensor:
    """Sentences padded to `extra` more than the longest of them needs."""
    longest = (ids != PAD).sum(dim=1).max()
    return nn.functional.pad(ids[:, :longest], (0, extra), value=PAD)


def gradients(problem: Problem) -> Tensor:
    """One row per example: the gradients of all layers, by the loop."""
    rows = dense.loss_gradients(*problem)
    return torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in rows])


def assert_same(found, expected, tolerance=1e-7):
    dense.assert_same(found, expected, tolerance)


@theorem
@given(texts(), st.data(), kinds)
def test_any_split_into_batches_and_any_padding_give_the_same_fit_and_the_same_scores(problem, data, kind):
    expected = problem.fitted(**kind).influences(problem.x, problem.y)
    engine = problem.fitted(data.draw(split(problem)), **kind)
    assert_same(engine.influences(problem.x, problem.y), expected)
    assert_same(engine.score(data.draw(split(problem)), data.draw(split(problem))), expected)


@theorem
@given(problems, st.randoms(use_true_random=False), kinds)
def test_any_order_of_the_examples_permutes_the_influences(problem, random, kind):
    order = list(range(len(problem.x)))
    random.shuffle(order)
    x, y = problem.x[order], problem.y[order]
    found = problem.fitted([(x,)], **kind).influences(x, y)
    assert_same(found, problem.fitted(**kind).influences(problem.x, problem.y)[order][:, order])


@theorem
@given(problems, st.integers(2, 4), kinds)
def test_any_number_of_copies_of_the_data_changes_nothing(problem, copies, kind):
    found = problem.fitted([(problem.x,)] * copies, **kind).influences(problem.x, problem.y)
    assert_same(found, problem.fitted(**kind).influences(problem.x, problem.y))


@theorem
@given(problems)
def test_layers_add_up(problem):
    engine = problem.fitted()
    by_layer = engine.influences_by_layer(problem.x, problem.y)
    assert_same(sum(by_layer.values()), engine.influences(problem.x, problem.y))


@theorem
@given(texts())
def test_tokens_add_up_and_padding_adds_nothing(problem):
    engine = problem.fitted()
    by_token = engine.token_influences(problem.x, problem.y, problem.x, problem.y)
    assert_same(by_token.sum(dim=2), engine.influences(problem.x, problem.y))
    assert (by_token[:, problem.x == PAD] == 0).all()


@theorem
@given(problems, st.data())
def test_any_labels_select_from_influences_by_label(problem, data):
    engine = problem.fitted()
    by_label = engine.influences_by_label(problem.x, problem.y, problem.x)
    count = len(problem.x)
    label = st.integers(0, by_label.shape[2] - 1)
    y = torch.tensor(data.draw(st.lists(label, min_size=count, max_size=count)))
    found = by_label[:, torch.arange(count), y]
    assert_same(found, engine.influences(problem.x, problem.y, problem.x, y))


@theorem
@given(problems, regularizations)
def test_self_influences_are_the_diagonal_of_a_positive_semidefinite_matrix(problem, damping):
    engine = problem.fitted(hessian_regularization=damping)
    influences = engine.influences(problem.x, problem.y)
    own = engine.self_influences(problem.x, problem.y)
    assert (own >= 0).all()
    assert_same(own, influences.diagonal())
    assert_same(influences, influences.T)
    assert torch.linalg.eigvalsh(influences)[0] >= -1e-12 * own.sum()


@theorem
@given(problems, regularizations)
def test_relative_influence_is_at_most_the_root_of_the_queries_self_influence(problem, damping):
    """The Cauchy–Schwarz inequality; equality where an example asks about itself."""
    engine = problem.fitted(hessian_regularization=damping)
    relative = engine.relative_influences(problem.x, problem.y, problem.x, problem.y)
    bound = engine.self_influences(problem.x, problem.y).sqrt()
    assert (relative.abs() <= bound.unsqueeze(1) * (1 + 1e-9)).all()
    assert_same(relative.diagonal(), bound)


@theorem
@given(problems, regularizations)
def test_influences_tend_to_the_gradient_product_over_damping(problem, damping):
    """|λ·influence − ⟨g, g'⟩| ≤ Λ/(Λ + λ) · ‖g‖‖g'‖ with the largest Λ, for every λ > 0."""
    engine = problem.fitted(hessian_regularization=damping)
    largest = max(layer.eigenvalues.max() for layer in engine.curvature.values())
    loop = gradients(problem)
    norms = loop.norm(dim=1)
    bound = largest / (largest + damping) * torch.outer(norms, norms) * (1 + 1e-9) + 1e-12
    found = damping * engine.influences(problem.x, problem.y)
    assert ((found - loop @ loop.T).abs() <= bound).all()


@theorem
@given(problems)
def test_the_corrected_diagonal_is_the_exact_fisher_s_and_so_nearer_to_it_than_k_fac_s(problem):
    """Both are diagonal in the same basis."""
    ekfac = problem.fitted().curvature
    kfac = problem.fitted(update_diagonal=False).curvature
    weighted = dense.label_gradients(problem.model, problem.x)
    for name, block in dense.fisher_blocks(weighted).items():
        axes = dense.eigenbasis(ekfac[name])
        rotated = axes.T @ block @ axes
        assert_same(ekfac[name].eigenvalues.flatten(), rotated.diagonal(), tolerance=1e-10)
        errors = [(dense.approximate_block(layers[name]) - block).norm() for layers in (ekfac, kfac)]
        assert errors[0] <= errors[1] + 1e-12


@theorem
@given(st.integers(1, 5), classes, seeds, st.floats(-5, 5))
def test_the_fisher_of_the_outputs_does_not_see_a_constant_added_to_all_of_them(
    examples, number, seed, constant
):
    outputs = 3 * vectors(examples, number, seed)
    pairs = zip(
        Categorical().fisher_directions(outputs, list),
        Categorical().fisher_directions(outputs + constant, list),
        strict=True,
    )
    for direction, moved in pairs:
        assert_same(moved, direction, tolerance=1e-12)
        assert_same(direction.sum(dim=1), torch.zeros(examples).double(), tolerance=1e-12)
