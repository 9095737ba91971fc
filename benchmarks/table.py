"""The published results as markdown, made of `results.json` and nothing else."""

from benchmarks.plan import (
    BARE,
    FIT,
    FORWARD,
    GROWTH,
    KRONFLUENCE,
    NOTEBOOK,
    OURS,
    PASSES,
    PYDVL,
    SCORE,
    SELF,
    TRAINING_SIDE,
)
from benchmarks.results import Values, ratios, spread

MISSING = "missing"
NOT_ASKED = ""
NAMES = {BARE: "bare", OURS: "ours", KRONFLUENCE: "Kronfluence", PYDVL: "pyDVL"}
JOBS = {
    FORWARD: "forward, {reviews} reviews",
    PASSES: "forward + backward, {reviews} reviews",
    FIT: "whole fit, {reviews} reviews",
    SCORE: "scores, {queries} × {reviews}",
    TRAINING_SIDE: "training side of {queries} × {reviews}",
    SELF: "self-influence, {reviews} reviews",
    NOTEBOOK: "fit and influences, {queries} × {reviews}",
}

HOW_TO_READ = """\
Seconds: median (smallest–largest) over the repeats. Ratios are taken repeat by repeat, engines having
run in turn, and have their own median and spread. Every measurement is a process of its own. Loading
model and reviews is not in the seconds; peak memory is that of the whole process, loading included.
"Passes" are one bare forward and backward pass over the same reviews, sorted by length, without weight
gradients: about the least that an engine needs. Less is possible: ours leaves out backwards
the rows that carry no gradient, which bare passes don't. A fit goes over the reviews twice, ours over those
whose activations and gradients have no room in a quarter of the free memory.
Multiply-adds are counted in a run of their own, matrix products alone, without eigenproblems and attention.
Ours and Kronfluence get the same batches of {batch_size} reviews, each padded to its longest (ours takes
self-influence and the training side from all reviews at once), and have the same exact Fisher and the same
mask of padding; pyDVL gets its reviews padded to 512 tokens and in one batch, as its notebook does. λ =
{regularization:g} for all.
Kronfluence keeps factors and scores on disk, which is in its seconds."""


def job_name(cell: dict) -> str:
    return JOBS[cell["job"]].format(**cell)


def markdown(found: dict) -> str:
    """The whole page."""
    sections = [
        ["# What the engine costs"],
        [f"Written by `{found['command']}` on {found['date']}, from `results.json`; not by hand."],
        described(found["machine"], found["cells"]),
        [HOW_TO_READ.format(**found)],
        missing(found["cells"]),
        *side_by_side(found["cells"]),
        notebook(found["cells"]),
        parts_of_the_fit(found["cells"]),
        agreement(found["agreement"]),
        growth(found["growth"]),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def described(machine: dict, cells: list[dict]) -> list[str]:
    rows = [[name, str(value)] for name, value in machine.items()]
    return table(["machine", ""], [*rows, ["other work meanwhile", other_work(cells)]])


def other_work(cells: list[dict]) -> str:
    found = spread(value for cell in cells for value in cell["others_cores"])
    if found is None:
        return "unknown"
    return f"median {found.median:.2f}, at most {found.high:.2f} cores during a measurement"


def missing(cells: list[dict]) -> list[str]:
    lines = []
    for cell in cells:
        for error in cell["errors"]:
            name = f"{cell['job']}, {cell['setting']}, {NAMES[cell['engine']]}"
            last = error.strip().splitlines()[-1]
            lines.append(f"- {name}, {cell['queries']} × {cell['reviews']}: {last}")
    return ["**Missing**, because the measurement failed:", "", *lines] if lines else []


def side_by_side(cells: list[dict]) -> list[list[str]]:
    """A table for every setting in which engines are compared."""
    compared = [cell for cell in cells if cell["job"] not in (NOTEBOOK, GROWTH)]
    settings = dict.fromkeys(cell["setting"] for cell in compared)
    return [setting_table(s, [c for c in compared if c["setting"] == s]) for s in settings]


def setting_table(setting: str, cells: list[dict]) -> list[str]:
    heads = ["seconds", "ours", "Kronfluence", "Kronfluence / ours", "ours / passes"]
    heads += ["peak MB, ours", "peak MB, Kronfluence"]
    bare = [cell for cell in cells if cell["engine"] == BARE]
    passes = {cell["reviews"]: cell for cell in bare if cell["job"] == PASSES}
    rows = []
    for name in dict.fromkeys(job_name(cell) for cell in cells if cell["engine"] != BARE):
        engines = {cell["engine"]: cell for cell in cells if job_name(cell) == name}
        ours, theirs = engines.get(OURS), engines.get(KRONFLUENCE)
        least = passes.get(ours["reviews"]) if ours else None
        row = [name, seconds(ours), seconds(theirs), ratio(theirs, ours), ratio(ours, least)]
        rows.append([*row, memory(ours), memory(theirs)])
    told = "; ".join(f"{job_name(cell)}: {seconds(cell)} s, {memory(cell)} MB" for cell in bare)
    lines = [f"## {setting}", "", *([f"Bare passes: {told}.", ""] if bare else [])]
    return [*lines, *(table(heads, rows) if rows else []), *counted(cells)]


def counted(cells: list[dict]) -> list[str]:
    """Multiply-adds of each job and engine, and how many a second, to carry a ratio to another machine."""
    rows = []
    for name in dict.fromkeys(map(job_name, cells)):
        row = [name]
        for engine in (BARE, OURS, KRONFLUENCE):
            cell = next((c for c in cells if job_name(c) == name and c["engine"] == engine), None)
            count, time = (cell.get("multiply_adds"), spread(cell["seconds"])) if cell else (None, None)
            row += (
                [three_digits(n / 1e9) for n in (count, count / time.median)] if count and time else ["", ""]
            )
        rows.append(row)
    if not any(cell for row in rows for cell in row[1:]):
        return []
    heads = ["10⁹ multiply-adds, and 10⁹ a second"]
    heads += [head for engine in (BARE, OURS, KRONFLUENCE) for head in (NAMES[engine], "a second")]
    return ["", *table(heads, rows)]


def notebook(cells: list[dict]) -> list[str]:
    cells = [cell for cell in cells if cell["job"] == NOTEBOOK]
    if not cells:
        return []
    ours = next((cell for cell in cells if cell["engine"] == OURS), None)
    rows = []
    for cell in cells:
        parts = [shown(cell["parts"].get(part, [])) for part in ("fit", "influences")]
        compared = [ratio(cell, ours), memory_ratio(cell, ours)] if cell is not ours else ["", ""]
        rows.append([NAMES[cell["engine"]], seconds(cell), *parts, memory(cell), *compared])
    size = f"{cells[0]['queries']} × {cells[0]['reviews']}"
    heads = ["seconds", "whole", "fit", "influences", "peak MB", "time / ours", "memory / ours"]
    return [f"## Fit and influences, {size}, as in notebook 04", "", *table(heads, rows)]


def parts_of_the_fit(cells: list[dict]) -> list[str]:
    cells = [cell for cell in cells if cell["job"] == FIT and cell["parts"]]
    if not cells:
        return []
    names = list(dict.fromkeys(name for cell in cells for name in cell["parts"]))
    rows = [[cell["setting"], *(shown(cell["parts"].get(name, [])) for name in names)] for cell in cells]
    return ["## Parts of Kronfluence's fit, seconds", "", *table(["", *names], rows)]


def agreement(pairs: list[dict]) -> list[str]:
    rows = [
        [
            job_name(pair),
            pair["setting"],
            NAMES[pair["peer"]],
            f"{pair['correlation']:.6f}",
            f"{pair['relative_difference']:.1e}",
        ]
        for pair in pairs
    ]
    heads = ["scores", "", "ours and", "correlation", "relative difference"]
    note = "The correlation is Pearson's, the relative difference ‖ours − theirs‖ / ‖theirs‖. pyDVL has "
    note += "another Fisher, and counts padding: its scores correlate with ours, and have other sizes."
    return ["## Agreement of the scores", "", *table(heads, rows), "", note] if rows else []


def growth(axes: list[dict]) -> list[str]:
    if not axes:
        return []
    names = list(dict.fromkeys(name for axis in axes for name in axis["exponents"]))
    rows = []
    for axis in axes:
        exponents = [axis["exponents"].get(name) for name in names]
        texts = [MISSING if value is None else f"{value:.2f}" for value in exponents]
        rows.append([axis["axis"], ", ".join(map(str, axis["sizes"])), *texts])
    note = "Exponents k of seconds ~ sizeᵏ for ours, fitted over the sizes (log–log, least squares). Along "
    note += "reviews a fit's is small because its eigenproblems cost the same for any number, that of scores "
    note += "because the queries' part does; with many reviews both come near 1."
    heads = ["along", "sizes", *names]
    figure = "![Seconds of bare passes, fit and scores along reviews, length, queries and width](growth.png)"
    return ["## How cost grows", "", *table(heads, rows), "", note, "", figure]


def seconds(cell: dict | None) -> str:
    return NOT_ASKED if cell is None else shown(cell["seconds"])


def memory(cell: dict | None) -> str:
    if cell is None:
        return NOT_ASKED
    found = spread(cell["peak_mb"])
    return f"{found.high:.0f}" if found else MISSING


def ratio(over: dict | None, under: dict | None) -> str:
    if over is None or under is None:
        return NOT_ASKED
    return shown(ratios(over["seconds"], under["seconds"]), "×")


def memory_ratio(over: dict | None, under: dict | None) -> str:
    if over is None or under is None:
        return NOT_ASKED
    return shown(ratios(over["peak_mb"], under["peak_mb"]), "×")


def shown(values: Values, unit: str = "") -> str:
    """Median and, of more than one value, the spread: `12.6 (12.1–13.0)`; `missing` without any."""
    found = spread(values)
    if found is None:
        return MISSING
    median = f"{three_digits(found.median)}{unit}"
    if sum(value is not None for value in values) == 1:
        return median
    return f"{median} ({three_digits(found.low)}–{three_digits(found.high)})"


def three_digits(value: float) -> str:
    for digits, limit in ((2, 10), (1, 100)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:.0f}"


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
