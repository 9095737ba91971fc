"""Whether the machine had other things to do while a measurement ran (on Linux; elsewhere unknown)."""

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STAT = Path("/proc/stat")
AT_WORK = (0, 1, 2, 5, 6, 7)
"""Columns of /proc/stat: user, nice, system, interrupts (two), and what a hypervisor took away."""


@contextmanager
def watched(record: dict) -> Iterator[None]:
    """Puts `others_cores`, the cores that other processes used on average meanwhile, into `record`."""
    before = _clocks()
    yield
    after = _clocks()
    if before and after:
        wall, everyone, ours = (b - a for a, b in zip(before, after, strict=True))
        record["others_cores"] = max(0.0, (everyone - ours) / wall)


def _clocks() -> tuple[float, float, float] | None:
    """Seconds now: wall, processor time of everyone, processor time of this process and its children."""
    if not STAT.exists():
        return None
    ticks = STAT.read_text().split("\n", 1)[0].split()[1:]
    everyone = sum(int(ticks[column]) for column in AT_WORK) / os.sysconf("SC_CLK_TCK")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.monotonic(), everyone, sum(u.ru_utime + u.ru_stime for u in used)
