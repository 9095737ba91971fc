"""What is counted on paper is what the engine counts, and it moves the right way with the fleet."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from support.ekfac import EkfacInfluence, NextToken
from support.ekfac.memory import curvature_bytes, factor_bytes
from support.job.errors import BadSetting
from support.job.fleet import SHAPES, Shape, on_paper, told
from support.language import FEED_FORWARD, load_language_model
from support.model import ModelLogitsWrapper, load_model, require_gradients_only

TINY = Shape(((3, 4), (3, 4), (2, 5)), weights=7, weight_bytes=2, attention_blocks=2, width=5)
"""Three tracked layers. Curvature: 4 · (2 · (9 + 16 + 12 + 7) + 4 + 25 + 10 + 7) bytes."""

CURVATURE, FACTOR, WEIGHTS = 4 * 134, 4 * 34, 14
ROTATED = 2 * (3 * 16 + 3 * 9 + 3 * 12) + (2 * 25 + 3 * 4 + 3 * 10)
SQUARES = ROTATED + 34


def plan(memory=1e9, shape=TINY, examples=11, tokens=3, queries=5, fit_examples=7, query_rank=0):
    return on_paper(shape, examples, tokens, queries, fit_examples, memory, query_rank)


def room_for(queries, groups=1):
    """Memory of a device that holds just so many queries beside the curvature of a group of layers."""
    return WEIGHTS + (CURVATURE + queries * FACTOR) / groups


@pytest.fixture(scope="module")
def packaged():
    model = load_model()
    require_gradients_only(model)
    return ModelLogitsWrapper(model.eval())


# Counted by hand


def test_a_pass_is_two_products_per_weight_and_six_per_attended_position():
    assert TINY.passes(examples=11, tokens=3) == 11 * 3 * (2 * 7 + 6 * 2 * 5 * 3)


def test_a_fit_is_two_passes_covariances_squares_and_eigenbases_and_self_influences_are_one_and_squares():
    covariances = 2 * (3 * 16 + 3 * 9) + (3 * 25 + 3 * 4)
    eigenbases = (2 * (27 + 64) + (8 + 125)) * 9 / 2
    assert plan()["fit"] == 2 * TINY.passes(7, 3) + 7 * (covariances + SQUARES) + eigenbases
    assert plan()["self-influences"] == TINY.passes(11, 3) + 11 * SQUARES


def test_scores_are_a_pass_of_queries_one_of_examples_factors_and_products():
    factors = ROTATED + 2 * 12 * 7 + 10 * 7
    products = (2 * 12 + 10) * (3 + 5)
    passes = TINY.passes(5, 3) + TINY.passes(11, 3)
    assert plan()["score"] == passes + 5 * factors + 11 * products
    # A single row goes through the factors of a single query instead.
    factors = 2 * (16 + 9 + 12 + 12 * 7) + (25 + 4 + 10 + 10 * 7)
    assert plan(tokens=1, queries=1)["score"] == TINY.passes(12, 1) + factors + 11 * 34


def test_at_low_rank_a_query_is_as_large_as_its_two_sides_and_meets_each_position_with_both():
    found = plan(query_rank=2)
    low = 2 * (2 * (3 + 4)) + 2 * (2 + 5)
    assert found["factors of one query"] == 4 * low
    assert found["largest on a device"] == WEIGHTS + CURVATURE + FACTOR + 5 * 4 * low
    factors = ROTATED + 2 * 12 * 7 + 10 * 7 + 6 * (2 + 8) * 34
    assert found["score"] == TINY.passes(5, 3) + TINY.passes(11, 3) + 5 * factors + 11 * 5 * 3 * low
    assert plan(query_rank=99)["factors of one query"] == 4 * (2 * 3 * (3 + 4) + 2 * (2 + 5))


# The packaged model


def test_the_packaged_shape_keeps_what_the_engine_keeps(packaged):
    layers = EkfacInfluence(packaged).layers
    found = plan(1e12, SHAPES["packaged"])
    assert found["curvature"] == curvature_bytes(layers)
    assert found["factors of one query"] == factor_bytes(layers)


@pytest.mark.parametrize("tokens", [16, 256])
def test_the_packaged_shape_passes_cost_what_a_counter_counts(packaged, tokens):
    model = packaged.model
    model.set_attn_implementation("eager")  # the counter knows no fused attention on a CPU
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda *call: call[-1].requires_grad_())
    with hook, FlopCounterMode(display=False) as counter:
        packaged(torch.full((2, tokens), 1000)).sum().backward()
    require_gradients_only(model)
    counted = counter.get_total_flops() // 2
    assert SHAPES["packaged"].passes(2, tokens) == pytest.approx(counted, rel=0.15)


def test_the_language_models_shape_keeps_what_the_engine_keeps():
    model, _ = load_language_model()
    require_gradients_only(model, FEED_FORWARD)
    layers = EkfacInfluence(model, likelihood=NextToken()).layers
    shape = SHAPES["smollm2-135m"]
    assert plan(1e12, shape)["curvature"] == curvature_bytes(layers)
    assert plan(1e12, shape, query_rank=32)["factors of one query"] == factor_bytes(layers, 32)
    met = [one for one in model.modules() if isinstance(one, torch.nn.Linear)]  # with the head
    assert shape.weights == sum(one.weight.numel() for one in met)


# How it moves


def test_all_queries_go_at_once_where_they_fit_and_one_less_of_memory_means_one_pass_more():
    once, twice = plan(room_for(5)), plan(room_for(4))
    assert once["scores on disk"] == 4 * 5 * 11
    assert (once["groups"], once["passes"], once["at_a_time"]) == (1, 1, 5)
    assert once["largest on a device"] == WEIGHTS + CURVATURE + 5 * FACTOR
    assert (twice["passes"], twice["fit"]) == (2, once["fit"])
    assert twice["score"] > once["score"] + TINY.passes(11, 3)
    assert plan(room_for(20), queries=50)["passes"] == 3


def test_layers_go_in_groups_where_all_together_leave_no_room():
    found = plan(room_for(1, groups=2), queries=1)
    assert (found["groups"], found["passes"]) == (2, 2)
    assert found["fit"] - plan(queries=1)["fit"] == 2 * TINY.passes(7, 3)


def test_more_memory_never_means_more_passes_over_the_data():
    passes = []
    for gigabytes in range(18, 200, 3):
        found = plan(gigabytes * 1e9, SHAPES["llama-3-8b"], queries=1000)
        passes.append(found["passes"])
        assert found["largest on a device"] <= gigabytes * 1e9
    assert passes == sorted(passes, reverse=True)
    assert passes[0] > passes[-1]


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(BadSetting, match=r"^The weights \(15 GB\) leave no room .* in 10 GB\."):
        plan(10e9, SHAPES["llama-3-8b"])


def test_the_table_says_hours_of_two_operations_for_each_multiply_add_and_tells_of_groups():
    found = plan(room_for(1, groups=2), queries=1)
    lines = told(found, operations=2 / 3600).split("\n")
    fit = found["fit"]
    assert lines[0].split() == ["fit", f"{fit:.3g}", "multiply-adds", f"{fit:.2f}", "h"]
    assert "2 groups, a job each (--layers)" in lines[-1]
    said = told(plan(room_for(20), queries=50), 1.0)
    assert "20 queries fit at a time: 3 passes of the training set." in said
    assert "groups" not in said


@pytest.mark.parametrize("shape", SHAPES)
def test_a_fleet_is_planned_on_paper(said, shape):
    out = said("fleet", "--shape", shape, "--devices", 8, "--memory", 141)
    assert out.startswith(f"{shape}: 1,000,000 examples of 512 tokens, 1,000 queries; 8 devices")
    assert "scores on disk 4.0 GB" in " ".join(out.split())


@pytest.mark.parametrize("name", ["examples", "tokens", "queries", "fit-examples", "devices", "teraflops"])
def test_a_fleet_of_nothing_is_refused_by_name(said, name):
    assert f"BadSetting: --{name}" in said("fleet", f"--{name}", 0, status=1)
