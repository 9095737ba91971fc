"""What a job's results look like to zarr, to the byte, what each of them follows from, and their seals.

A seal lies beside a file: a digest of what was written there, of where that is, and of what it follows from.
It is written after its file: after a kill, a file with its seal is whole, and one without is made anew.
Seals tell damage and exchange, not forgery: whoever can write a file can write its seal.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from support.ekfac.storage import replacing
from support.job.errors import StoreMismatch, damage_is_told

FORMAT = "influence-job-3"
FITTED = ("model", "config", "fitted_on")
SUMMED = (*FITTED, "subject", "shards")
OWN = (*FITTED, "subject", "training", "damping")
SCORED = (*OWN, "question", "queries")
ARRAYS = {
    "scores": (("query", "training"), SCORED, "Run: score"),
    "layer_scores": (("layer", "query", "training"), SCORED, "Only a first score --by-layer keeps them"),
    "self_influences": (("training",), OWN, "Run: self"),
    "sketches": (("training", "number"), OWN, "Run: index"),
    "sketch_scales": (("training",), OWN, "Run: index"),
    "training_rows": (("training",), ("training",), "Run: fit"),
    "query_rows": (("query",), ("queries",), "Run: score"),
}
"""Dimensions, the facts that the numbers follow from, who makes them."""
MISSING = {"int8": -128, "float32": np.nan, "float64": np.nan, "int64": -1}
"""What no value is: zarr writes no chunk that holds nothing else."""
Sizes = tuple[int, ...]

SUFFIX = ".seal"


def digest_of(facts: Mapping[str, object]) -> str:
    """Stands for these facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def described(facts: Mapping[str, object]) -> bytes:
    """The description of a group with these attributes and their seal."""
    facts = json.loads(json.dumps(facts))
    attributes = facts | {"seal": digest_of(facts)}
    return json.dumps({"attributes": attributes, "zarr_format": 3, "node_type": "group"}, indent=2).encode()


def begun(group: Path) -> bool:
    """Whether anything is there but what a kill left."""
    return any(path.suffix != ".partial" for path in group.glob("*"))


def facts_of(group: Path) -> dict[str, object]:
    """The attributes of a group, or those that one begins with. Raises `StoreMismatch` for another format,
    and `StoreDamaged`."""
    path, cure = group / "zarr.json", "Name another --store"
    if group.suffix != ".zarr":
        cure = f"Name another --question, or remove {group}"
    if not begun(group):
        return {"format": FORMAT}
    with damage_is_told(f"{group.name}/{path.name}", cure):
        content = path.read_bytes()
        facts = dict(json.loads(content)["attributes"])
        if facts["format"] != FORMAT:
            told = f"{group} has format {facts['format']!r}, expected {FORMAT!r}"
            raise StoreMismatch(f"{told}. Name another --store.")
        facts.pop("seal")
        if content != described(facts):
            raise ValueError("its seal differs")
    return facts


@lru_cache
def array(name: str, shape: Sizes, chunks: Sizes, dtype: str) -> bytes:
    """The description of an array. Raises `KeyError`, `TypeError` and `ValueError` for what none can be."""
    kept: dict = {}
    how = {"compressors": [ZstdCodec(level=3), Crc32cCodec()], "fill_value": MISSING[dtype]}
    sizes = {"shape": shape, "chunks": tuple(map(min, shape, chunks)), "dtype": dtype}
    zarr.create_array(kept, **sizes, **how, dimension_names=ARRAYS[name][0])
    return kept["zarr.json"].to_bytes()


def seal(folder: Path, place: str, of: str) -> None:
    """Vouch for the file at this place in a folder, as it is now; `of` stands for what it follows from."""
    with replacing(folder / f"{place}{SUFFIX}") as fresh:
        fresh.write_bytes(_digest(folder, place, of))


def sealed(folder: Path, place: str, of: str) -> bool:
    """Whether the file is there as it was when it was sealed, at this place, and follows from the same."""
    kept = folder / f"{place}{SUFFIX}"
    return kept.is_file() and (folder / place).is_file() and kept.read_bytes() == _digest(folder, place, of)


def _digest(folder: Path, place: str, of: str) -> bytes:
    begun = hashlib.sha256(f"{of} {place}\n".encode())
    with (folder / place).open("rb") as file:
        return hashlib.file_digest(file, lambda: begun).hexdigest().encode()
