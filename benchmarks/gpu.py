"""`python -m benchmarks.gpu`: our engine beside Kronfluence on a GPU, in turn in one process.

The packaged model and real reviews: fit, scores of 50 queries and self-influences of 50 to 5,000 training
reviews, in float32, in float32 whose products are rounded to TF32, and in bfloat16; then all training
reviews as a job. Seconds are those of the work alone, with the device waited for; memory is the most that
torch had taken of the device. Writes gpu.json and gpu.md to benchmarks/, anew after every size and
arithmetic; with --quick to build/bench/quick, where a CPU is enough.
"""

import argparse
import gc
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch

from benchmarks import inputs, machine
from benchmarks.plan import BARE, FIT, KRONFLUENCE, OURS, PASSES, SCORE, SELF, Setting
from benchmarks.running import ROOT
from benchmarks.table import table
from benchmarks.work import Clock, Work

ARITHMETIC = {"float32": ("highest", "full"), "bfloat16": ("high", "bfloat16"), "TF32": ("high", "full")}
"""Of torch's products in float32, and our engine's `precision`; Kronfluence gets both, too."""

JOBS = {BARE: (PASSES,), OURS: (FIT, SCORE, SELF), KRONFLUENCE: (FIT, SCORE, SELF)}


@dataclass(frozen=True)
class Sizes:
    """Rounds by the number of reviews; model and reviews; queries; reviews of a batch; training reviews of
    the job."""

    rounds: dict[int, int]
    setting: Setting
    queries: int
    batch_size: int
    job: int


FULL = Sizes({500: 3, 50: 3, 5000: 1}, Setting("real lengths", kept=5000), 50, 64, 20_000)
QUICK = Sizes({6: 1}, Setting("96 tokens, width 96", tokens=96, width=96), 2, 4, 6)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def measured(sizes: Sizes, folder: Path) -> Iterator[list[dict]]:
    """Lists of records, one list for each number of reviews and arithmetic."""
    inputs.write(sizes.setting, folder / "inputs")
    # What a first product costs, and the choice of its kernel, is nobody's.
    few = min(sizes.rounds)
    for arithmetic in ARITHMETIC:
        list(turns(sizes, folder, few, arithmetic, 1))
    for reviews, rounds in sizes.rounds.items():
        for arithmetic in ARITHMETIC:
            yield list(turns(sizes, folder, reviews, arithmetic, rounds))


def turns(sizes: Sizes, folder: Path, reviews: int, arithmetic: str, rounds: int) -> Iterator[dict]:
    """Every job of every engine, the engines taking turns within a round."""
    products, precision = ARITHMETIC[arithmetic]
    torch.set_float32_matmul_precision(products)
    for turn in range(rounds):
        for engine, jobs in JOBS.items():
            for job in jobs if engine != BARE or precision == "full" else ():
                work = read(sizes, folder, engine, reviews, precision)
                found = {"reviews": reviews, "arithmetic": arithmetic, "engine": engine, "job": job}
                record = found | {"turn": turn} | timed(work, engine, job)
                print(json.dumps({k: v for k, v in record.items() if k != "scores"}), flush=True)
                yield record
                del work


def read(sizes: Sizes, folder: Path, engine: str, reviews: int, precision: str) -> Work:
    """Model and reviews anew: an engine may leave its hooks in a model."""
    classifier, train, test = inputs.read(folder / "inputs")
    factors = folder / f"{engine}-{reviews}-{precision}"
    factors.mkdir(exist_ok=True)
    sides = train.first(reviews), test.first(sizes.queries)
    return Work(classifier, *sides, factors, device(), precision, sizes.batch_size)


def timed(work: Work, engine: str, job: str) -> dict:
    """Seconds, most memory taken in MB, and scores if there are any."""
    run = importlib.import_module(f"benchmarks.engine_{engine}").JOBS[job](work)
    gc.collect()
    if on_gpu := work.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    done = run(Clock())
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else None
    if job == FIT:
        done.keep()
    return {"seconds": seconds, "peak_mb": peak, "scores": done.scores}


def summed_up(records: list[dict]) -> list[dict]:
    """A line for each job and arithmetic: both engines, ratios of the same round, and how far the scores are
    apart: from Kronfluence's, and in the same job from our own in float32."""
    lines = []
    asked = {(one["reviews"], one["arithmetic"], one["job"]): None for one in records}
    for reviews, arithmetic, job in sorted(asked, key=lambda one: one[0]):
        found = {
            engine: [
                one
                for one in records
                if (one["reviews"], one["arithmetic"], one["job"], one["engine"])
                == (reviews, arithmetic, job, engine)
            ]
            for engine in JOBS
        }
        line = {"reviews": reviews, "arithmetic": arithmetic, "job": job}
        for engine, own in found.items():
            if own:
                line[engine] = statistics.median(one["seconds"] for one in own)
                line[f"{engine} MB"] = own[-1]["peak_mb"]
        if job != PASSES:
            pairs = zip(found[KRONFLUENCE], found[OURS], strict=True)
            ratios = sorted(theirs["seconds"] / ours["seconds"] for theirs, ours in pairs)
            line["ratios"] = ratios
        if job in (SCORE, SELF):
            exact = next(
                one["scores"]
                for one in records
                if (one["reviews"], one["arithmetic"], one["job"], one["engine"])
                == (reviews, "float32", job, OURS)
            )
            mine, theirs = found[OURS][-1]["scores"], found[KRONFLUENCE][-1]["scores"]
            line["from Kronfluence"] = apart(mine, theirs)
            line["from float32"] = apart(mine, exact)
        lines.append(line)
    return lines


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """‖difference‖ / ‖other‖."""
    one, other = one.double().flatten().cpu(), other.double().flatten().cpu()
    return float((one - other).norm() / other.norm())


def job(sizes: Sizes, folder: Path) -> dict:
    """The whole training set as a job: seconds of each stage, and of the command from start to end."""
    from benchmarks.job import seconds_of_stages

    store = folder / "store"
    command = [sys.executable, "-m", "support.job", "run", "--store", str(store)]
    command += ["--training-rows", str(sizes.job), "--query-rows", str(sizes.queries)]
    start = time.perf_counter()
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stderr
    return {"reviews": sizes.job, "seconds": time.perf_counter() - start, "stages": seconds_of_stages(said)}


def described() -> dict[str, str]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: measured on the CPU"
    return {"device": name} | {k: v for k, v in machine.described().items() if k != "pyDVL"}


def markdown(found: dict) -> str:
    """The whole page."""
    rows = []
    for line in found["lines"]:
        ratios = line.get("ratios")
        spread = f"{statistics.median(ratios):.2f}× ({ratios[0]:.2f}–{ratios[-1]:.2f})" if ratios else ""
        seconds = [f"{line[engine]:.2f}" if engine in line else "" for engine in JOBS]
        memory = [f"{line.get(f'{engine} MB') or 0:,.0f}" for engine in (OURS, KRONFLUENCE)]
        errors = [
            f"{line[what]:.0e}" if what in line else "" for what in ("from Kronfluence", "from float32")
        ]
        bare, ours, theirs = seconds
        if line["job"] == PASSES:
            rows.append([f"{line['reviews']:,}", line["arithmetic"], f"bare passes: {bare} s", *(7 * [""])])
        else:
            names = f"{line['reviews']:,}", line["arithmetic"], line["job"]
            rows.append([*names, ours, theirs, spread, *memory, *errors])
    heads = ["reviews", "arithmetic", "job", "ours, s", "Kronfluence, s", "ratio", "ours, MB"]
    heads += ["Kronfluence, MB", "from Kronfluence", "from float32"]
    whole, rounds = found["job"], {int(size): n for size, n in found["sizes"]["rounds"].items()}
    told = ", ".join(f"{n} rounds with {size:,}" for size, n in sorted(rounds.items())) + " reviews"
    told = told.replace("1 rounds", "one round")
    sections = [
        ["# On a GPU"],
        [f"Written by `python -m benchmarks.gpu` on {found['date']}; not by hand."],
        table(["machine", ""], [[k, v] for k, v in found["machine"].items()]),
        [
            "The packaged model and real reviews, both engines in turn in one process; batches of "
            f"{found['sizes']['batch_size']}, {found['sizes']['queries']} queries. Ratios above 1: ours is "
            f"quicker; median and range of {told}. The last two columns are ‖difference‖ / ‖scores‖: from "
            "Kronfluence's in the same arithmetic, and from our own in float32."
        ],
        table(heads, rows),
        [f"## {whole['reviews']:,} training reviews as a job"],
        [
            f"`python -m support.job run --training-rows {whole['reviews']} --query-rows "
            f"{found['sizes']['queries']}`: {whole['seconds']:.0f} s from start to end."
        ],
        table(["stage", "seconds"], [[k, f"{v:.0f}"] for k, v in whole["stages"].items()]),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="toy sizes, once, on a CPU if there is no GPU")
    parser.add_argument("--output", type=Path, help="the folder to write to")
    parser.add_argument("--report", action="store_true", help="write gpu.md again from gpu.json")
    asked = parser.parse_args()
    if asked.report:
        found = json.loads((ROOT / "benchmarks" / "gpu.json").read_text())
        (ROOT / "benchmarks" / "gpu.md").write_text(markdown(found))
        return
    if not asked.quick and device() == "cpu":
        sys.exit("torch finds no GPU here. Use a machine that has one, or --quick.")
    sizes = QUICK if asked.quick else FULL
    output = asked.output or (ROOT / "build" / "bench" / "quick" if asked.quick else ROOT / "benchmarks")
    output.mkdir(parents=True, exist_ok=True)
    found = {"date": date.today().isoformat(), "machine": described(), "sizes": asdict(sizes)}
    with tempfile.TemporaryDirectory() as folder:
        found["job"] = job(sizes, Path(folder))
        print(json.dumps(found["job"]), flush=True)
        records = []
        for some in measured(sizes, Path(folder)):
            records += some
            found["lines"] = summed_up(records)
            (output / "gpu.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
            (output / "gpu.md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
