"""`python -m benchmarks`: measures, then writes results.json, results.md and two figures.

A full run writes them to benchmarks/, a quick or partial one to build/bench. Ends with status 1 when
a measurement is missing.
"""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import matplotlib as mpl
from safetensors.torch import load_file

from benchmarks import machine, plan
from benchmarks.figures import compared, draw_growth, draw_ratios
from benchmarks.plan import BATCH_SIZE, REGULARIZATION, Plan
from benchmarks.results import collect
from benchmarks.running import ROOT, Version, Workshop, run
from benchmarks.table import markdown

PUBLISHED = ROOT / "benchmarks"
BUILD = ROOT / "build" / "bench"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="toy sizes, once: does everything run?")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT",
        help='cells whose name has every TEXT, as in "score | real lengths | ours | 10 x 50"',
    )  # fmt: skip
    parser.add_argument(
        "--report", action="store_true",
        help="measure nothing; write table and figures again from the published results.json",
    )  # fmt: skip
    return parser.parse_args()


def part_of(whole: Plan, texts: list[str]) -> Plan:
    """The cells whose name has every text; without texts, all."""
    cells = [cell for cell in whole.cells if all(text in cell.name for text in texts)]
    growth = {a: [c for c in along if c in cells] for a, along in whole.growth.items()}
    return replace(whole, cells=cells, growth={a: along for a, along in growth.items() if along})


def measured(chosen: Plan, command: str) -> dict:
    """Everything that is published, as plain JSON."""
    workshop = Workshop(BUILD, Version.of_this_checkout())
    records = run(chosen, workshop)
    found = {
        "command": command,
        "date": date.today().isoformat(),
        "version": workshop.version.name,
        "batch_size": BATCH_SIZE,
        "regularization": REGULARIZATION,
        "machine": machine.described(),
        **collect(chosen, records, scores_of),
    }
    return without_paths(found)


def scores_of(path: str) -> list[float]:
    return load_file(path)["scores"].flatten().tolist()


def without_paths(found: dict) -> dict:
    """Without where on this machine the commands of failed measurements ran."""
    for cell in found["cells"]:
        cell["errors"] = [
            error.replace(sys.executable, "python").replace(f"{ROOT}/", "") for error in cell["errors"]
        ]
    return found


def publish(found: dict, folder: Path) -> None:
    mpl.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    (folder / "results.md").write_text(markdown(found))
    if compared(found["cells"]):
        draw_ratios(found, folder / "ratios.png")
    if found["growth"]:
        draw_growth(found, folder / "growth.png")


def main() -> int:
    asked = arguments()
    if asked.report:
        publish(json.loads((PUBLISHED / "results.json").read_text()), PUBLISHED)
        return 0
    whole = not asked.quick and not asked.only
    chosen = part_of(plan.quick() if asked.quick else plan.full(), asked.only)
    if not chosen.cells:
        sys.exit(f"No cell has all of {asked.only} in its name.")
    found = measured(chosen, "make bench" + (" QUICK=1" if asked.quick else ""))
    folder = PUBLISHED if whole else BUILD / chosen.name
    publish(found, folder)
    print(markdown(found))
    print(f"Written to {folder.relative_to(ROOT)}: results.json, results.md and figures.")
    missing = any(cell["errors"] for cell in found["cells"])
    if whole and not missing:
        shutil.rmtree(BUILD / "factors", ignore_errors=True)  # a few GB that nothing needs any more
    return int(missing)


if __name__ == "__main__":
    sys.exit(main())
