"""From records of measurements to what is published: medians, ratios, agreement, growth.

Values of one cell are lists with one entry per repeat, None where the measurement failed, so that
ratios compare what was measured in the same round.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.plan import Cell, Plan, axis_size

Values = list[float | None]


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of repeated values."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of the values that are there; None when none is."""
    found = [value for value in values if value is not None]
    return Spread(statistics.median(found), min(found), max(found)) if found else None


def ratios(over: Values, under: Values) -> Values:
    """over / under, repeat by repeat; None where either is missing."""
    return [None if a is None or b is None else a / b for a, b in zip(over, under, strict=False)]


def exponent(sizes: list[float], seconds: list[float | None]) -> float | None:
    """Slope k of log seconds against log size by least squares: seconds ~ sizeᵏ. None if missing."""
    if len(sizes) < 2 or any(value is None for value in seconds):
        return None
    return statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    ).slope


def collect(plan: Plan, records: list[dict], scores_of: Callable[[str], list[float]]) -> dict[str, list]:
    """Cells, agreement of scores, growth: all that the table and the figures need, as plain JSON.

    `scores_of` reads the scores that a record names.
    """
    taken: dict[Cell, list[dict]] = {}
    for record in records:
        taken.setdefault(Cell.from_json(record["cell"]), []).append(record)
    return {
        "cells": [published(cell, taken.get(cell, [])) for cell in plan.cells],
        "agreement": agreements(plan, taken, scores_of),
        "growth": [growth_along(axis, cells, taken) for axis, cells in plan.growth.items()],
    }


def published(cell: Cell, records: list[dict]) -> dict:
    """One cell with its values repeat by repeat, and why those that are missing are."""
    by_repeat = {record["repeat"]: record for record in records}
    ordered = [by_repeat.get(repeat, {"error": "not measured"}) for repeat in range(cell.repeats)]
    parts = dict.fromkeys(name for record in ordered for name in record.get("parts", {}))
    return {
        "job": cell.job,
        "setting": cell.setting.name,
        "engine": cell.engine,
        "reviews": cell.reviews,
        "queries": cell.queries,
        "seconds": [record.get("seconds") for record in ordered],
        "parts": {name: [record.get("parts", {}).get(name) for record in ordered] for name in parts},
        "peak_mb": [record.get("peak_mb") for record in ordered],
        "loaded_mb": [record.get("loaded_mb") for record in ordered],
        "multiply_adds": next((r["multiply_adds"] for r in ordered if r.get("multiply_adds")), None),
        "others_cores": [record.get("others_cores") for record in ordered],
        "errors": list(dict.fromkeys(r["error"] for r in ordered if "error" in r)),
    }


def agreements(
    plan: Plan, taken: dict[Cell, list[dict]], scores_of: Callable[[str], list[float]]
) -> list[dict]:
    """Every peer's scores against ours, where both made some of the same job."""
    first_scores = {
        cell: next((r["scores"] for r in taken.get(cell, []) if r.get("scores")), None) for cell in plan.cells
    }
    found = []
    for cell, path in first_scores.items():
        for peer, peer_path in first_scores.items():
            same_job = (peer.job, peer.setting, peer.reviews, peer.queries) == (
                cell.job, cell.setting, cell.reviews, cell.queries,
            )  # fmt: skip
            if cell.engine != "ours" or peer is cell or not (same_job and path and peer_path):
                continue
            how_near = agreement(scores_of(path), scores_of(peer_path))
            name = {"job": cell.job, "setting": cell.setting.name, "peer": peer.engine}
            found.append(name | {"reviews": cell.reviews, "queries": cell.queries} | how_near)
    return found


def agreement(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Pearson correlation, and ‖ours − theirs‖ / ‖theirs‖."""
    difference = [a - b for a, b in zip(ours, theirs, strict=True)]
    return {
        "correlation": statistics.correlation(ours, theirs),
        "relative_difference": math.hypot(*difference) / math.hypot(*theirs),
    }


def growth_along(axis: str, cells: list[Cell], taken: dict[Cell, list[dict]]) -> dict:
    """Median seconds of every part of the work at every size of an axis, and fitted exponents."""
    at_size = [published(cell, taken.get(cell, [])) for cell in cells]
    sizes = [axis_size(axis, cell) for cell in cells]
    names = dict.fromkeys(name for cell in at_size for name in cell["parts"])
    seconds = {name: [_median(cell["parts"].get(name, [])) for cell in at_size] for name in names}
    return {
        "axis": axis,
        "sizes": sizes,
        "seconds": seconds,
        "exponents": {name: exponent(sizes, values) for name, values in seconds.items()},
    }


def _median(values: Values) -> float | None:
    found = spread(values)
    return found.median if found else None
