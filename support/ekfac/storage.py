"""Saving and loading a fitted curvature: one safetensors file, its identity in the metadata."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from support.ekfac.curvature import Eigenbasis, LayerCurvature
from support.ekfac.errors import DamagedFile, WrongModel

FORMAT = "ekfac-curvature-1"
BASIS_PARTS = (
    "activation",
    "output_gradient",
    "activation_eigenvalues",
    "output_gradient_eigenvalues",
)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place when all is written, and only then.

    Its name is nobody else's, so that two processes may write one file; whoever is last wins. It ends
    in `.partial`, by which one finds what a killed process left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    try:
        yield fresh
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def save(
    path: str | Path,
    curvature: dict[str, LayerCurvature],
    identity: dict[str, str],
    examples: int,
) -> None:
    """Write the curvature of every layer; a file of that name is replaced only when all is written."""
    tensors = {}
    for name, layer in curvature.items():
        tensors[f"{name}/eigenvalues"] = layer.eigenvalues
        for part in BASIS_PARTS:
            tensors[f"{name}/{part}"] = getattr(layer.basis, part)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        **identity,
        "examples": str(examples),
        "digest": digest(tensors),
    }
    with replacing(path) as fresh:
        save_file(tensors, fresh, metadata=metadata)


def load(path: str | Path, expected: dict[str, str]) -> tuple[dict[str, LayerCurvature], int]:
    """The curvature of every layer, from input to output, and the number of examples behind it.

    Raises `DamagedFile` when the file is absent, truncated, altered or of another format, and
    `WrongModel` when its identity is not the expected one.
    """
    metadata, tensors = _read(path)
    name_of_file = Path(path).name
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise WrongModel(
                f"{name_of_file} was fitted with {key} {metadata.get(key)!r}, but here it is "
                f"{value!r}. Fit this one."
            )
    if metadata.get("digest") != digest(tensors):
        raise DamagedFile(
            f"{name_of_file} was altered after it was saved (its checksum differs). "
            "Fit again and save."
        )
    curvature = {
        name: LayerCurvature(
            Eigenbasis(*(tensors[f"{name}/{part}"] for part in BASIS_PARTS)),
            tensors[f"{name}/eigenvalues"],
        )
        for name in expected["layers"].split(", ")
    }
    return curvature, int(metadata["examples"])


def identity(path: str | Path) -> dict[str, str]:
    """What the file says of the engine that was saved. Raises `DamagedFile` as `load` does."""
    return _read(path)[0]


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DamagedFile(
            f"{Path(path).name} can't be read ({error}). Fit again and save."
        ) from error
    if metadata.get("format") != FORMAT:
        raise DamagedFile(
            f"{Path(path).name} has format {metadata.get('format')!r}, expected {FORMAT!r}. "
            "Fit again and save."
        )
    return metadata, tensors


def model_fingerprint(model: nn.Module) -> str:
    """Hexadecimal SHA-256 over names, types, shapes and values of all parameters and buffers."""
    return digest(dict(model.state_dict()))


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Hexadecimal SHA-256 over names, types, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
