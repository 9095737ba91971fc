"""The benchmarks' bookkeeping. What anything costs decides no test."""

import json
import sys

import pytest
import torch

from benchmarks import gpu, plan, running
from benchmarks.measure import multiply_adds
from benchmarks.plan import Cell, Plan, Setting
from benchmarks.results import Spread, collect, exponent, ratios, spread
from benchmarks.running import MeasurementFailed, Version, Workshop, key, output_of, recorded, run
from benchmarks.table import MISSING, counted, shown, side_by_side
from support.ekfac import matrix_products
from support.ekfac.matrix_products import matrix_product

SETTING = Setting("some reviews")
OURS = Cell("fit", SETTING, "ours", reviews=50)
THEIRS = Cell("fit", SETTING, "kronfluence", reviews=50)
PASSES = Cell("passes", SETTING, "bare", reviews=50)
PLAN = Plan("some", [PASSES, OURS, THEIRS], growth={})
SECONDS = {PASSES: [2.0, 2.0, 4.0], OURS: [4.0, 5.0, 6.0], THEIRS: [12.0, 10.0, 24.0]}


def record(cell, repeat, seconds, **more):
    measured = {"seconds": seconds, "parts": {}, "peak_mb": 900.0, "loaded_mb": 500.0}
    return {"cell": cell.as_json(), "repeat": repeat} | measured | {"scores": None} | more


def records(cells=SECONDS):
    return [record(cell, n, value) for cell, values in cells.items() for n, value in enumerate(values)]


def published(found, chosen=PLAN, scores=None):
    return collect(chosen, json.loads(json.dumps(found)), (scores or {}).get)


def row_of(found):
    """Cells of the only line of the only table that has ratios."""
    ((_, _, _, _, *lines),) = side_by_side(published(found)["cells"])
    (row,) = [line for line in lines if "whole fit, 50 reviews" in line]
    return [text.strip() for text in row.strip("|").split("|")][1:]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_the_exponent_of_a_power_law_is_its_power(power):
    sizes = [8, 16, 32, 64]
    assert exponent(sizes, [0.3 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)
    assert exponent([1, 2, 4], [1.0, None, 4.0]) is None


def test_spreads_and_ratios_are_of_what_was_measured_ratios_in_the_same_round():
    assert spread([3.0, 1.0, None, 7.0]) == Spread(median=3.0, low=1.0, high=7.0)
    assert spread([None, None]) is None
    assert shown([5.0, None]) == "5.00"
    assert ratios([12.0, None, 24.0, 8.0], [4.0, 5.0, 6.0, None]) == [3.0, None, 4.0, None]


def test_the_table_has_medians_spreads_and_ratios_and_what_is_missing_is_no_number():
    assert row_of(records())[:4] == [
        "5.00 (4.00–6.00)",
        "12.0 (10.0–24.0)",
        "3.00× (2.00–4.00)",
        "2.00× (1.50–2.50)",
    ]
    measured = records({PASSES: SECONDS[PASSES], OURS: SECONDS[OURS]})
    failed = [{"cell": THEIRS.as_json(), "repeat": n, "error": "killed"} for n in range(3)]
    for found in (measured, measured + failed):
        row = row_of(found)
        assert row[0] == "5.00 (4.00–6.00)"
        assert row[1] == row[2] == row[5] == MISSING


def test_scores_of_the_same_job_are_compared_by_correlation_and_relative_difference():
    ours, theirs = (Cell("score", SETTING, name, 2, 1, repeats=1) for name in ("ours", "kronfluence"))
    other = Cell("score", SETTING, "kronfluence", 3, 1, repeats=1)
    cells = [ours, theirs, other]
    found = published(
        [record(cell, 0, 1.0, scores=cell.name) for cell in cells],
        Plan("scores", cells, growth={}),
        {ours.name: [1.0, 2.0], theirs.name: [2.0, 1.0], other.name: [1.0, 2.0, 3.0]},
    )
    (pair,) = found["agreement"]
    assert (pair["peer"], pair["reviews"]) == ("kronfluence", 2)
    assert (pair["correlation"], pair["relative_difference"]) == pytest.approx((-1, 0.4**0.5))


def test_growth_has_an_exponent_for_every_part():
    cells = [Cell("growth", SETTING, "ours", size, 1, repeats=1) for size in (2, 4, 8)]
    grown = Plan("growth", cells, growth={"reviews": cells})
    parts = [{"fit": 3.0 * cell.reviews, "score": cell.reviews**2} for cell in cells]
    taken = [record(c, 0, 1.0, parts=p) for c, p in zip(cells, parts, strict=True)]
    (along,) = published(taken, grown)["growth"]
    assert along["sizes"] == [2, 4, 8]
    assert along["exponents"] == {"fit": pytest.approx(1.0), "score": pytest.approx(2.0)}


@pytest.mark.parametrize("whole", [plan.full(), plan.quick()], ids=["full", "quick"])
def test_every_measurement_of_a_plan_has_a_key_of_its_own(whole):
    keys = [key(cell, repeat, Version("v")) for cell, repeat in running.rounds(whole)]
    assert len(set(keys)) == len(keys)
    assert {cell for along in whole.growth.values() for cell in along} <= set(whole.cells)
    assert [Cell.from_json(json.loads(json.dumps(cell.as_json()))) for cell in whole.cells] == whole.cells


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path, Version("v1"))


@pytest.fixture
def taken():
    """Cells that were measured by `take`, in order."""
    return []


@pytest.fixture
def take(taken):
    def measured(cell, repeat, workshop):
        taken.append((cell, repeat))
        return {"seconds": 1.0, "parts": {}, "peak_mb": 1.0, "loaded_mb": 1.0, "scores": None}

    return measured


def test_a_run_takes_turns_goes_on_where_it_was_killed_and_measures_another_version_anew(
    workshop, take, taken
):
    complete = run(PLAN, workshop, take)
    turns = [(cell, turn) for turn in range(3) for cell in (PASSES, OURS, THEIRS)]
    assert taken == turns
    lines = workshop.log.read_text().splitlines(keepends=True)
    workshop.log.write_text("".join(lines[:4]) + lines[4][:20])  # killed while it wrote the fifth
    taken.clear()
    resumed = run(PLAN, workshop, take)
    assert taken == turns[4:]
    assert [r["key"] for r in resumed] == [r["key"] for r in complete]
    assert resumed[:4] == complete[:4]
    taken.clear()
    assert run(PLAN, workshop, take) == resumed
    assert not taken
    run(PLAN, Workshop(workshop.folder, Version("v2")), take)
    assert taken == turns


def test_a_failure_is_told_recorded_and_tried_again(workshop, take, taken, capsys):
    def fails(cell, repeat, workshop):
        raise MeasurementFailed("python -m something\nended with 1:\nno memory")

    one = Plan("one", [Cell("fit", SETTING, "kronfluence", 50, repeats=1)], growth={})
    (failed,) = run(one, workshop, fails)
    assert failed["error"].endswith("no memory")
    assert "seconds" not in failed
    told = capsys.readouterr().err
    assert "missing: fit | some reviews | kronfluence | 50" in told
    assert "no memory" in told
    (record,) = run(one, workshop, take)
    assert record["seconds"] == 1.0
    assert list(recorded(workshop.log).values()) == [record]


@pytest.mark.parametrize("by_onednn", [True, False])
def test_the_multiply_adds_of_a_product_are_the_product_of_its_sizes(by_onednn, monkeypatch):
    monkeypatch.setattr(matrix_products, "onednn_is_quicker", lambda: by_onednn)
    size = 300
    left, right = torch.randn(size, 2 * size), torch.randn(2 * size, 4 * size)
    assert multiply_adds(lambda clock: matrix_product(left, right)) == 8 * size**3


def test_multiply_adds_stand_beside_how_many_there_were_a_second():
    found = records({OURS: SECONDS[OURS]})
    assert counted(published(found)["cells"]) == []
    *_, row = counted(published([found[0] | {"multiply_adds": 40e9}, *found[1:]])["cells"])
    assert [text.strip() for text in row.strip("|").split("|")] == [
        "whole fit, 50 reviews", "", "", "40.0", "8.00", "", "",
    ]  # fmt: skip


def test_a_process_that_fails_tells_its_command_and_its_last_words():
    script = "import sys; sys.exit('out of luck')"
    with pytest.raises(MeasurementFailed, match="out of luck") as failure:
        output_of([sys.executable, "-c", script])
    assert script in str(failure.value)
    assert "ended with 1" in str(failure.value)


def test_on_a_gpu_ratios_are_of_one_round_and_scores_compared_with_the_peer_and_with_float32():
    def taken(arithmetic, engine, seconds, score):
        about = {"reviews": 50, "arithmetic": arithmetic, "engine": engine, "job": "score"}
        return [
            about | {"seconds": one, "peak_mb": 9.0, "scores": torch.tensor([[score]])} for one in seconds
        ]

    both = taken("float32", "ours", [1, 2, 4], 5.0) + taken("float32", "kronfluence", [3, 4, 16], 4.0)
    coarse = taken("bfloat16", "ours", [1], 6.0) + taken("bfloat16", "kronfluence", [2], 6.0)
    exact, rounded = gpu.summed_up(both + coarse)
    assert exact["ratios"] == [2, 3, 4]
    assert (exact["ours"], exact["kronfluence"], exact["ours MB"]) == (2, 4, 9.0)
    assert (exact["from Kronfluence"], exact["from float32"]) == (0.25, 0)
    assert (rounded["from Kronfluence"], rounded["from float32"]) == (0, 0.2)
