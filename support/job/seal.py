"""Seals: beside a file, a digest of what was written there, of where that is, and of what it follows from.

A seal is written after its file: after a kill, a file with its seal is whole, and one without is made anew.
Seals tell damage and exchange, not forgery: whoever can write a file can write its seal.
"""

import hashlib
from pathlib import Path

from support.ekfac.storage import replacing

SUFFIX = ".seal"


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
