"""Saving, loading and caching a fitted curvature."""

import copy

import pytest
import torch

from support.cache import CACHE_VARIABLE, CacheDamaged, cache_folder, fit_or_load
from support.ekfac import EkfacInfluence, Gaussian
from support.ekfac.errors import DamagedFile, WrongModel
from support.ekfac.storage import BASIS_PARTS
from tests.dense import labels, sentences, token_classifier

X, Y = sentences(4, 3, 5), labels(3)


def engine_for(model=None, **settings):
    return EkfacInfluence(model or token_classifier(), hessian_regularization=1e-3, **settings)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "curvature.safetensors"
    engine_for().fit([(X, Y)]).save(path)
    return path


def test_save_then_load_is_the_identity(saved):
    expected = engine_for().fit([(X, Y)]).influences_by_layer(X, Y)
    found = engine_for().load_curvature(saved).influences_by_layer(X, Y)
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


def test_load_makes_an_engine_like_the_one_that_was_saved(tmp_path):
    path = tmp_path / "kfac.safetensors"
    saved = engine_for(update_diagonal=False).fit([(X, Y)])
    saved.save(path)
    loaded = EkfacInfluence.load(path, token_classifier(), hessian_regularization=1e-3)
    assert (loaded.update_diagonal, loaded.examples) == (False, 3)
    torch.testing.assert_close(loaded.influences(X, Y), saved.influences(X, Y), rtol=0, atol=0)


def test_another_likelihood_is_refused(saved):
    with pytest.raises(WrongModel, match=r"likelihood 'Categorical\(exact_classes=10.*'Gaussian"):
        EkfacInfluence.load(saved, token_classifier(), likelihood=Gaussian())


def test_moving_to_a_device_moves_model_and_curvature_and_keeps_the_factors():
    engine = engine_for().fit([(X, Y)])
    expected = engine.influences(X, Y)
    torch.testing.assert_close(engine.to("cpu").influences(X, Y), expected, rtol=0, atol=0)
    moved = engine.to("meta")
    tensors = [
        t
        for c in moved.curvature.values()
        for t in (c.eigenvalues, *(getattr(c.basis, part) for part in BASIS_PARTS))
    ]
    assert len(tensors) == 15
    assert {t.device.type for t in (*tensors, *moved.model.parameters())} == {"meta"}


def test_nothing_but_the_file_is_left_behind(saved):
    assert list(saved.parent.iterdir()) == [saved]


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


def test_another_model_is_refused(saved):
    with pytest.raises(WrongModel, match="fitted with model .* but here"):
        engine_for(token_classifier(seed=1)).load_curvature(saved)


def test_other_layers_are_refused(saved):
    model = token_classifier()
    model.outer.requires_grad_(False)
    with pytest.raises(WrongModel, match='"outer", "classifier".*, but here .*"inner", "classif'):
        engine_for(model).load_curvature(saved)


def test_kfac_and_ekfac_are_not_mixed_up(saved):
    with pytest.raises(WrongModel, match="update_diagonal 'True', but here it is 'False'"):
        engine_for(update_diagonal=False).load_curvature(saved)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def replace_by_text(path):
    path.write_text("no curvature")


DAMAGES = pytest.mark.parametrize("damage", [truncate, flip_a_byte, replace_by_text])


def test_a_file_of_another_format_is_refused(saved, monkeypatch):
    monkeypatch.setattr("support.ekfac.storage.FORMAT", "ekfac-curvature-0")
    with pytest.raises(DamagedFile, match="has format 'ekfac-curvature-2', expected 'ekfac-curv"):
        engine_for().load_curvature(saved)


@DAMAGES
def test_a_damaged_file_is_refused_and_nothing_is_lost(saved, damage):
    engine = engine_for().fit([(X, Y)])
    expected = engine.influences(X, Y)
    damage(saved)
    with pytest.raises(DamagedFile, match="curvature.safetensors .*Fit again"):
        engine.load_curvature(saved)
    torch.testing.assert_close(engine.influences(X, Y), expected, rtol=0, atol=0)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DamagedFile, match="absent.safetensors can't be read"):
        engine_for().load_curvature(tmp_path / "absent.safetensors")


def test_the_second_fit_on_the_same_content_comes_from_the_cache(tmp_path, monkeypatch):
    expected = fit_or_load(engine_for(), [(X, Y)], tmp_path).influences(X, Y)
    monkeypatch.setattr(EkfacInfluence, "fit", lambda *_: pytest.fail("fitted again"))
    found = fit_or_load(engine_for(), [(X, Y)], tmp_path).influences(X, Y)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_labels_padding_batch_split_and_regularization_share_one_cached_fit(tmp_path):
    fit_or_load(engine_for(), [(X, Y)], tmp_path)
    longer = torch.nn.functional.pad(X, (0, 2))
    engine = engine_for()
    engine.hessian_regularization = 1.0
    fit_or_load(engine, [(longer[:2], 1 - Y[:2]), (longer[2:], Y[2:])], tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_other_rows_weights_layers_or_settings_are_fitted_anew(tmp_path):
    frozen = token_classifier()
    frozen.outer.requires_grad_(False)
    other_rows = X.clone()
    other_rows[0, 0] += 1
    for model, rows, settings in [
        (token_classifier(), X, {}),
        (token_classifier(), other_rows, {}),
        (token_classifier(seed=1), X, {}),
        (frozen, X, {}),
        (token_classifier(), X, {"update_diagonal": False}),
    ]:
        fit_or_load(engine_for(copy.deepcopy(model), **settings), [(rows, Y)], tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_token_zero_that_is_not_padding_belongs_to_the_content(tmp_path):
    """With another pad id than 0, a row that ends in token 0 is not the shorter row."""
    model = token_classifier()
    model.token_mask = lambda ids: ids != 10
    for rows in (torch.tensor([[5, 0], [3, 4]]), torch.tensor([[5], [3]])):
        fit_or_load(engine_for(model), [(rows[:1],)], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@DAMAGES
def test_a_damaged_cache_file_is_told_and_computed_again(tmp_path, damage):
    expected = fit_or_load(engine_for(), [(X, Y)], tmp_path).influences(X, Y)
    (path,) = tmp_path.iterdir()
    damage(path)
    with pytest.warns(CacheDamaged, match=f"{path.name} .* Computing it again"):
        engine = fit_or_load(engine_for(), [(X, Y)], tmp_path)
    torch.testing.assert_close(engine.influences(X, Y), expected, rtol=0, atol=0)
    again = fit_or_load(engine_for(), [(X, Y)], tmp_path)
    torch.testing.assert_close(again.influences(X, Y), expected, rtol=0, atol=0)


def test_the_cache_lies_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv(CACHE_VARIABLE)
    assert cache_folder().name == "influence-notebooks"


def test_padding_on_the_other_side_is_another_fit(tmp_path):
    left = torch.stack([row.roll(int((row == 0).sum())) for row in X])
    fit_or_load(engine_for(), [(X,)], tmp_path)
    fit_or_load(engine_for(), [(left,)], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.filterwarnings("error")
def test_the_same_weights_put_to_another_use_are_fitted_again(tmp_path):
    model, other = token_classifier(), token_classifier()
    forward = other.forward
    other.forward = lambda ids: torch.relu(forward(ids))
    fit_or_load(engine_for(model), [(X,)], tmp_path)
    found = fit_or_load(engine_for(other), [(X,)], tmp_path)
    expected = engine_for(other).fit([(X,)])
    torch.testing.assert_close(found.influences(X, Y), expected.influences(X, Y), rtol=0, atol=0)


@pytest.mark.parametrize("key", ["model", "seed", "layers", "examples", "update_diagonal"])
def test_damage_to_what_a_cached_file_says_of_itself_is_told_and_computed_again(tmp_path, key):
    fit_or_load(engine_for(), [(X,)], tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[content.index(f'"{key}":'.encode()) + len(key) + 4] ^= 1
    path.write_bytes(content)
    engine = engine_for()
    with pytest.warns(CacheDamaged, match="Computing it again"):
        fit_or_load(engine, [(X,)], tmp_path)
    assert engine.examples == len(X)
