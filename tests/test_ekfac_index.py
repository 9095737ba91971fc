"""An index answers as the engine does: wholly with all numbers, as its share says with fewer."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from support.ekfac import EkfacInfluence
from support.ekfac.curvature import damped_inverse, rotated_in_parts
from support.ekfac.errors import BadSetting, DamagedFile, LoaderShuffles, NotFinite, NotFitted, WrongModel
from support.ekfac.index import EkfacIndex, in_bytes
from support.ekfac.storage import write
from tests.dense import assert_same, labels, sentences, token_classifier

X, Y, QUERIES, ASKED = sentences(5, 3, 4, 2, 5), labels(5), sentences(3, 5, 4, seed=1), labels(3, seed=1)
TRAIN = [(X[:2], Y[:2]), (X[2:], Y[2:])]


def fitted(**settings):
    return EkfacInfluence(token_classifier(), **settings).fit([(X,)])


def entries(engine, x, y):
    """Every entry of Q_gᵀ G Q_a / √(Λ + λ), `(batch, entries)`, and what Λ foretells of its square."""
    rows, expected = torch.zeros(len(x), 0).double(), []
    for one in engine._losses(engine._blocks(x, y, "")):
        for name, gradients in one.gradients():
            layer = engine.curvature_of(name)
            inverse = damped_inverse(layer.eigenvalues, engine.hessian_regularization)
            found = [part.clone() for _, part in rotated_in_parts(gradients, layer.basis)]
            in_order = torch.cat(found)[torch.tensor(one.rows).argsort()]
            rows = torch.cat([rows, (in_order * inverse.sqrt()).flatten(1)], dim=1)
            expected.append((layer.eigenvalues * inverse).flatten())
    return rows, torch.cat(expected)


@pytest.mark.parametrize("setting", [1e-2, "auto"])
def test_all_numbers_give_the_influences_to_the_rounding_of_bytes(setting):
    engine = fitted(hessian_regularization=setting)
    index = EkfacIndex(engine, numbers=10_000).build(TRAIN)
    for normalisation, expected in (
        ("plain", engine.influences(QUERIES, ASKED, X, Y)),
        ("relative", engine.relative_influences(QUERIES, ASKED, X, Y)),
    ):
        found = index.ask(QUERIES, ASKED, normalisation)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-2 * expected.abs().max().item())
    assert len(index) == 5
    assert index.share == pytest.approx(1)


def test_a_byte_is_off_by_half_a_step_at_most_and_an_answer_by_what_those_add_up_to():
    engine = fitted()
    index = EkfacIndex(engine, numbers=10_000).build(TRAIN)
    whole, _ = entries(engine, X, Y)
    own, _ = entries(engine, QUERIES, ASKED)
    steps = whole.abs().amax(dim=1) / 127
    assert_same(index.scales.double(), steps)
    off = (index.ask(QUERIES, ASKED) - own @ whole.T).abs()
    assert (off <= 1.001 * own.abs().sum(dim=1)[:, None] * steps / 2).all()


def test_an_example_without_a_gradient_is_kept_as_nothing():
    numbers, scales = in_bytes(torch.tensor([[0.0, 0.0], [-2.0, 1.0]]))
    assert numbers.tolist() == [[0, 0], [-127, 64]]
    assert_same(scales, torch.tensor([0, 2 / 127]))


def test_fewer_numbers_keep_the_entries_with_the_largest_expected_squares():
    engine = fitted()
    index, (own, expected) = EkfacIndex(engine, numbers=7), entries(engine, QUERIES, ASKED)
    best = expected.topk(7).indices
    assert index.share == pytest.approx((expected[best].square().sum() / expected.square().sum()).item())
    found = index.sketched([(QUERIES, ASKED)])
    assert found.shape == (3, 7)
    assert_same(found.sort().values, own[:, best].sort().values)


def test_an_error_is_that_of_the_examples_it_is_measured_on():
    engine = fitted()
    index = EkfacIndex(engine, numbers=7).build(TRAIN)
    off = engine.influences(QUERIES, ASKED, X, Y) - index.ask(QUERIES, ASKED)
    rows = torch.tensor([3, 0])
    found = index.errors(QUERIES, ASKED, rows, (X[rows], Y[rows]))
    assert_same(found, off[:, rows].square().mean(dim=1).sqrt())


def test_sketches_do_not_depend_on_batches_or_padding():
    index = EkfacIndex(fitted(), numbers=11)
    longer = torch.nn.functional.pad(X, (0, 3))
    assert_same(index.sketched([(longer, Y)]), index.sketched(TRAIN))


def test_an_index_is_what_it_was_after_saving_and_belongs_to_its_model_curvature_and_regularization(tmp_path):
    engine = fitted()
    index = EkfacIndex(engine, numbers=11).build(TRAIN)
    index.save(tmp_path / "index.safetensors")
    again = EkfacIndex.load(tmp_path / "index.safetensors", engine)
    assert torch.equal(again.ask(QUERIES, ASKED), index.ask(QUERIES, ASKED))
    with pytest.raises(WrongModel, match=r"with hessian_regularization '0.01', but here it is '0.1'. Build"):
        EkfacIndex.load(tmp_path / "index.safetensors", fitted(hessian_regularization=0.1))
    with pytest.raises(WrongModel, match="fitted with curvature"):
        EkfacIndex.load(tmp_path / "index.safetensors", EkfacInfluence(engine.model).fit([(X[:3],)]))
    with safe_open(tmp_path / "index.safetensors", framework="pt") as file:
        told, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors | {"scales": tensors["scales"] + 1}, tmp_path / "index.safetensors", told)
    with pytest.raises(DamagedFile, match="altered after it was saved .* Build the index again"):
        EkfacIndex.load(tmp_path / "index.safetensors", engine)


def test_an_index_of_numbers_of_two_bytes_is_refused(tmp_path):
    engine = fitted()
    index, path = EkfacIndex(engine, numbers=11).build(TRAIN), tmp_path / "index.safetensors"
    write(path, {"sketches": index.sketches.half()}, index._identity() | {"format": "ekfac-index-1"})
    with pytest.raises(DamagedFile, match=r"ekfac-index-1.* Build the index again"):
        EkfacIndex.load(path, engine)


def test_numbers_that_are_not_finite_are_refused():
    engine = fitted()
    index = EkfacIndex(engine, numbers=5)
    for entries in index.entries.values():
        entries.scale.fill_(float("inf"))
    with pytest.raises(NotFinite, match="NaN or infinite"):
        index.build(TRAIN)


def test_an_index_takes_what_its_engine_reads():
    engine = fitted()
    engine.batches = lambda loader: [(X, Y)] if loader == "all rows" else loader
    assert_same(
        EkfacIndex(engine, numbers=11).sketched("all rows"), EkfacIndex(engine, numbers=11).sketched(TRAIN)
    )


def test_what_an_index_cannot_answer_it_says():
    with pytest.raises(NotFitted, match="fit"):
        EkfacIndex(EkfacInfluence(token_classifier()))
    with pytest.raises(BadSetting, match="numbers=0"):
        EkfacIndex(fitted(), numbers=0)
    with pytest.raises(NotFitted, match=r"Call build\(loader\) first"):
        EkfacIndex(fitted()).ask(QUERIES, ASKED)
    shuffled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), shuffle=True)
    with pytest.raises(LoaderShuffles, match="shuffle=False"):
        EkfacIndex(fitted()).build(shuffled)
