"""The two published figures, made of `results.json` and nothing else."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, ScalarFormatter

from benchmarks.plan import GROWTH, KRONFLUENCE, OURS, PASSES, PYDVL
from benchmarks.results import Spread, ratios, spread
from benchmarks.table import NAMES, job_name

COLORS = {KRONFLUENCE: "#c44e52", PYDVL: "#8172b3", PASSES: "#8c8c8c"}
LINES = {"passes": "#8c8c8c", "fit": "#4c72b0", "score": "#c44e52"}
LABELS = {"passes": "bare passes", "fit": "whole fit", "score": "scores"}
AXIS_LABELS = {
    "reviews": "training reviews",
    "length": "tokens per review",
    "queries": "queries",
    "width": "width of the model",
}


def draw_ratios(found: dict, path: Path) -> None:
    """Every job as long as ours takes, and how many times as long the others do."""
    rows = compared(found["cells"])
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.3 * len(rows)), layout="constrained")
    axes.axvline(1, color="#4c72b0", linewidth=2, label="ours")
    named = set()
    for height, (_, others) in enumerate(rows):
        for engine, times in others.items():
            around = [[times.median - times.low], [times.high - times.median]]
            label = NAMES.get(engine, "bare forward + backward")
            axes.errorbar(
                times.median, height, xerr=around, fmt="o", capsize=3, color=COLORS[engine],
                label=None if label in named else label,
            )  # fmt: skip
            named.add(label)
            axes.annotate(
                f"{times.median:.2g}", (times.median, height), (0, 6),
                textcoords="offset points", ha="center", fontsize=7,
            )  # fmt: skip
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.7)
    plain_log(axes, "x")
    axes.set_xlabel("times as long as ours (median; bars: smallest to largest repeat)")
    axes.set_title("How much longer the others take", loc="left", fontweight="bold")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def compared(cells: list[dict]) -> list[tuple[str, dict[str, Spread]]]:
    """Job in words, and ratios of the others' seconds to ours; jobs with nothing to compare drop out."""
    rows = []
    for ours in cells:
        if ours["engine"] != OURS or ours["job"] == GROWTH:
            continue
        others = {}
        for cell in cells:
            same = cell["setting"] == ours["setting"] and cell["reviews"] == ours["reviews"]
            is_peer = cell["engine"] in (KRONFLUENCE, PYDVL)
            same_job = (cell["job"], cell["queries"]) == (ours["job"], ours["queries"])
            if same and (cell["job"] == PASSES or (is_peer and same_job)):
                times = spread(ratios(cell["seconds"], ours["seconds"]))
                if times:
                    others[PASSES if cell["job"] == PASSES else cell["engine"]] = times
        if others:
            rows.append((f"{job_name(ours)}\n{ours['setting']}", others))
    return rows


def draw_growth(found: dict, path: Path) -> None:
    """Seconds against each size, both logarithmic; straight lines are powers."""
    axes_of_growth = found["growth"]
    figure, panels = plt.subplots(
        1, len(axes_of_growth), figsize=(3.1 * len(axes_of_growth), 3), sharey=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for panel, along in zip(panels[0], axes_of_growth, strict=True):
        for name, seconds in along["seconds"].items():
            points = [(x, y) for x, y in zip(along["sizes"], seconds, strict=True) if y is not None]
            slope = along["exponents"][name]
            label = LABELS[name] + ("" if slope is None else f": {slope:.2f}")
            panel.plot(*zip(*points, strict=True), "o-", color=LINES[name], label=label)
        plain_log(panel, "x")
        plain_log(panel, "y")
        panel.set_xticks(along["sizes"], map(str, along["sizes"]))
        panel.set_xlabel(AXIS_LABELS[along["axis"]])
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=7, title="exponent", title_fontsize=7)
    panels[0][0].set_ylabel("seconds")
    figure.suptitle("How cost grows", x=0.01, ha="left", fontweight="bold")
    save(figure, path)


def plain_log(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain numbers."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)
