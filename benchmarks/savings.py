"""`python -m benchmarks.savings`: what each shortcut of the engine saves, what other settings cost and
change, and how well `plan` foretells. Takes about half an hour.

All in one process, on the packaged model and real reviews; what is compared runs in turn. Writes
`savings.json` and `savings.md`. With `--quick` toy sizes, once, to build/bench.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from benchmarks import inputs, machine
from benchmarks.inputs import Classifier, Reviews
from benchmarks.plan import BATCH_SIZE, REGULARIZATION, Setting
from benchmarks.running import ROOT, Version, Workshop, output_of
from benchmarks.table import table
from benchmarks.undone import FIT, SCORE, SELF, SHORTCUTS
from support.ekfac import EkfacInfluence
from support.ekfac.matrix_products import has_bfloat16

ROUNDS = 3


@dataclass(frozen=True)
class Material:
    """A classifier with its training reviews and queries."""

    name: str
    classifier: Classifier
    train: Reviews
    test: Reviews

    def engine(self, **settings) -> EkfacInfluence:
        # Over all positions: kept as they are, those without gradient must not change what is compared.
        settings = {"hessian_regularization": REGULARIZATION, "covariance_positions": "all"} | settings
        return EkfacInfluence(self.classifier, **settings)

    def jobs(self, engine: EkfacInfluence) -> dict[str, Callable[[], Tensor | EkfacInfluence]]:
        train, test = self.train.batches(BATCH_SIZE), self.test.batches(BATCH_SIZE)
        return {
            FIT: lambda: engine.fit(train),
            SCORE: lambda: engine.score(test, train),
            SELF: lambda: engine.self_influences(*self.train.whole()),
        }


def material(setting: Setting, reviews: int, queries: int) -> Material:
    folder = Workshop(ROOT / "build" / "bench", Version("any")).inputs(setting)
    if not (folder / "model.json").exists():
        output_of([sys.executable, "-m", "benchmarks.inputs", json.dumps(asdict(setting)), str(folder)])
    classifier, train, test = inputs.read(folder)
    return Material(setting.name, classifier, train.first(reviews), test.first(queries))


def seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def shortcuts(chosen: Material, rounds: int) -> list[dict]:
    """Seconds with and without each shortcut, job by job; with it is measured right before without."""
    jobs = chosen.jobs(chosen.engine())
    jobs[FIT]()
    rows = [
        {"shortcut": name, "job": job, "with": [], "without": []}
        for name, (_, concerned) in SHORTCUTS.items()
        for job in concerned
    ]
    for row in tqdm(rows * rounds, "shortcuts", unit="pair"):
        undo, _ = SHORTCUTS[row["shortcut"]]
        row["with"].append(seconds(jobs[row["job"]]))
        with undo():
            row["without"].append(seconds(jobs[row["job"]]))
    return rows


def settings(chosen: Material, rounds: int) -> list[dict]:
    """Seconds of each job under each setting, and the scores' distance from those of the first. bfloat16
    only on a processor that has instructions for it."""
    engines = {"exact": chosen.engine()}
    engines |= {'covariance_positions="gradient"': chosen.engine(covariance_positions="gradient")}
    engines |= {'precision="float32"': chosen.engine(precision="float32")}
    if has_bfloat16(torch.device("cpu")):
        engines |= {'precision="bfloat16"': chosen.engine(precision="bfloat16")}
    rows = [{"setting": name, FIT: [], SCORE: [], SELF: []} for name in engines]
    reference = None
    for row in tqdm(rows * rounds, "settings", unit="setting"):
        jobs = chosen.jobs(engines[row["setting"]])
        for job, run in jobs.items():
            row[job].append(seconds(run))
        scores = jobs[SCORE]()
        reference = scores if reference is None else reference
        row["relative difference"] = ((scores - reference).norm() / reference.norm()).item()
        row["rank correlation"] = stats.spearmanr(scores.flatten(), reference.flatten()).statistic
    return rows


def foretold(chosen: Material) -> list[dict]:
    """Seconds by `plan` and by the clock."""
    engine = chosen.engine()
    train, test = chosen.train.batches(BATCH_SIZE), chosen.test.batches(BATCH_SIZE)
    told = engine.plan(train, test)
    expected = {FIT: told.fit_seconds, SCORE: told.score_seconds, SELF: told.self_seconds}
    size = f"{len(chosen.test.labels)} × {len(chosen.train.labels)}"
    return [
        {"setting": f"{chosen.name}, {size}", "job": job, "plan": expected[job], "measured": seconds(run)}
        for job, run in chosen.jobs(engine).items()
    ]


def measured(quick: bool) -> dict:
    real = Setting("real lengths")
    small = (4, 2) if quick else (16, 5)
    whole = (4, 2) if quick else (50, 10)
    rounds = 1 if quick else ROUNDS
    cases = [material(real, *whole)]
    if not quick:
        cases.append(material(Setting("128 tokens", tokens=128), 50, 10))
        cases.append(material(Setting("DistilBERT-base size", width=768, fitted=8), 8, 4))
        cases.append(material(real, 200, 50))
    return {
        "date": date.today().isoformat(),
        "version": Version.of_this_checkout().name,
        "machine": machine.described(),
        "sizes": {"shortcuts": small, "settings": whole},
        "shortcuts": shortcuts(material(real, *small), rounds),
        "settings": settings(cases[0], rounds),
        "plan": [row for case in cases for row in foretold(case)],
    }


def markdown(found: dict) -> str:
    """The whole page."""
    reviews, queries = found["sizes"]["shortcuts"]
    sections = [
        ["# What each shortcut saves"],
        [f"Written by `python -m benchmarks.savings` on {found['date']}; not by hand."],
        table(["machine", ""], [[k, v] for k, v in found["machine"].items()]),
        [
            f"{reviews} real reviews, {queries} queries. Seconds with the shortcut and without it, one "
            f"after the other, {len(found['shortcuts'][0]['with'])} times: medians, and of the ratio the "
            "smallest and the largest in brackets. Nothing else changes, and neither do the results: a test "
            "holds them to each other."
        ],
        shortcut_table(found["shortcuts"]),
        ["## Other settings"],
        [
            "Times as fast as all positions, eigenproblems in float64, {} reviews and {} queries. The "
            "difference is ‖scores − those‖ / ‖those‖; the other column is Spearman's correlation with "
            "them.".format(*found["sizes"]["settings"])
        ],
        settings_table(found["settings"]),
        ["## What `plan` foretold"],
        table(
            ["", "job", "plan, s", "measured, s", "plan / measured"],
            [
                [
                    row["setting"],
                    row["job"],
                    f"{row['plan']:.1f}",
                    f"{row['measured']:.1f}",
                    f"{row['plan'] / row['measured']:.2f}",
                ]
                for row in found["plan"]
            ],
        ),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def shortcut_table(rows: list[dict]) -> list[str]:
    def line(row: dict) -> list[str]:
        ratios = [b / a for a, b in zip(row["with"], row["without"], strict=True)]
        times = [f"{statistics.median(row[key]):.1f}" for key in ("with", "without")]
        ratio = f"{statistics.median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f})"
        return [row["shortcut"], row["job"], *times, ratio]

    return table(["shortcut", "job", "with, s", "without, s", "without / with"], [line(row) for row in rows])


def settings_table(rows: list[dict]) -> list[str]:
    exact, *others = rows

    def gain(row: dict, job: str) -> str:
        ratios = [a / b for a, b in zip(exact[job], row[job], strict=True)]
        return f"{statistics.median(ratios):.2f}×"

    return table(
        ["setting", FIT, SCORE, SELF, "difference", "rank correlation"],
        [
            [
                f"`{row['setting']}`",
                *(gain(row, job) for job in (FIT, SCORE, SELF)),
                f"{row['relative difference']:.1e}",
                f"{row['rank correlation']:.4f}",
            ]
            for row in others
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.savings", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="toy sizes, once: does it all run?")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    found = measured(quick)
    folder: Path = ROOT / "build" / "bench" / "quick" if quick else ROOT / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "savings.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    (folder / "savings.md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
