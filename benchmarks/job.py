"""`python -m benchmarks.job`: what a job of `support.job` costs in one, two and three processes, whether a
kill changes its numbers, and how well its plan foretells. Takes about half an hour.

On the packaged model and real reviews. Writes `job.json` and `job.md`. With `--quick` toy sizes, to
build/bench.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import psutil
import zarr

from benchmarks import machine
from benchmarks.running import ROOT
from benchmarks.table import table
from tests.processes import finished, kill, launched, workers

LOOKS = 0.1
"""Seconds between two looks at the memory of the processes."""


@dataclass(frozen=True)
class Sizes:
    """`spread`: reviews and queries for several processes; `killed`: for the kills, cut at so many
    tokens; `whole`: for time, disk and plan, the curvature of so many of the reviews."""

    spread: tuple[int, int] = (48, 10)
    killed: tuple[int, int, int] = (128, 10, 64)
    kills: int = 10
    whole: tuple[int, int, int] = (2000, 50, 500)
    rounds: int = 3


QUICK = Sizes((24, 4), (24, 4, 32), 2, (32, 4, 16), 1)


@dataclass(frozen=True)
class Run:
    """What was seen of a job: seconds of each stage and of all, most memory of one process."""

    stages: dict[str, float]
    seconds: float
    megabytes: float


def watched(arguments: list[str], processes: int = 1) -> Run:
    """A job to its end."""
    start, most = time.perf_counter(), 0
    job = launched(arguments, processes, _threads(processes))
    with ThreadPoolExecutor() as pool:
        said = pool.submit(finished, job)
        while not said.done():
            most = max([most, *(_memory(one) for one in workers(job))])
            time.sleep(LOOKS)
    return Run(seconds_of_stages(said.result()), time.perf_counter() - start, most / 1e6)


def _threads(processes: int) -> int:
    """Of each process: all together are as many as the cores, but one each at least."""
    return max(1, (os.cpu_count() or 1) // processes)


def _memory(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def seconds_of_stages(said: str) -> dict[str, float]:
    """Seconds of each stage, from the line that tells its end."""
    found = re.findall(r"^(.+): [\d,]+ of [\d,]+ examples \(100%\), ([\d.]+) s$", said, re.MULTILINE)
    return {stage: float(seconds) for stage, seconds in found}


def subject(store: Path, reviews: int) -> list[str]:
    return ["--store", str(store), "--training-rows", str(reviews)]


def options(store: Path, reviews: int, queries: int) -> list[str]:
    return [*subject(store, reviews), "--query-rows", str(queries), "--tell-seconds", "3600"]


def scores_of(store: Path) -> dict[str, np.ndarray]:
    group = zarr.open_group(store / "results.zarr", mode="r")
    return {name: group[name][:] for name in ("scores", "self_influences")}


def difference(store: Path, other: Path) -> float:
    """Largest difference of any number of two stores, relative to the largest number."""
    one, two = scores_of(store), scores_of(other)
    return max(float(np.abs(one[name] - two[name]).max() / np.abs(one[name]).max()) for name in one)


def processes(sizes: Sizes, folder: Path) -> list[dict]:
    """The same job in one, two and three processes, in turn, several rounds."""
    runs: dict[int, list[Run]] = {1: [], 2: [], 3: []}
    for turn in range(sizes.rounds):
        for number in runs:
            store = folder / f"{number}-processes"
            shutil.rmtree(store, ignore_errors=True)
            print(f"{number} processes, round {turn + 1} of {sizes.rounds}", flush=True)
            small_blocks = ["--block", "8"]
            runs[number].append(watched(["run", *options(store, *sizes.spread), *small_blocks], number))
    alone = statistics.median(work(run) for run in runs[1])
    return [
        {
            "processes": number,
            "seconds": statistics.median(work(run) for run in found),
            "speed-up": alone / statistics.median(work(run) for run in found),
            "with start": statistics.median(run.seconds for run in found),
            "MB of a process": max(run.megabytes for run in found),
            "difference": difference(folder / "1-processes", folder / f"{number}-processes"),
        }
        for number, found in runs.items()
    ]


def work(run: Run) -> float:
    """Seconds at work, without starting processes and loading the model."""
    return sum(run.stages.values())


def kills(sizes: Sizes, folder: Path) -> list[dict]:
    """SIGKILL to all of two processes at random moments; the job then goes on to its end."""
    reviews, queries, tokens = sizes.killed
    cut = ["--max-tokens", str(tokens), "--save-seconds", "1", "--block", "16"]
    whole = folder / "undisturbed"
    took = watched(["run", *options(whole, reviews, queries), *cut], 2).seconds
    draw, outcomes = random.Random(0), []
    for number in range(sizes.kills):
        moment = draw.uniform(0.2, 0.95) * took
        store = folder / f"killed-{number}"
        arguments = ["run", *options(store, reviews, queries), *cut]
        job = launched(arguments, 2, _threads(2))
        time.sleep(moment)
        ended = job.poll() is not None
        kill(job)
        reached = where(store)
        resumed = watched(arguments, 2)
        outcomes.append(
            {
                "after s": moment,
                "had reached": "its end" if ended else reached,
                "going on took s": resumed.seconds,
                "difference": difference(whole, store),
            }
        )
        print(outcomes[-1], flush=True)
        shutil.rmtree(store)
    return outcomes


def where(store: Path) -> str:
    """The last step that has left something."""
    steps = {
        "self-influences": "results.zarr/self_influences/c/*",
        "scores": "results.zarr/scores/c/*",
        "curvature": "curvature.safetensors",
        "eigenvalues": "fit/eigenvalues-*.safetensors",
        "eigenbases": "fit/basis-*.safetensors",
        "covariances": "fit/covariances-*.safetensors",
        "tokens": "tokens/*.arrow",
    }
    return next((name for name, trace in steps.items() if any(store.glob(trace))), "nothing yet")


def whole_job(sizes: Sizes, folder: Path) -> dict:
    """Time and disk of the largest job, and what its plan had said."""
    store, (reviews, queries, fitted_on) = folder / "whole", sizes.whole
    job = [*subject(store, reviews), "--fit-rows", str(fitted_on)]
    asked = ["--query-rows", str(queries)]
    plan = finished(launched(["plan", *job, *asked], threads=_threads(1)))
    fit, score = watched(["fit", *job]), watched(["score", *job, *asked])
    stages = fit.stages | score.stages
    files = [path for path in store.rglob("*") if path.is_file()]
    size = {
        "scores": sum(path.stat().st_size for path in files if "scores/c" in str(path)),
        "curvature": (store / "curvature.safetensors").stat().st_size,
        "all": sum(path.stat().st_size for path in files),
    }
    return {
        "reviews": reviews,
        "queries": queries,
        "fitted on": fitted_on,
        "megabytes": {name: number / 1e6 for name, number in size.items()},
        "stages": stages,
        "plan": plan,
        "compared": [
            *(
                {"": f"{step}, s", "planned": planned(plan, step), "measured": seconds}
                for step, seconds in steps(stages).items()
            ),
            {
                "": "memory of a process, MB",
                "planned": planned(plan, "memory of a process"),
                "measured": max(fit.megabytes, score.megabytes),
            },
        ],
    }


def steps(stages: dict[str, float]) -> dict[str, float]:
    fit = sum(seconds for stage, seconds in stages.items() if stage.startswith("fit"))
    return {"fit": fit, "score": stages["score"]}


def planned(plan: str, what: str) -> float:
    """Seconds that a plan names for a step, or the millions of bytes that it names for something else."""
    found = re.search(rf"^{what} .* ([\d.,]+) (s|min|h|MB)$", plan, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"The plan names no {what}:\n{plan}")
    return float(found[1].replace(",", "")) * {"s": 1, "min": 60, "h": 3600, "MB": 1}[found[2]]


def markdown(found: dict) -> str:
    """The whole page."""
    whole, (reviews, queries) = found["whole"], found["sizes"]["spread"]
    killed, _, tokens = found["sizes"]["killed"]
    changed = sum(kill["difference"] > 0 for kill in found["kills"])
    sections = [
        ["# A job in several processes"],
        [f"Written by `python -m benchmarks.job` on {found['date']}; not by hand."],
        table(["machine", ""], [[k, v] for k, v in found["machine"].items() if k != "pyDVL"]),
        ["## One, two and three processes"],
        [
            f"Fit, scores and self-influences of {reviews} reviews, {queries} queries; median of "
            f"{found['sizes']['rounds']} rounds, in turn. The threads of all processes together are as "
            "many as the cores, but one each at least. Seconds at work leave out starting the processes "
            "and loading the model. The difference is the largest one to the numbers of one process, "
            "over the largest number."
        ],
        _table(found["processes"]),
        ["## Killed and taken up again"],
        [
            f"Two processes, {killed} reviews cut at {tokens} tokens, saving every second, SIGKILL to both "
            f"at {len(found['kills'])} random moments, then the same command once more. Runs with any number "
            f"that differs in any bit from the undisturbed run's: {changed}."
        ],
        _table(found["kills"]),
        [f"## {whole['reviews']:,} training reviews, {whole['queries']} queries, one process"],
        [f"Of 512 tokens at most; the curvature is that of {whole['fitted on']} of them."],
        _table(whole["compared"]),
        [
            "MB on disk: "
            + ", ".join(f"{name} {size:,.1f}" for name, size in whole["megabytes"].items())
            + ". The plan, before it began:"
        ],
        ["```text", whole["plan"].strip(), "```"],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _table(rows: list[dict]) -> list[str]:
    return table(list(rows[0]), [[_readable(value) for value in row.values()] for row in rows])


def _readable(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:{',.0f' if value >= 100 else '.3g' if value >= 0.01 or value == 0 else '.1e'}}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.job", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="toy sizes, to build/bench/quick")
    quick = parser.parse_args().quick
    sizes = QUICK if quick else Sizes()
    output: Path = ROOT / "build" / "bench" / "quick" if quick else ROOT / "benchmarks"
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "date": date.today().isoformat(),
            "machine": machine.described(),
            "sizes": asdict(sizes),
            "whole": whole_job(sizes, Path(folder)),
            "processes": processes(sizes, Path(folder)),
            "kills": kills(sizes, Path(folder)),
        }
    (output / "job.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    (output / "job.md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
