"""A job's results on disk: a folder that knows what it belongs to and takes each part whole.

- `results.zarr/`: what the job is about, as attributes, and the arrays
  `scores` (queries, training), one chunk per (query block, training block),
  `layer_scores` (layers, queries, training), with --by-layer,
  `self_influences` (training,), and
  `training_rows`, `query_rows`, the examples' rows in their splits;
- `curvature.safetensors`: the fit;
- `fit/`: the fit as far as it has come, gone when it is done;
- `tokens/`: the examples, tokenised.

Influences are missing as long as they are NaN. zarr writes a chunk to a file of another name and
renames it, and each chunk ends with a checksum: after a kill a part is there and right, or not there.
"""

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import zarr
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from zarr.codecs import Crc32cCodec, ZstdCodec

from support.job.errors import DiskFull, StepMissing, StoreBusy, StoreDamaged, StoreMismatch
from support.job.settings import refuse_unless_equal
from support.job.team import Team

FORMAT = "influence-job-1"
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Store:
    """The folder of one job. Arrays are those of `results.zarr`, `[queries, training]`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.curvature = self.folder / "curvature.safetensors"
        self.partial_fit = self.folder / "fit"
        self.tokens = self.folder / "tokens"

    @property
    def results(self) -> zarr.Group:
        """Raises `StepMissing` when there is no store yet, `StoreDamaged` for something else."""
        path = self.folder / "results.zarr"
        if not self.exists:
            raise StepMissing(f"There is no store at {self.folder}. Begin one with: fit --store …")
        try:
            group = zarr.open_group(path, mode="r+")
            version = group.attrs["format"]
        except (KeyError, ValueError, TypeError) as error:
            raise StoreDamaged(
                f"{path / 'zarr.json'} is not that of a job's results ({type(error).__name__}: "
                f"{error}). Name another --store."
            ) from error
        if version != FORMAT:
            raise StoreMismatch(
                f"{self.folder} has format {version!r}, expected {FORMAT!r}. Name another --store."
            )
        return group

    @property
    def exists(self) -> bool:
        return (self.folder / "results.zarr" / "zarr.json").exists()

    def refuse_other_folder(self) -> None:
        """Raise `StoreMismatch` when the folder holds anything, but no store."""
        if self.folder.exists() and not self.folder.is_dir():
            raise StoreMismatch(f"{self.folder} is a file. Name a folder.")
        ours = {"results.zarr", "locks", self.tokens.name, self.partial_fit.name}
        strange = [path.name for path in self.folder.glob("*") if path.name not in ours]
        if strange and not self.exists:
            raise StoreMismatch(
                f"{self.folder} holds other things ({strange[0]}) and no store. Name a new folder."
            )

    def begin(self) -> None:
        """Make the store, unless there is one already."""
        if self.exists:
            return
        with disk_full_is_told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            zarr.create_group(
                self.folder / "results.zarr", attributes={"format": FORMAT}, overwrite=True
            )

    def facts(self) -> dict[str, object]:
        """All attributes."""
        return dict(self.results.attrs)

    def get(self, name: str) -> object:
        """An attribute, None if it is not there yet."""
        return self.results.attrs.get(name)

    def settle(self, name: str, facts: Mapping[str, object] | int | str) -> None:
        """Write an attribute; if it is there already it must be the same, entry by entry.

        Raises `StoreMismatch`, naming the first entry that differs.
        """
        stored = self.get(name)
        if stored is None:
            with disk_full_is_told(self.folder):
                self.results.attrs[name] = facts
        else:
            refuse_unless_equal(name, stored, facts)

    def make_array(
        self,
        name: str,
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        dtype: str,
        dimensions: tuple[str, ...],
    ) -> None:
        """An array of missing influences, unless it is there; other chunks while it is empty only."""
        if name in self.results:
            array = self.array(name)
            if array.chunks == chunks or array.nchunks_initialized:
                return
        with disk_full_is_told(self.folder):
            self.results.create_array(
                name,
                shape=shape,
                chunks=chunks,
                overwrite=True,
                dtype=dtype,
                fill_value=np.nan,
                compressors=[ZstdCodec(level=3), Crc32cCodec()],
                dimension_names=dimensions,
            )

    def keep_rows(self, name: str, rows: np.ndarray) -> None:
        """Row numbers of examples, unless they are there: a kill may have left the array empty."""
        rows = np.asarray(rows, dtype=np.int64)
        if name not in self.results or not np.array_equal(self.results[name][:], rows):
            with disk_full_is_told(self.folder):
                self.results.create_array(name, data=rows, overwrite=True)

    def array(self, name: str) -> zarr.Array:
        """Raises `StepMissing`, naming the step that makes the array, and `StoreDamaged`."""
        try:
            if name in self.results:
                return self.results[name]
        except (KeyError, ValueError, TypeError) as error:
            raise StoreDamaged(
                f"The description of {name} in results.zarr is damaged ({error}). Remove the folder "
                f"{name} there and run its step again."
            ) from error
        raise StepMissing(f"{self.folder} has no {name} yet. {_MAKERS[name]}")

    def write(self, name: str, place: tuple[slice, ...], values: np.ndarray) -> None:
        """Whole chunks, or nothing of them. Raises `DiskFull`."""
        with disk_full_is_told(self.folder):
            self.array(name)[place] = values

    def read(self, name: str, place: tuple[slice, ...]) -> np.ndarray:
        """A part of an array, NaN where it is missing. Raises `StoreDamaged`."""
        array = self.array(name)
        try:
            return array[place]
        except (ValueError, RuntimeError) as error:
            raise StoreDamaged(
                f"A chunk of {name} at {_told(place)} is damaged ({error}). Run the step again: it is "
                "computed anew."
            ) from error

    def has(self, name: str, place: tuple[slice, ...]) -> bool:
        """Whether a chunk is there and whole."""
        first = tuple(slice(part.start, part.start + 1) for part in place)
        try:
            return not np.isnan(self.read(name, first)).any()
        except StoreDamaged:
            return False

    def _sweep(self) -> None:
        """Remove what a killed run left half written. Only while no other job is at work."""
        for pattern in ("results.zarr/**/*.partial", "*.partial", "fit/*.partial", "tokens/tmp*"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def forget_partial_fit(self) -> None:
        """The fit is done."""
        shutil.rmtree(self.partial_fit, ignore_errors=True)

    @contextmanager
    def claimed(self, team: Team) -> Iterator[None]:
        """The team is at work on the store, which is swept before. Raises `StoreBusy`.

        Every process holds a lock of its own, which the system takes away when the process ends, however
        it ends; the first, with its own in hand, looks whether any other is held.
        """
        folder = self.folder / "locks"
        own = FileLock(folder / f"rank-{team.rank}", timeout=0)

        def look() -> None:
            self.refuse_other_folder()
            with disk_full_is_told(self.folder):
                folder.mkdir(parents=True, exist_ok=True)
            with self._busy_is_told():
                own.acquire()
                for path in set(folder.glob("rank-*")) - {Path(own.lock_file)}:
                    with FileLock(path, timeout=0):
                        pass
            self._sweep()

        try:
            team.on_first(look)
            with self._busy_is_told():
                own.acquire()
            yield
        finally:
            own.release(force=True)

    @contextmanager
    def _busy_is_told(self) -> Iterator[None]:
        try:
            yield
        except Timeout as error:
            raise StoreBusy(
                f"Another job is at work on {self.folder}. Wait for it, stop it, or name another "
                "--store."
            ) from error


_MAKERS = {
    "scores": "Run: score",
    "layer_scores": "Only a store begun with score --by-layer keeps them.",
    "self_influences": "Run: self",
    "training_rows": "Run: fit",
    "query_rows": "Run: score",
}


@contextmanager
def disk_full_is_told(folder: Path) -> Iterator[None]:
    """Raises `DiskFull` where the system says that there is no room."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _means_full(error):
            raise
        raise DiskFull(
            f"No room left for {folder} ({error}). What is finished is kept: make room and run the "
            "same command again, it goes on from there."
        ) from error


def _means_full(error: OSError | SafetensorError) -> bool:
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    # safetensors hands the system's number on as text only.
    return any(f"(os error {number})" in str(error) for number in NO_ROOM)


def _told(place: tuple[slice, ...]) -> str:
    return ", ".join(f"{part.start}:{part.stop}" for part in place)
