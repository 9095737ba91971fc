"""The processes of a job: those that torchrun has started, or one that serves itself; how far all
together have come, and when they will be done."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from support.job.errors import BadSetting, ToldElsewhere

Result = TypeVar("Result")

PATIENCE = timedelta(days=7)
"""How long a process waits for the others: torchrun ends all of them when one is lost."""


class Team:
    """Process number `rank` of `size` that count together in a `store`; `neighbours` share this machine."""

    def __init__(self, store: dist.Store) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self._store = store
        self._on_first = False

    def on_first(self, work: Callable[[], Result]) -> Result:
        """What `work` returns in the first process, for all. An error is `ToldElsewhere` in the others.

        `work` must not ask the team for anything: the others would answer another question.
        """
        if self._on_first:
            raise RuntimeError("on_first within on_first: evaluate before what the inner one gives.")
        answer: list = [None, None]
        error: Exception | None = None
        self._on_first = True
        try:
            answer[0] = work() if self.rank == 0 else None
        except Exception as raised:
            error, answer[1] = raised, str(raised)
        self._on_first = False
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise error or ToldElsewhere(answer[1])
        return answer[0]

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor, in every process, by its sum over all of them."""
        dist.all_reduce(tensor)

    def shared(self, name: str, items: Sequence[Result]) -> Iterator[Result]:
        """Each of the items, in order, to one process: whoever is free takes the next."""
        while (number := self.tally(f"shared {name}", 1) - 1) < len(items):
            yield items[number]

    def tally(self, name: str, more: int = 0) -> int:
        """Add to a count that all share; what it then is."""
        return self._store.add(name, more)

    def wait(self) -> None:
        """Until all are here."""
        dist.barrier()


def device() -> torch.device:
    """A GPU of this process's own, or the CPU. Raises `BadSetting` when there are too few GPUs."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if not gpus:
        return torch.device("cpu")
    if number >= gpus:
        raise BadSetting(f"This machine has {gpus} GPUs: use --nproc-per-node={gpus} at most.")
    return torch.device("cuda", number)


@contextmanager
def assembled() -> Iterator[Team]:
    """The team of this process. Raises `BadSetting` as `device` does."""
    here = device()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    store, rank, size, backend = dist.HashStore(), 0, 1, "gloo"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
    processes = dist.PrefixStore("processes", store)
    dist.init_process_group(backend, store=processes, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield Team(dist.PrefixStore("job", store))
    finally:
        dist.destroy_process_group()


@contextmanager
def progress(
    team: Team, stage: str, total: int, before: int = 0, seconds: float | int = 60
) -> Iterator[Callable[[int], None]]:
    """Count the examples of one stage, `total` over all processes, `before` of them in an earlier run.

    Gives a function to call, in every process, with the number of examples it has done since. The first
    tells: in a terminal it is one line that changes; elsewhere, where that would fill a log, a line every
    `seconds`, and when the stage has ended.
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
