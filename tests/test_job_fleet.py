"""What is counted on paper is what the engine counts, and it moves the right way with the fleet."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from support.ekfac import EkfacInfluence
from support.ekfac.counting import LayerWork, curvature_entries
from support.ekfac.memory import factor_bytes
from support.job.errors import BadSetting
from support.job.fleet import SHAPES, Fleet, Shape, on_paper, told
from support.model import ModelLogitsWrapper, load_model, require_gradients_only

FIRST = LayerWork(3, 4, sees_positions=True, hears_positions=True)
SECOND = LayerWork(2, 5, sees_positions=False, hears_positions=False)
TINY = Shape(((2, FIRST), (1, SECOND)), weights=7, attention_blocks=2, width=5, weight_bytes=2)
"""Three tracked layers. Curvature: 4 · (2 · (9 + 16 + 12 + 7) + 4 + 25 + 10 + 7) bytes."""

CURVATURE, FACTOR, WEIGHTS = 4 * 134, 4 * 34, 14
ROOMY = Fleet(1, 10.0, 1e9)


def plan(fleet=ROOMY, shape=TINY, examples=11, tokens=3, queries=5, fit_examples=7):
    return on_paper(shape, fleet, examples, tokens, queries, fit_examples)


def with_room_for(queries, groups=1):
    """A device that holds just so many queries beside the curvature of a group of layers."""
    return Fleet(1, 10.0, WEIGHTS + (CURVATURE + queries * FACTOR) / groups)


@pytest.fixture(scope="module")
def packaged():
    model = load_model()
    require_gradients_only(model)
    return ModelLogitsWrapper(model.eval())


# Counted by hand


def test_a_pass_is_two_products_per_weight_and_six_per_attended_position():
    assert TINY.passes(examples=11, tokens=3) == 11 * 3 * (2 * 7 + 6 * 2 * 5 * 3)


def test_bytes_are_four_for_every_number_that_is_kept():
    assert TINY.curvature_bytes == CURVATURE
    assert TINY.factor_bytes == FACTOR


def test_a_fit_is_two_passes_covariances_squares_and_eigenbases():
    covariances = 2 * (3 * 10 + 3 * 6) + (15 + 3)
    squares = 2 * (3 * 16 + 3 * 9 + 3 * 12 + 12) + (25 + 4 + 10)
    eigenbases = 2 * ((27 + 64) * 9 // 2) + (8 + 125) * 9 // 2
    assert plan().fit == 2 * TINY.passes(7, 3) + 7 * (covariances + squares) + eigenbases


def test_self_influences_are_a_pass_and_squares():
    squares = 2 * (3 * 16 + 3 * 9 + 3 * 12 + 12) + (25 + 4 + 10)
    assert plan().self_influences == TINY.passes(11, 3) + 11 * squares


def test_scores_are_a_pass_of_queries_one_of_examples_factors_and_products():
    factors = 2 * (3 * 16 + 3 * 9 + 3 * 12 + 12 * 7) + (25 + 4 + 10 + 10 * 7)
    products = 2 * 12 * (3 + 5) + 10 * 5
    passes = TINY.passes(5, 3) + TINY.passes(11, 3)
    assert plan().score == passes + 5 * factors + 11 * products


def test_scores_take_four_bytes_each_on_disk():
    assert plan().score_bytes == 4 * 5 * 11


# The packaged model


def test_the_packaged_shape_keeps_what_the_engine_keeps(packaged):
    layers = EkfacInfluence(packaged).layers
    assert SHAPES["packaged"].curvature_bytes == 4 * curvature_entries(layers.values())
    assert SHAPES["packaged"].factor_bytes == factor_bytes(layers)


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


# How it moves


def test_all_queries_go_at_once_where_they_fit():
    found = plan(with_room_for(5))
    assert (found.layer_groups, found.query_groups, found.queries_at_a_time) == (1, 1, 5)
    assert found.device_bytes == WEIGHTS + CURVATURE + 5 * FACTOR


def test_one_query_less_of_memory_means_one_pass_more():
    assert plan(with_room_for(4)).query_groups == 2
    assert plan(with_room_for(20), queries=50).query_groups == 3


def test_queries_in_groups_cost_a_pass_each_and_the_same_products_at_best():
    once, twice = plan(with_room_for(5)), plan(with_room_for(4))
    assert twice.score > once.score + TINY.passes(11, 3)
    assert twice.fit == once.fit


def test_layers_go_in_groups_where_all_together_leave_no_room():
    found = plan(with_room_for(1, groups=2), queries=1)
    assert (found.layer_groups, found.query_groups) == (2, 1)
    assert found.fit - plan(queries=1).fit == 2 * TINY.passes(7, 3)


def test_more_memory_never_means_more_passes_over_the_data():
    shape, passes = SHAPES["llama-3-8b"], []
    for gigabytes in range(18, 200, 3):
        found = plan(Fleet(8, 1e14, gigabytes * 1e9), shape, queries=1000)
        passes.append(found.layer_groups * found.query_groups)
        assert found.device_bytes <= gigabytes * 1e9
    assert passes == sorted(passes, reverse=True)
    assert passes[0] > passes[-1]


def test_half_the_devices_take_twice_the_time():
    many, few = Fleet(6, 10.0, 1e9), Fleet(3, 10.0, 1e9)
    assert plan(few) == plan(many)
    assert few.seconds(999) == pytest.approx(2 * many.seconds(999))
    assert few.seconds(30) == pytest.approx(2 * 30 / (3 * 10.0))


def test_twice_the_examples_double_what_is_done_for_each():
    assert plan(examples=22).self_influences == 2 * plan().self_influences
    assert plan(examples=22).fit == plan().fit


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(BadSetting, match=r"^The weights \(15 GB\) leave no room .* in 10 GB\."):
        plan(Fleet(64, 1e14, 10e9), SHAPES["llama-3-8b"])


@pytest.mark.parametrize("name", ["examples", "tokens", "queries", "fit_examples"])
def test_numbers_below_one_are_refused_by_name(name):
    with pytest.raises(BadSetting, match=rf"^--{name.replace('_', '-')} 0: use 1 or more\.$"):
        plan(**{name: 0})


@pytest.mark.parametrize(
    ("fleet", "message"),
    [
        (Fleet(0, 1.0, 1e9), r"^--devices 0: use 1 or more"),
        (Fleet(1, 0.0, 1e9), r"^--teraflops: use a number above 0"),
    ],
)
def test_a_fleet_that_does_nothing_is_refused(fleet, message):
    with pytest.raises(BadSetting, match=message):
        plan(fleet)


# The table


def table(fleet, **options):
    return told(plan(fleet, **options), TINY, fleet)


def test_the_table_says_hours_and_bytes():
    fleet = Fleet(1, 2.0 / 3600, 1e9)
    lines = table(fleet).split("\n")
    fit = plan().fit
    assert lines[0].split() == ["fit", f"{fit:.3g}", "multiply-adds", f"{fit:.2f}", "h"]
    assert [line.split("  ")[0] for line in lines] == [
        "fit",
        "self-influences",
        "score",
        "curvature",
        "factors of one query",
        "largest on a device",
        "scores on disk",
    ]


def test_the_table_tells_of_groups_of_layers_and_of_queries():
    assert "2 groups, a job each (--layers)" in table(with_room_for(1, groups=2), queries=1)
    said = table(with_room_for(20), queries=50)
    assert "20 queries fit at a time: the training set passes by 3 times." in said
    assert "groups" not in said
