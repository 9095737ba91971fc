"""One measurement in this process; prints one line of JSON. `running` calls it, in a fresh process.

    python -m benchmarks.measure '{"cell": …, "inputs": …, "factors": …, "scores": …}'

Loading the model and the reviews is not timed. The peak memory is that of the whole process,
loading included; `loaded_mb` is the peak before the job began. Where it is asked for, the job runs once more
to have its multiply-adds counted.
"""

import importlib
import json
import math
import resource
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import inputs
from benchmarks.plan import FIT, PYDVL, Cell
from benchmarks.work import Clock, Job, Work

FITTED = "fitted"
"""File whose presence says that a fit went through and its factors are whole."""

MODEL_OPTIONS = {
    # Its per-example gradients go through vmap, which can't follow the branch on the mask in sdpa.
    PYDVL: {"attn_implementation": "eager"}
}


def measure(cell: Cell, folder: Path, factors: Path, scores: Path, count: bool = False) -> dict:
    """Seconds, seconds of parts, peak memory in MB, multiply-adds if they are to be counted, and the path of
    the scores or None."""
    classifier, train, test = inputs.read(folder, **MODEL_OPTIONS.get(cell.engine, {}))
    factors.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        classifier(train.input_ids[:1, :16])  # thread pools start here, not in the timed part
    sides = train.first(cell.reviews), test.first(cell.queries)
    work = Work(classifier, *sides, factors, precision=cell.setting.precision)
    job = importlib.import_module(f"benchmarks.engine_{cell.engine}").JOBS[cell.job](work)
    clock, loaded = Clock(), peak_mb()
    start = time.perf_counter()
    done = job(clock)
    seconds = time.perf_counter() - start
    peak = peak_mb()
    if cell.job == FIT:
        done.keep()
        (factors / FITTED).touch()
    if done.scores is not None:
        save_file({"scores": done.scores.detach().float().contiguous()}, scores)
    return {
        "seconds": seconds,
        "parts": clock.parts,
        "peak_mb": peak,
        "loaded_mb": loaded,
        "multiply_adds": multiply_adds(job) if count else None,
        "scores": None if done.scores is None else str(scores),
    }


def multiply_adds(job: Job) -> int:
    """Those of the matrix products of a job, which is run for it; eigenproblems and attention are not
    counted."""

    def by_onednn(rows: list[int], weight: list[int], *_, **__) -> int:
        return 2 * math.prod(rows) * weight[0]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_linear: by_onednn})
    with counter:
        job(Clock())
    attention = sum(n for what, n in counter.get_flop_counts()["Global"].items() if "attention" in str(what))
    return (counter.get_total_flops() - attention) // 2


def peak_mb() -> float:
    """Largest memory this process has ever had, in MB (10⁶ bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    paths = (Path(asked[name]) for name in ("inputs", "factors", "scores"))
    print(json.dumps(measure(Cell.from_json(asked["cell"]), *paths, count=asked["count"])))
