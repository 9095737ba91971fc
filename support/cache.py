"""Fitted curvature kept under a key of its content, so that the next notebook waits seconds.

The key covers the model's weights, the tracked layers, every input row without its padding and the
settings of the fit, so a cached file is never stale. λ, on which no curvature depends, is not part of it.
"""

import hashlib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from support.ekfac import EkfacInfluence
from support.ekfac.errors import DamagedFile

CACHE_VARIABLE = "SUPPORT_CACHE"


class CacheDamaged(UserWarning):
    """A cached file could not be read and was computed again."""


def cache_folder() -> Path:
    """Where fitted curvature is kept: `$SUPPORT_CACHE`, or `~/.cache/influence-notebooks`."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "influence-notebooks")


def fit_or_load(engine: EkfacInfluence, loader: Iterable, folder: Path | None = None) -> EkfacInfluence:
    """`engine.fit(loader)`, or its result from the cache if the same fit was made before.

    A damaged file is told by a `CacheDamaged` warning and computed again. Raises as `fit` does.
    """
    path = (folder or cache_folder()) / f"{_content_key(engine, loader)}.safetensors"
    if path.exists():
        try:
            return engine.load_curvature(path)
        except DamagedFile as error:
            warnings.warn(CacheDamaged(f"{error} Computing it again."), stacklevel=2)
    engine.fit(loader).save(path)
    return engine


def _content_key(engine: EkfacInfluence, loader: Iterable) -> str:
    digest = hashlib.sha256(repr(sorted(engine.identity().items())).encode())
    token_mask = getattr(engine.model, "token_mask", lambda inputs: torch.ones_like(inputs).bool())
    for inputs, *_ in loader:
        for row, mask in zip(inputs, token_mask(inputs), strict=True):
            real = row[mask].cpu()
            digest.update(f"{real.dtype} {len(real)} ".encode())
            digest.update(real.view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
