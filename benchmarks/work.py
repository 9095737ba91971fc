"""What an engine is handed for one measurement, and what it hands back. Knows torch alone."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from benchmarks.inputs import Classifier, Reviews
from benchmarks.plan import BATCH_SIZE


@dataclass(frozen=True)
class Work:
    """The model, the reviews that train and the reviews asked about; `factors` is for a fit to fill.
    `precision` is our engine's."""

    classifier: Classifier
    train: Reviews
    test: Reviews
    factors: Path
    device: str = "cpu"
    precision: str = "full"
    batch_size: int = BATCH_SIZE


@dataclass
class Clock:
    """Seconds of the named parts of a job."""

    parts: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Done:
    """What a job leaves: scores, if it makes any, and how to keep its factors, if they are in memory."""

    scores: Tensor | None = None
    keep: Callable[[], None] = lambda: None


Job = Callable[[Clock], Done]
"""The timed part of a measurement. An engine's module has `JOBS`, which prepare one from `Work`."""
