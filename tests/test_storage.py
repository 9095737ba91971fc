"""Saving, loading and caching a fitted curvature."""

import pytest
import torch

from support.cache import CACHE_VARIABLE, CacheDamaged, cache_folder, fit_or_load
from support.ekfac import EkfacInfluence, Gaussian
from support.ekfac.errors import DamagedFile, WrongModel
from support.ekfac.storage import BASIS_PARTS
from tests.damage import emptied, flipped, truncated
from tests.dense import assert_same, labels, sentences, token_classifier

X, Y = sentences(4, 3, 5), labels(3)


def engine_for(model=None, **settings):
    return EkfacInfluence(model or token_classifier(), hessian_regularization=1e-3, **settings)


def frozen():
    """A model that tracks one layer less."""
    model = token_classifier()
    model.outer.requires_grad_(False)
    return model


def influences(engine):
    return engine.influences(X, Y)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "curvature.safetensors"
    engine_for().fit([(X, Y)]).save(path)
    return path


@pytest.fixture
def cached(tmp_path):
    """Fits an engine, or loads what was fitted before; the influences it gives."""
    return lambda engine, batches=((X, Y),): influences(fit_or_load(engine, list(batches), tmp_path))


@pytest.mark.parametrize("update_diagonal", [True, False])
def test_loading_gives_an_engine_like_the_one_that_was_saved_and_leaves_nothing_but_the_file(
    tmp_path, update_diagonal
):
    saved, path = engine_for(update_diagonal=update_diagonal).fit([(X, Y)]), tmp_path / "curvature"
    saved.save(path)
    loaded = EkfacInfluence.load(path, token_classifier(), hessian_regularization=1e-3)
    assert (loaded.update_diagonal, loaded.examples) == (update_diagonal, 3)
    assert_same(loaded.influences_by_layer(X, Y), saved.influences_by_layer(X, Y), 0)
    assert list(tmp_path.iterdir()) == [path]


def test_moving_to_a_device_moves_model_and_curvature_and_keeps_the_factors():
    engine = engine_for().fit([(X, Y)])
    assert_same(influences(engine.to("cpu")), influences(engine_for().fit([(X, Y)])), 0)
    moved = engine.to("meta")
    tensors = [
        t
        for c in moved.curvature.values()
        for t in (c.eigenvalues, *(getattr(c.basis, part) for part in BASIS_PARTS))
    ]
    assert len(tensors) == 15
    assert {t.device.type for t in (*tensors, *moved.model.parameters())} == {"meta"}


def test_an_interrupted_save_leaves_the_file_before_it(saved, monkeypatch):
    before = saved.read_bytes()

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("support.ekfac.storage.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine_for().fit([(X, Y)]).save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize(
    ("here", "words"),
    [
        (lambda: engine_for(token_classifier(seed=1)), "fitted with model .* but here"),
        (lambda: engine_for(frozen()), '"outer", "classifier".*, but here .*"inner", "classif'),
        (lambda: engine_for(update_diagonal=False), "update_diagonal 'True', but here it is 'False'"),
        (lambda: engine_for(likelihood=Gaussian()), r"'Categorical\(exact_classes=10.*'Gaussian"),
    ],
    ids=["model", "layers", "kfac", "likelihood"],
)
def test_a_curvature_of_another_model_or_other_settings_is_refused(saved, here, words):
    with pytest.raises(WrongModel, match=words):
        here().load_curvature(saved)


def test_a_file_of_another_format_and_a_missing_one_are_refused(saved, monkeypatch):
    with pytest.raises(DamagedFile, match="absent.safetensors can't be read"):
        engine_for().load_curvature(saved.parent / "absent.safetensors")
    monkeypatch.setattr("support.ekfac.storage.FORMAT", "ekfac-curvature-0")
    with pytest.raises(DamagedFile, match="has format 'ekfac-curvature-2', expected 'ekfac-curv"):
        engine_for().load_curvature(saved)


@pytest.mark.parametrize("damage", [truncated, flipped, emptied])
def test_a_damaged_file_is_refused_and_nothing_is_lost(saved, damage):
    engine = engine_for().fit([(X, Y)])
    expected = influences(engine)
    damage(saved)
    with pytest.raises(DamagedFile, match="curvature.safetensors .*Fit again"):
        engine.load_curvature(saved)
    assert_same(influences(engine), expected, 0)


# The cache


def test_the_second_fit_on_the_same_content_comes_from_the_cache(cached, monkeypatch):
    expected = cached(engine_for())
    monkeypatch.setattr(EkfacInfluence, "fit", lambda *_: pytest.fail("fitted again"))
    assert_same(cached(engine_for()), expected, 0)


def test_labels_padding_batch_split_and_regularization_share_one_cached_fit(cached, tmp_path):
    cached(engine_for())
    longer = torch.nn.functional.pad(X, (0, 2))
    engine = engine_for()
    engine.hessian_regularization = 1.0
    cached(engine, [(longer[:2], 1 - Y[:2]), (longer[2:], Y[2:])])
    assert len(list(tmp_path.iterdir())) == 1


def test_other_rows_weights_layers_padding_or_settings_are_fitted_anew(cached, tmp_path):
    other_rows = X.clone()
    other_rows[0, 0] += 1
    left = torch.stack([row.roll(int((row == 0).sum())) for row in X])
    for model, rows, settings in [
        (token_classifier(), X, {}),
        (token_classifier(), other_rows, {}),
        (token_classifier(), left, {}),
        (token_classifier(seed=1), X, {}),
        (frozen(), X, {}),
        (token_classifier(), X, {"update_diagonal": False}),
    ]:
        cached(engine_for(model, **settings), [(rows, Y)])
    assert len(list(tmp_path.iterdir())) == 6


def test_a_token_zero_that_is_not_padding_belongs_to_the_content(cached, tmp_path):
    """With another pad id than 0, a row that ends in token 0 is not the shorter row."""
    model = token_classifier()
    model.token_mask = lambda ids: ids != 10
    for rows in (torch.tensor([[5, 0], [3, 4]]), torch.tensor([[5], [3]])):
        cached(engine_for(model), [(rows[:1],)])
    assert len(list(tmp_path.iterdir())) == 2


def flip_in(key):
    """Damages what the file says of itself."""

    def flip(path):
        content = bytearray(path.read_bytes())
        content[content.index(f'"{key}":'.encode()) + len(key) + 4] ^= 1
        path.write_bytes(content)

    return flip


SAID = ["model", "seed", "layers", "examples", "update_diagonal"]


@pytest.mark.parametrize("damage", [truncated, flipped, emptied, *map(flip_in, SAID)])
def test_a_damaged_cache_file_is_told_and_computed_again(cached, tmp_path, damage):
    expected = cached(engine_for())
    (path,) = tmp_path.iterdir()
    damage(path)
    engine = engine_for()
    with pytest.warns(CacheDamaged, match=f"{path.name} .* Computing it again"):
        assert_same(cached(engine), expected, 0)
    assert engine.examples == len(X)
    assert_same(cached(engine_for()), expected, 0)


def test_the_cache_lies_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv(CACHE_VARIABLE)
    assert cache_folder().name == "influence-notebooks"


@pytest.mark.filterwarnings("error")
def test_the_same_weights_put_to_another_use_are_fitted_again(cached):
    model, other = token_classifier(), token_classifier()
    forward = other.forward
    other.forward = lambda ids: torch.tanh(forward(ids))
    cached(engine_for(model))
    assert_same(cached(engine_for(other)), influences(engine_for(other).fit([(X,)])), 0)
