"""Sums that grow over the blocks of a shard, kept on disk with how far they have come."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from support.ekfac.storage import digest
from support.job.errors import StoreDamaged
from support.job.store import disk_full_is_told

Tensors = dict[str, Tensor]


def save_sums(path: Path, sums: Tensors, blocks: int) -> None:
    """Write sums over so many blocks, whole or not at all. Raises `DiskFull`."""
    partial = path.with_name(f"{path.name}.partial")
    with disk_full_is_told(path.parent):
        try:
            tensors = {key: tensor.contiguous() for key, tensor in sums.items()}
            told = {"blocks": str(blocks), "digest": digest(tensors)}
            save_file(tensors, partial, metadata=told)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def blocks_in(path: Path) -> int:
    """How many blocks the saved sums are over; 0 when there is no file. Raises `StoreDamaged`."""
    if not path.exists():
        return 0
    with _damage_is_told(path), safe_open(path, framework="pt") as file:
        return int(file.metadata()["blocks"])


def load_sums(path: Path, sums: Tensors) -> int:
    """Fill sums with the saved ones; the number of blocks they are over.

    Without a file they stay as they are, and it is 0. Raises `StoreDamaged`.
    """
    if not path.exists():
        return 0
    found = load_tensors(path)
    with _damage_is_told(path):
        for key, tensor in sums.items():
            tensor.copy_(found[key])
    return blocks_in(path)


def load_tensors(path: Path) -> Tensors:
    """All tensors of a file, on the CPU. Raises `StoreDamaged`."""
    with _damage_is_told(path), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if file.metadata()["digest"] != digest(tensors):
            raise ValueError("its checksum differs")
        return tensors


@contextmanager
def _damage_is_told(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise StoreDamaged(
            f"{path.parent.name}/{path.name} can't be read ({error}). Remove it: its blocks are "
            "computed anew."
        ) from error
