"""How far all processes together have come, and when they will be done; the first process tells.

In a terminal it is a bar; elsewhere, where a bar would fill a log, a line now and then.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from tqdm import tqdm

from support.job.team import Team


@contextmanager
def progress(
    team: Team, stage: str, total: int, before: int = 0, seconds: float | int = 60
) -> Iterator[Callable[[int], None]]:
    """Count the examples of one stage, `total` over all processes, `before` of them in an earlier run.

    Gives a function that is to be called, in every process, with the number of examples it has done
    since. Every `seconds`, then, a line is written; the last one when the stage has ended.
    """
    start = last = time.monotonic()
    in_terminal = sys.stderr.isatty()
    writes = team.rank == 0 and not in_terminal
    hidden = team.rank > 0 or not in_terminal
    bar = tqdm(desc=stage, total=total, initial=before, unit="example", disable=hidden)

    def tell(done: int) -> None:
        nonlocal last
        last = time.monotonic()
        line = told(stage, done, before, total, last - start)
        print(line, file=sys.stderr, flush=True)

    def add(examples: int) -> None:
        done = before + team.tally(stage, examples)
        bar.update(done - bar.n)
        if writes and done < total and time.monotonic() - last >= seconds:
            tell(done)

    if writes and 0 < before < total:
        goes_on = f"{stage}: goes on at {before:,} of {total:,} examples"
        print(goes_on, file=sys.stderr, flush=True)
    with bar:
        yield add
        add(0)
    if writes:
        tell(before + team.tally(stage))


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
