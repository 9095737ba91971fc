"""Fitted curvature kept under a key of its content, so that the next notebook waits seconds.

The key covers the model's weights, the tracked layers, every input row up to its last real token and the
settings of the fit, so a cached file is never stale. λ, on which no curvature depends, is not part of it.
"""

import hashlib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from support.ekfac import EkfacInfluence
from support.ekfac.batches import count_of, unlabelled
from support.ekfac.errors import DamagedFile, WrongModel

CACHE_VARIABLE = "SUPPORT_CACHE"


class CacheDamaged(UserWarning):
    """A cached file could not be read and was computed again."""


def cache_folder() -> Path:
    """Where fitted curvature is kept: `$SUPPORT_CACHE`, or `~/.cache/influence-notebooks`."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "influence-notebooks")


FIT = 2
"""To be raised when the same settings give another curvature than before."""


def fit_or_load(engine: EkfacInfluence, loader: Iterable, folder: Path | None = None) -> EkfacInfluence:
    """`engine.fit(loader)`, or its result from the cache if the same fit was made before. A damaged file is
    told by a `CacheDamaged` warning and computed again. Raises as `fit` does."""
    path = (folder or cache_folder()) / f"{_content_key(engine, loader)}.safetensors"
    try:
        return engine.load_curvature(path)
    except DamagedFile as error:
        if path.exists():
            warnings.warn(CacheDamaged(f"{error} Computing it again."), stacklevel=2)
    except WrongModel:
        pass  # the same weights, put to another use
    engine.fit(loader).save(path)
    return engine


def _content_key(engine: EkfacInfluence, loader: Iterable) -> str:
    digest = hashlib.sha256(f"{FIT} {sorted(engine.identity().items())}".encode())
    for inputs, _ in unlabelled(loader):
        mask = engine.passes.token_mask(inputs)
        for row in range(count_of(inputs)):
            real = slice(None) if mask is None else slice(int(mask[row].nonzero().max()) + 1)
            for part in [inputs] if isinstance(inputs, torch.Tensor) else inputs.values():
                read = part[row, real] if mask is not None and part.shape[:2] == mask.shape else part[row]
                digest.update(f"{read.dtype} {tuple(read.shape)} ".encode())
                digest.update(read.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
