"""How far all processes together have come, and when they will be done; the first process tells.

In a terminal it is a bar; elsewhere, where a bar would fill a log, a line now and then.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from threading import Event, Thread
from types import TracebackType

from tqdm import tqdm

from support.ekfac.blocks import Block
from support.job.team import Team

LOOKS = 0.5
"""Seconds between two looks at the count."""


class Progress:
    """Counts examples of one stage of a job, `total` over all processes, `before` of them in an
    earlier run. A context: the count is shown while it is open.
    """

    def __init__(
        self, team: Team, stage: str, total: int, before: int = 0, seconds: float | int = 60
    ):
        self.team, self.stage, self.total, self.before = team, stage, total, before
        self.seconds = seconds
        self._over = Event()
        self._teller: Thread | None = None

    def __enter__(self) -> "Progress":
        if self.team.rank == 0:
            tell = self._draw if sys.stderr.isatty() else self._write
            self._teller = Thread(target=tell, daemon=True)
            self._teller.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._teller is not None:
            self._teller.join()

    def add(self, examples: int) -> None:
        """So many examples more are done, by this process."""
        self.team.tally(self.stage, examples)

    def blocks(self, items: Iterable, description: str, unit: str) -> Iterator:
        """An engine's bar: counts the examples of each block when the next one is asked for."""
        for item in items:
            yield item
            if isinstance(item, Block):
                self.add(len(item.rows))

    def done(self) -> int:
        """Examples that all processes have done, with those of earlier runs."""
        return self.before + self.team.tally(self.stage)

    def _draw(self) -> None:
        with tqdm(
            total=self.total, initial=self.before, desc=self.stage, unit="example", smoothing=0.05
        ) as bar:
            self._until_over(lambda done: bar.update(done - bar.n), LOOKS)

    def _write(self) -> None:
        start = time.monotonic()
        if 0 < self.before < self.total:
            goes_on = f"{self.stage}: goes on at {self.before:,} of {self.total:,} examples"
            print(goes_on, file=sys.stderr, flush=True)

        def line(done: int) -> None:
            seconds = time.monotonic() - start
            print(told(self.stage, done, self.before, self.total, seconds), file=sys.stderr)
            sys.stderr.flush()

        self._until_over(line, self.seconds)

    def _until_over(self, tell: Callable[[int], object], seconds: float | int) -> None:
        while not self._over.wait(seconds):
            tell(self.done())
        tell(self.done())


def told(stage: str, done: int, before: int, total: int, seconds: float | int) -> str:
    """One line: how many examples of how many, how fast, when the end will be."""
    share = f"{stage}: {done:,} of {total:,} examples ({done / max(total, 1):.0%})"
    new = done - before
    if done >= total or not new:
        return f"{share}, {seconds:.0f} s"
    speed = new / seconds
    left = timedelta(seconds=round((total - done) / speed))
    end = (datetime.now() + left).strftime("%a %H:%M")
    return f"{share}, {speed:.1f} a second, {left} left: until {end}"
