"""What a GPU takes in fewer and larger products is what a CPU takes one by one; on a machine that has one,
every public number is the CPU's."""

import copy

import pytest
import torch

from support.ekfac import EkfacIndex, EkfacInfluence, NextToken, curvature, gradients
from tests.dense import assert_same, labels, sentences, token_classifier
from tests.tiny_writers import gpt2, llama, ready, texts

X, Y = sentences(5, 3, 4, 2, 5), labels(5)
QUERIES, QUERY_LABELS = sentences(3, 5, 4, seed=1), labels(3, seed=1)
SETTINGS = {"hessian_regularization": 1e-3}

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


def numbers(engine, x=X, y=Y, asked=(QUERIES, QUERY_LABELS)):
    """Every number that a fitted engine gives of these."""
    engine.fit([(x, y)])
    index = EkfacIndex(engine, 6).build([(x, y)])
    found = {
        "scores": engine.score([asked], [(x, y)]),
        "relative scores": engine.score([asked], [(x, y)], "relative"),
        "influences": engine.influences(*asked, x, y),
        "tokens": engine.token_influences(*asked, x, y),
        "self-influences": engine.self_influences(x, y),
        "index": index.ask(*asked),
        "errors of the index": index.errors(*asked, torch.tensor([1, 3]), (x[[1, 3]], y[[1, 3]])),
        "some λ": engine.explore_hessian_regularization(x, y, [0.1])[0.1][engine.layer_names[0]],
    }
    return found | {f"Λ of {name}": layer.eigenvalues for name, layer in engine.curvature.items()}


def assert_all_same(found, expected, tolerance=1e-9):
    for name, number in expected.items():
        assert_same(found[name].cpu(), number.cpu(), tolerance)


@pytest.mark.parametrize("room", [1, 30, 10**9])
def test_numbers_do_not_depend_on_how_many_matrices_a_product_takes(monkeypatch, room):
    expected = numbers(EkfacInfluence(token_classifier(), **SETTINGS))

    def several(device, d_out, d_in):
        return max(1, room // (d_out * d_in))

    for module in (curvature, gradients):
        monkeypatch.setattr(module, "matrices_at_a_time", several)
    assert_all_same(numbers(EkfacInfluence(token_classifier(), **SETTINGS)), expected)


@on_gpu
def test_on_a_gpu_numbers_are_those_of_a_cpu():
    expected = numbers(EkfacInfluence(token_classifier(), **SETTINGS))
    assert_all_same(numbers(EkfacInfluence(token_classifier().cuda(), **SETTINGS)), expected)


@on_gpu
@pytest.mark.parametrize("settings", [{}, {"query_rank": 2}, {"covariance_positions": "weighted"}])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_on_a_gpu_a_model_that_writes_scores_as_on_a_cpu(build, settings):
    train, queries = texts(5, 3, 4), texts(3, 5, seed=1)
    engine = EkfacInfluence(ready(build), likelihood=NextToken(), **SETTINGS, **settings).fit([train])
    expected = engine.score([queries], [train])
    # Llama takes the angles of its positions in float32.
    assert_same(copy.deepcopy(engine).to("cuda").score([queries], [train]).cpu(), expected, 1e-5)
    # Its labels are drawn anew there, by another generator.
    fitted = EkfacInfluence(ready(build).cuda(), likelihood=NextToken(), **SETTINGS, **settings).fit([train])
    assert fitted.score([queries], [train]).isfinite().all()


@on_gpu
def test_a_curvature_saved_on_a_gpu_is_loaded_on_a_cpu_and_back(tmp_path):
    path = tmp_path / "curvature.safetensors"
    there = EkfacInfluence(token_classifier().cuda(), **SETTINGS).fit([(X, Y)])
    there.save(path)
    here = EkfacInfluence.load(path, token_classifier(), **SETTINGS)
    assert_same(here.self_influences(X, Y), there.self_influences(X, Y).cpu())
    back = EkfacInfluence.load(path, token_classifier().cuda(), **SETTINGS)
    assert_same(back.self_influences(X, Y), there.self_influences(X, Y))
