"""Takes every measurement of a plan in a process of its own, in rounds, and goes on after a kill.

Each is appended to `measurements.jsonl` when it is done; what stands there for this version of the
code is not taken again, unless it failed.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.plan import FIT, GROWTH, NEEDS_FIT, PYDVL, Cell, Plan, Setting
from benchmarks.quiet import watched

ROOT = Path(__file__).parents[1]
PYDVL_PYTHON = ROOT / ".venv-pydvl" / "bin" / "python"
TIME_LIMIT = 1200  # seconds; the longest measurement takes about 150
LINES_OF_AN_ERROR = 15


class MeasurementFailed(RuntimeError):
    """A process that should have measured something ended without a result."""


@dataclass(frozen=True)
class Version:
    """The code that is measured: its commit, with a hash of what is not committed yet."""

    name: str

    @classmethod
    def of_this_checkout(cls) -> "Version":
        def git(*arguments: str) -> str:
            found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
            return found.stdout if found.returncode == 0 else ""

        commit = git("rev-parse", "--short=10", "HEAD").strip() or "no-commit"
        changes = git("diff", "HEAD", "--", "support", "benchmarks/*.py", "requirements-peers.txt")
        if changes:
            commit += "+" + hashlib.sha256(changes.encode()).hexdigest()[:8]
        return cls(commit)


@dataclass(frozen=True)
class Workshop:
    """The folder in which a run keeps inputs, factors, scores and what it measured."""

    folder: Path
    version: Version

    @property
    def log(self) -> Path:
        return self.folder / "measurements.jsonl"

    def inputs(self, setting: Setting) -> Path:
        return self.folder / "inputs" / file_name(*map(str, asdict(setting).values()))

    def factors(self, cell: Cell) -> Path:
        """Those of a fit, for the jobs that start from one; else a place of the cell's own."""
        shared = FIT if cell.job in (FIT, *NEEDS_FIT) else f"{cell.job} {cell.reviews}"
        setting = self.inputs(cell.setting).name
        return self.folder / "factors" / file_name(self.version.name, setting, cell.engine, shared)

    def scores(self, cell: Cell, repeat: int) -> Path:
        name = file_name(self.version.name, cell.name, str(repeat))
        return self.folder / "scores" / f"{name}.safetensors"


def file_name(*parts: str) -> str:
    return "-".join("".join(c if c.isalnum() else "_" for c in part) for part in parts)


def rounds(plan: Plan) -> list[tuple[Cell, int]]:
    """Every cell once, then every cell again that wants it: engines alternate within a round."""
    most = max((cell.repeats for cell in plan.cells), default=0)
    return [(cell, turn) for turn in range(most) for cell in plan.cells if turn < cell.repeats]


def key(cell: Cell, repeat: int, version: Version) -> str:
    return f"{cell.name} | {repeat} | {version.name}"


def recorded(log: Path) -> dict[str, dict]:
    """The last record of every key; a last line cut short by a kill is left out."""
    records = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records[record["key"]] = record
    return records


def run(
    plan: Plan, workshop: Workshop, take: Callable[[Cell, int, Workshop], dict] | None = None
) -> list[dict]:
    """The records of all measurements of the plan, in its order; those already there are kept.

    A record has `cell`, `repeat`, what `measure.measure` returns or `error`, and `others_cores`
    (`quiet`). `take` takes one measurement, by default in a process of its own, and raises
    `MeasurementFailed`.
    """
    take = take or in_own_process
    workshop.folder.mkdir(parents=True, exist_ok=True)
    known, records = recorded(workshop.log), []
    bar = tqdm(rounds(plan), desc="benchmarks", unit="measurement")
    for cell, repeat in bar:
        name = key(cell, repeat, workshop.version)
        if "error" in known.get(name, {"error": "not taken yet"}):
            bar.set_postfix_str(cell.name)
            known[name] = {"key": name, "cell": cell.as_json(), "repeat": repeat}
            try:
                with watched(known[name]):
                    known[name] |= take(cell, repeat, workshop)
            except MeasurementFailed as failure:
                known[name]["error"] = str(failure)
                bar.write(f"\nmissing: {cell.name}\n{failure}", file=sys.stderr)
            append(workshop.log, known[name])
        records.append(known[name])
    return records


def append(log: Path, record: dict) -> None:
    # A line cut short by a kill must not swallow the next one.
    cut_short = log.exists() and log.stat().st_size and not log.read_bytes().endswith(b"\n")
    with log.open("a") as file:
        file.write(("\n" if cut_short else "") + json.dumps(record) + "\n")


def in_own_process(cell: Cell, repeat: int, workshop: Workshop) -> dict:
    """The measurement, with its inputs and the fit it starts from made first where they lack."""
    inputs, factors = workshop.inputs(cell.setting), workshop.factors(cell)
    if not (inputs / "model.json").exists():
        setting = json.dumps(asdict(cell.setting))
        output_of([sys.executable, "-m", "benchmarks.inputs", setting, str(inputs)])
    if cell.job in NEEDS_FIT and not (factors / "fitted").exists():
        fit = Cell(FIT, cell.setting, cell.engine, cell.setting.fitted)
        in_own_process(fit, repeat, workshop)
    scores = workshop.scores(cell, repeat)
    scores.parent.mkdir(parents=True, exist_ok=True)
    asked = {"cell": cell.as_json(), "inputs": str(inputs), "factors": str(factors), "scores": str(scores)}
    asked["count"] = repeat == 0 and cell.engine != PYDVL and cell.job != GROWTH
    command = [python_of(cell.engine), "-m", "benchmarks.measure", json.dumps(asked)]
    try:
        return json.loads(output_of(command).splitlines()[-1])
    except (json.JSONDecodeError, IndexError) as error:
        raise MeasurementFailed(f"{' '.join(command)}\nended without a line of JSON") from error


def python_of(engine: str) -> str:
    if engine != PYDVL:
        return sys.executable
    if not PYDVL_PYTHON.exists():
        raise MeasurementFailed(
            "pyDVL has no environment yet: `make bench` makes it (.venv-pydvl, from "
            "benchmarks/requirements-pydvl.txt)."
        )
    return str(PYDVL_PYTHON)


def output_of(command: Iterable[str]) -> str:
    """What a command prints. Raises `MeasurementFailed` with it and the end of its error output."""
    command = list(command)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired as error:
        raise MeasurementFailed(f"{' '.join(command)}\ntook more than {TIME_LIMIT} s") from error
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-LINES_OF_AN_ERROR:])
        raise MeasurementFailed(f"{' '.join(command)}\nended with {done.returncode}:\n{last}")
    return done.stdout
