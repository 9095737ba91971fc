"""Saving and loading a fitted curvature: one safetensors file, its identity in the metadata."""

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from support.ekfac.blocks import Block
from support.ekfac.curvature import Eigenbasis, LayerCurvature
from support.ekfac.errors import DamagedFile, WrongModel

Probe = tuple[Block, torch.Tensor]
"""Two short examples and the model's outputs for them."""

PROBE, PROBE_OUTPUTS = "probe inputs/", "probe outputs"
FORMAT = "ekfac-curvature-2"
BASIS_PARTS = ("activation", "output_gradient", "activation_eigenvalues", "output_gradient_eigenvalues")


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
    probe: Probe | None,
) -> None:
    """Write the curvature of every layer; a file of that name is replaced only when all is written."""
    tensors = {}
    if probe is not None:
        inputs, outputs = probe[0].inputs, probe[1]
        named = inputs if isinstance(inputs, Mapping) else {"": inputs}
        tensors |= {f"{PROBE}{name}": part.contiguous() for name, part in named.items()}
        tensors[PROBE_OUTPUTS] = outputs.contiguous()
    for name, layer in curvature.items():
        tensors[f"{name}/eigenvalues"] = layer.eigenvalues.contiguous()
        for part in BASIS_PARTS:
            tensors[f"{name}/{part}"] = getattr(layer.basis, part).contiguous()
    write(path, tensors, {"format": FORMAT, **identity, "examples": str(examples)})


def write(path: str | Path, tensors: dict[str, torch.Tensor], told: dict[str, str]) -> None:
    """A safetensors file of these, whole or not at all, what is told of them, and a checksum over both."""
    with replacing(path) as fresh:
        save_file(tensors, fresh, metadata=told | {"digest": digest(tensors, told)})


def put_aside(layer: LayerCurvature) -> LayerCurvature:
    """The same in nameless temporary files: memory holds of them what is in use and what it has room for."""

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        with tempfile.NamedTemporaryFile() as file:
            tensor.cpu().numpy().tofile(file)
            read = torch.from_file(file.name, size=tensor.numel(), dtype=tensor.dtype)
        return read.view(tensor.shape)

    # An eigenbasis keeps its vectors as columns.
    vectors = (kept(part.T).T for part in (layer.basis.activation, layer.basis.output_gradient))
    values = (
        kept(part) for part in (layer.basis.activation_eigenvalues, layer.basis.output_gradient_eigenvalues)
    )
    return LayerCurvature(Eigenbasis(*vectors, *values, layer.basis.products), kept(layer.eigenvalues))


@dataclass(frozen=True)
class Saved:
    """What a file holds that `save` wrote, as it was written."""

    name: str
    metadata: dict[str, str]
    tensors: dict[str, torch.Tensor]

    @property
    def examples(self) -> int:
        """How many examples are behind the curvature."""
        return int(self.metadata["examples"])

    def refuse_others(self, expected: dict[str, str], cure: str) -> None:
        """Raise `WrongModel` when the identity that was saved is not the expected one."""
        for key, value in expected.items():
            if self.metadata.get(key) != value:
                raise WrongModel(
                    f"{self.name} was fitted with {key} {self.metadata.get(key)!r}, but here it is "
                    f"{value!r}. {cure}"
                )

    def curvature(self, expected: dict[str, str]) -> dict[str, LayerCurvature]:
        """The curvature of every layer, from input to output. Raises as `refuse_others`."""
        self.refuse_others(expected, "Fit this one.")
        return {
            name: LayerCurvature(
                Eigenbasis(*(self.tensors[f"{name}/{part}"] for part in BASIS_PARTS)),
                self.tensors[f"{name}/eigenvalues"],
            )
            for name in json.loads(expected["layers"])
        }

    def probe(self) -> Probe | None:
        """Two examples and what the model said of them, if it was asked."""
        if PROBE_OUTPUTS not in self.tensors:
            return None
        outputs = self.tensors[PROBE_OUTPUTS]
        named = {key.removeprefix(PROBE): x for key, x in self.tensors.items() if key.startswith(PROBE)}
        return Block(list(range(len(outputs))), named.get("", named), None), outputs


def read(path: str | Path, format: str | None = None, cure: str = "Fit again and save.") -> Saved:
    """A file that `write` wrote, of a curvature if no `format` is named. Raises `DamagedFile` when it is
    absent, truncated, altered or of another format."""
    name = Path(path).name
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DamagedFile(f"{name} can't be read ({error}). {cure}") from error
    if metadata.get("format") != (format := format or FORMAT):
        raise DamagedFile(f"{name} has format {metadata.get('format')!r}, expected {format!r}. {cure}")
    told = {key: value for key, value in metadata.items() if key != "digest"}
    if metadata.get("digest") != digest(tensors, told):
        raise DamagedFile(f"{name} was altered after it was saved (its checksum differs). {cure}")
    return Saved(name, metadata, tensors)


def model_fingerprint(model: nn.Module) -> str:
    """Hexadecimal SHA-256 over names, types, shapes and values of all parameters and buffers."""
    return digest({name: part for name, part in model.state_dict().items() if isinstance(part, torch.Tensor)})


def digest(tensors: dict[str, torch.Tensor], told: Mapping[str, str] = MappingProxyType({})) -> str:
    """Hexadecimal SHA-256 over names, types, shapes and values, and over what is told of them."""
    found = hashlib.sha256(repr(sorted(told.items())).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
