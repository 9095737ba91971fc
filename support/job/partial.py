"""Sums that grow over the blocks of a shard, kept on disk with how far they have come."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from support.job.errors import StoreDamaged
from support.job.store import disk_full_is_told


def save_sums(path: Path, sums: dict[str, Tensor], blocks: int) -> None:
    """Write sums over so many blocks, whole or not at all. Raises `DiskFull`."""
    partial = path.with_name(f"{path.name}.partial")
    with disk_full_is_told(path.parent):
        try:
            tensors = {key: tensor.contiguous() for key, tensor in sums.items()}
            save_file(tensors, partial, metadata={"blocks": str(blocks)})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def blocks_in(path: Path) -> int:
    """How many blocks the saved sums are over; 0 when there is no file. Raises `StoreDamaged`."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            return int(file.metadata()["blocks"])
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def load_sums(path: Path, sums: dict[str, Tensor]) -> int:
    """Fill sums with the saved ones; the number of blocks they are over.

    Without a file they stay as they are, and it is 0. Raises `StoreDamaged`.
    """
    blocks = blocks_in(path)
    if not blocks:
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            for key, tensor in sums.items():
                tensor.copy_(file.get_tensor(key))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise _damaged(path, error) from error
    return blocks


def _damaged(path: Path, error: Exception) -> StoreDamaged:
    return StoreDamaged(
        f"{path.parent.name}/{path.name} can't be read ({error}). Remove it: its blocks are computed "
        "anew."
    )


def load_tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    """All tensors of a file. Raises `StoreDamaged`."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name).to(device) for name in names}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error
