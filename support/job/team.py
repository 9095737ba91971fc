"""The processes of a job: alone, or together under torchrun.

Both kinds answer the same questions, so that nothing else in a job knows how many there are.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from support.job.errors import BadSetting, ToldElsewhere

Result = TypeVar("Result")

PATIENCE = timedelta(days=7)
"""How long a process waits for the others: torchrun ends all of them when one is lost."""


@runtime_checkable
class Team(Protocol):
    """`rank` is this process's number, of `size`; `neighbours` of them share this machine."""

    rank: int
    size: int
    neighbours: int

    def on_first(self, work: Callable[[], Result]) -> Result:
        """What `work` returns in the first process, for all.

        An error is raised there as it is, in the others as `ToldElsewhere`. `work` must not ask the team
        for anything: the others would answer another question.
        """

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor, in every process, by its sum over all of them."""

    def hand_out(self, tensor: Tensor, owner: int) -> None:
        """Replace a tensor, in every process, by that of process `owner`."""

    def numbers(self, name: str) -> Iterator[int]:
        """0, 1, 2, …: each number goes to one process, the first that asks."""

    def tally(self, name: str, more: int = 0) -> int:
        """Add to a count that all share; what it then is."""

    def wait(self) -> None:
        """Until all are here."""


class Alone:
    """The only process."""

    rank, size, neighbours = 0, 1, 1

    def __init__(self) -> None:
        self._tallies: dict[str, int] = {}
        self._first = _Stage()

    def on_first(self, work: Callable[[], Result]) -> Result:
        with self._first:
            return work()

    def add_up(self, tensor: Tensor) -> None:
        pass

    def hand_out(self, tensor: Tensor, owner: int) -> None:
        pass

    def numbers(self, name: str) -> Iterator[int]:
        return count()

    def tally(self, name: str, more: int = 0) -> int:
        self._tallies[name] = self._tallies.get(name, 0) + more
        return self._tallies[name]

    def wait(self) -> None:
        pass


class Together:
    """One of several processes: sums and copies by gloo or nccl, counts in torchrun's own store."""

    def __init__(self, store: dist.Store, rank: int, size: int, neighbours: int) -> None:
        self._store = store
        self.rank, self.size, self.neighbours = rank, size, neighbours
        self._first = _Stage()

    def on_first(self, work: Callable[[], Result]) -> Result:
        answer: list = [None, None]
        error: Exception | None = None
        with self._first:
            if self.rank == 0:
                try:
                    answer[0] = work()
                except Exception as raised:
                    error, answer[1] = raised, str(raised)
            dist.broadcast_object_list(answer, src=0)
        if error is not None:
            raise error
        if answer[1] is not None:
            raise ToldElsewhere(answer[1])
        return answer[0]

    def add_up(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)

    def hand_out(self, tensor: Tensor, owner: int) -> None:
        dist.broadcast(tensor, src=owner)

    def numbers(self, name: str) -> Iterator[int]:
        while True:
            yield self._store.add(f"number/{name}", 1) - 1

    def tally(self, name: str, more: int = 0) -> int:
        return self._store.add(f"tally/{name}", more)

    def wait(self) -> None:
        dist.barrier()


class _Stage:
    """Work of the first process alone, which can't begin within itself."""

    def __init__(self) -> None:
        self._busy = False

    def __enter__(self) -> None:
        if self._busy:
            raise RuntimeError(
                "on_first within on_first: evaluate before what the inner one gives."
            )
        self._busy = True

    def __exit__(self, *_: object) -> None:
        self._busy = False


def is_launched_together() -> bool:
    """Whether torchrun, or something like it, has started this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def device() -> torch.device:
    """This process's own: a GPU of the machine where there is one, else the CPU.

    Raises `BadSetting` when there are more processes on the machine than GPUs.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if not gpus:
        return torch.device("cpu")
    if number >= gpus:
        raise BadSetting(f"This machine has {gpus} GPUs: use --nproc-per-node={gpus} at most.")
    return torch.device("cuda", number)


@contextmanager
def assembled() -> Iterator[Team]:
    """The team of this process: `Together` when torchrun has started it, else `Alone`."""
    if not is_launched_together():
        yield Alone()
        return
    here = device()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo",
        store=dist.PrefixStore("processes", store),
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
    )
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    try:
        yield Together(dist.PrefixStore("job", store), rank, size, neighbours)
    finally:
        dist.destroy_process_group()
