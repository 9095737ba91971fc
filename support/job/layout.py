"""What a job's results look like to zarr, to the byte, and what each of them follows from."""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

FORMAT = "influence-job-3"
FITTED = ("model", "config", "fitted_on")
SUMMED = (*FITTED, "subject", "shards")
OWN = (*FITTED, "subject", "training", "damping")
SCORED = (*OWN, "question", "queries")
ARRAYS = {
    "scores": (("query", "training"), SCORED, "Run: score"),
    "layer_scores": (("layer", "query", "training"), SCORED, "Only a first score --by-layer keeps them"),
    "self_influences": (("training",), OWN, "Run: self"),
    "training_rows": (("training",), ("training",), "Run: fit"),
    "query_rows": (("query",), ("queries",), "Run: score"),
}
"""Dimensions, the facts that the numbers follow from, who makes them."""
MISSING = {"float32": np.nan, "float64": np.nan, "int64": -1}
"""What no value is: zarr writes no chunk that holds nothing else."""
Sizes = tuple[int, ...]


def digest_of(facts: Mapping[str, object]) -> str:
    """Stands for these facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def group(facts: Mapping[str, object]) -> bytes:
    """The description of a group with these attributes and their seal."""
    facts = json.loads(json.dumps(facts))
    attributes = facts | {"seal": digest_of(facts)}
    return json.dumps({"attributes": attributes, "zarr_format": 3, "node_type": "group"}, indent=2).encode()


@lru_cache
def array(name: str, shape: Sizes, chunks: Sizes, dtype: str) -> bytes:
    """The description of an array. Raises `KeyError`, `TypeError` and `ValueError` for what none can be."""
    kept: dict = {}
    how = {"compressors": [ZstdCodec(level=3), Crc32cCodec()], "fill_value": MISSING[dtype]}
    sizes = {"shape": shape, "chunks": tuple(map(min, shape, chunks)), "dtype": dtype}
    zarr.create_array(kept, **sizes, **how, dimension_names=ARRAYS[name][0])
    return kept["zarr.json"].to_bytes()
