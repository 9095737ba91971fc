"""One measurement in this process; prints one line of JSON. `running` calls it, in a fresh process.

    python -m benchmarks.measure '{"cell": …, "inputs": …, "factors": …, "scores": …}'

Loading the model and the reviews is not timed. The peak memory is that of the whole process,
loading included; `loaded_mb` is the peak before the job began.
"""

import importlib
import json
import resource
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import inputs
from benchmarks.plan import FIT, PYDVL, Cell
from benchmarks.work import Clock, Work

FITTED = "fitted"
"""File whose presence says that a fit went through and its factors are whole."""

MODEL_OPTIONS = {
    # Its per-example gradients go through vmap, which can't follow the branch on the mask in sdpa.
    PYDVL: {"attn_implementation": "eager"}
}


def measure(cell: Cell, folder: Path, factors: Path, scores: Path) -> dict:
    """Seconds, seconds of parts, peak memory in MB, and the path of the scores or None."""
    classifier, train, test = inputs.read(folder, **MODEL_OPTIONS.get(cell.engine, {}))
    factors.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        classifier(train.input_ids[:1, :16])  # thread pools start here, not in the timed part
    work = Work(classifier, train.first(cell.reviews), test.first(cell.queries), factors)
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
        "scores": None if done.scores is None else str(scores),
    }


def peak_mb() -> float:
    """Largest memory this process has ever had, in MB (10⁶ bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    paths = (Path(asked[name]) for name in ("inputs", "factors", "scores"))
    print(json.dumps(measure(Cell.from_json(asked["cell"]), *paths)))
