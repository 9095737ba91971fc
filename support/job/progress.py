"""How far all processes together have come, and when they will be done; the first process tells.

In a terminal it is one line that changes; elsewhere, where that would fill a log, a line now and then.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from support.job.team import Team


@contextmanager
def progress(
    team: Team, stage: str, total: int, before: int = 0, seconds: float | int = 60
) -> Iterator[Callable[[int], None]]:
    """Count the examples of one stage, `total` over all processes, `before` of them in an earlier run.

    Gives a function to call, in every process, with the number of examples it has done since. A line is
    written every `seconds`, and when the stage has ended.
    """
    start = last = time.monotonic()
    seconds, renew, end = (0.2, "\r\033[K", "") if sys.stderr.isatty() else (seconds, "", "\n")

    def say(done: int, end: str) -> None:
        line = told(stage, done, before, total, time.monotonic() - start)
        print(f"{renew}{line}", end=end, file=sys.stderr, flush=True)

    def add(examples: int) -> None:
        nonlocal last
        done = before + team.tally(stage, examples)
        if team.rank == 0 and done < total and time.monotonic() - last >= seconds:
            last = time.monotonic()
            say(done, end)

    if team.rank == 0 and 0 < before < total:
        print(f"{stage}: goes on at {before:,} of {total:,} examples", file=sys.stderr, flush=True)
    yield add
    if team.rank == 0:
        say(before + team.tally(stage), "\n")


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
