"""The processes of a job: those that torchrun has started, or one that serves itself."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
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
