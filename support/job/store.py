"""A job's results on disk: a folder that knows what it belongs to and takes each part whole.

- `results.zarr/`: what the job is about, as attributes, and the arrays `scores` (queries, training), one
  chunk per (query group, training block), `layer_scores` (layers, queries, training), with --by-layer,
  `self_influences` (training,), and `training_rows`, `query_rows`, the examples' rows in their splits;
- `curvature.safetensors`: the fit;
- `fit/`: the fit as far as it has come, gone when it is done;
- `tokens/`: the examples, tokenised;
- `locks/`: one for each process at work.

What is written takes its place when it is whole, with a checksum: after a kill it is there, or not there.
An influence that is not there is NaN; none that is there can be, the engine refuses it.
"""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import torch
import zarr
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from zarr.codecs import Crc32cCodec, ZstdCodec

from support.ekfac.storage import digest, replacing
from support.job.errors import DiskFull, StepMissing, StoreBusy, StoreDamaged, StoreMismatch
from support.job.settings import refuse_unless_equal
from support.job.team import Team

FORMAT = "influence-job-1"
HALF_WRITTEN = ("results.zarr/**/*.partial", "*.partial", "fit/*.partial", "tokens/tmp*")
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
Sizes = tuple[int, ...]
DIMENSIONS = ("layer", "query", "training")
MAKERS = {
    "scores": "Run: score",
    "layer_scores": "Only a store begun with score --by-layer keeps them",
    "self_influences": "Run: self",
}


class Store:
    """The folder of one job."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.curvature = self.folder / "curvature.safetensors"
        self.partial_fit = self.folder / "fit"
        self.tokens = self.folder / "tokens"
        self._results = self.folder / "results.zarr"

    @property
    def exists(self) -> bool:
        return (self._results / "zarr.json").exists()

    @property
    def results(self) -> zarr.Group:
        """Raises `StepMissing` when there is no store yet, `StoreDamaged`, `StoreMismatch`."""
        if not self.exists:
            raise StepMissing(f"There is no store at {self.folder}. Begin one with: fit --store …")
        try:
            group = zarr.open_group(self._results, mode="r+")
            version = group.attrs["format"]
        except (KeyError, ValueError, TypeError) as error:
            told = f"{self._results / 'zarr.json'} is not that of a job's results"
            raise StoreDamaged(f"{told} ({type(error).__name__}: {error}). Name another --store.") from error
        if version != FORMAT:
            told = f"{self.folder} has format {version!r}, expected {FORMAT!r}"
            raise StoreMismatch(f"{told}. Name another --store.")
        return group

    def begin(self) -> None:
        """Make the store, unless there is one already. Raises `DiskFull`."""
        if not self.exists:
            with disk_full_is_told(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                zarr.create_group(self._results, attributes={"format": FORMAT}, overwrite=True)

    def facts(self) -> dict[str, object]:
        """All attributes."""
        return dict(self.results.attrs)

    def settle(self, facts: Mapping[str, object]) -> None:
        """Write attributes. Raises `StoreMismatch`, and writes none, when the store has another one."""
        stored = self.facts()
        for name, fact in facts.items():
            refuse_unless_equal(name, stored.get(name, fact), fact)
        if facts.keys() - stored.keys():
            with disk_full_is_told(self.folder):
                self.results.attrs.update(facts)

    def make_array(self, name: str, shape: Sizes, chunks: Sizes, dtype: str | torch.dtype) -> None:
        """An array of missing influences, unless it is there; other chunks while it is empty only."""
        if name in self.results:
            array = self.array(name)
            if array.chunks == chunks or array.nchunks_initialized:
                return
        layout = {"shape": shape, "chunks": chunks, "dimension_names": DIMENSIONS[-len(shape) :]}
        kind = {"dtype": str(dtype).removeprefix("torch."), "fill_value": np.nan}
        compressors = [ZstdCodec(level=3), Crc32cCodec()]
        with disk_full_is_told(self.folder):
            self.results.create_array(name, overwrite=True, compressors=compressors, **layout, **kind)

    def keep_rows(self, name: str, rows: np.ndarray) -> None:
        """Row numbers of examples. They are written again each time: a kill may have left none."""
        with disk_full_is_told(self.folder):
            self.results.create_array(name, data=np.asarray(rows, dtype=np.int64), overwrite=True)

    def array(self, name: str) -> zarr.Array:
        """Raises `StepMissing`, naming the step that makes the array, and `StoreDamaged`."""
        try:
            if name in self.results:
                return self.results[name]
        except (KeyError, ValueError, TypeError) as error:
            told = f"The description of {name} in results.zarr is damaged ({error})"
            raise StoreDamaged(f"{told}. Remove the folder {name} there and run its step again.") from error
        raise StepMissing(f"{self.folder} has no {name} yet. {MAKERS[name]}")

    def write(self, name: str, place: tuple[range, ...], values: np.ndarray) -> None:
        """Whole chunks, or nothing of them; `place` is in the last dimensions. Raises `DiskFull`."""
        with disk_full_is_told(self.folder):
            self.array(name)[_part(place)] = values

    def read(self, name: str, place: tuple[range, ...]) -> np.ndarray:
        """A part of an array. Raises `StepMissing` when not all of it is there, and `StoreDamaged`."""
        array = self.array(name)
        try:
            found = array[_part(place)]
        except (ValueError, RuntimeError) as error:
            told = (
                f"A chunk of {name} at {', '.join(f'{part.start}:{part.stop}' for part in place)} is damaged"
            )
            raise StoreDamaged(f"{told} ({error}). Run the step again: it is computed anew.") from error
        if np.isnan(found).any():
            raise StepMissing(f"Not all {name} are there yet. {MAKERS[name]}. It goes on where it was.")
        return found

    def has(self, name: str, place: tuple[range, ...]) -> bool:
        """Whether a part of an array is there and whole."""
        try:
            self.read(name, place)
        except (StepMissing, StoreDamaged):
            return False
        return True

    def progress(self) -> dict[str, str]:
        """How far each step is, in words. Raises `StoreDamaged`."""
        return {"fit": self._fitted(), "score": self._share("scores"), "self": self._share("self_influences")}

    def _fitted(self) -> str:
        if self.curvature.exists():
            return "done"
        for sums in ("eigenvalues", "covariances"):
            blocks = sum(map(blocks_in, self.partial_fit.glob(f"{sums}-*.safetensors")))
            if blocks:
                return f"{sums} of {blocks} block{'s' if blocks > 1 else ''}"
        return "begun" if self.partial_fit.exists() else "not yet"

    def _share(self, name: str) -> str:
        if name not in self.results:
            return "not yet"
        array = self.array(name)
        places = list(product(*map(in_blocks, array.shape, array.chunks)))
        done = sum(self.has(name, place) for place in places)
        return "done" if done == len(places) else f"{done} of {len(places)} blocks"

    @contextmanager
    def claimed(self, team: Team) -> Iterator[None]:
        """The team is at work on the store; what a killed run left half written is removed before.

        Every process holds a lock, which the system takes away when the process ends, however it ends; the
        first looks whether any other is held. Raises `StoreBusy`, and `StoreMismatch` for a folder of others.
        """
        folder = self.folder / "locks"
        own = FileLock(folder / f"rank-{team.rank}", timeout=0)

        def look() -> None:
            if self.folder.exists() and not self.folder.is_dir():
                raise StoreMismatch(f"{self.folder} is a file. Name a folder.")
            ours = {self._results.name, "locks", self.tokens.name, self.partial_fit.name}
            strange = [path.name for path in self.folder.glob("*") if path.name not in ours]
            if strange and not self.exists:
                told = f"{self.folder} holds other things ({strange[0]}) and no store"
                raise StoreMismatch(f"{told}. Name a new folder.")
            with disk_full_is_told(self.folder):
                folder.mkdir(parents=True, exist_ok=True)
            own.acquire()
            for path in set(folder.glob("rank-*")) - {Path(own.lock_file)}:
                with FileLock(path, timeout=0):
                    pass
            for pattern in HALF_WRITTEN:
                for path in self.folder.glob(pattern):
                    path.unlink(missing_ok=True)

        try:
            team.on_first(look)
            own.acquire()
            yield
        except Timeout as error:
            told = f"Another job is at work on {self.folder}. Wait for it, stop it, or name another --store."
            raise StoreBusy(told) from error
        finally:
            own.release(force=True)


def in_blocks(examples: int, size: int) -> list[range]:
    """0 … examples − 1 in ranges of `size`, the last one maybe shorter."""
    return [range(start, min(start + size, examples)) for start in range(0, examples, size)]


def _part(place: tuple[range, ...]) -> tuple:
    return (..., *(slice(part.start, part.stop) for part in place))


def save_sums(path: Path, sums: Mapping[str, Tensor], blocks: int) -> None:
    """Write tensors, sums over so many blocks of examples. Raises `DiskFull`."""
    tensors = {key: tensor.contiguous() for key, tensor in sums.items()}
    about = {"blocks": str(blocks), "digest": digest(tensors)}
    with disk_full_is_told(path.parent), replacing(path) as fresh:
        save_file(tensors, fresh, metadata=about)


def load_sums(path: Path, header_only: bool = False) -> tuple[dict[str, Tensor], int]:
    """Saved tensors and the number of blocks they are over; none without a file. Raises `StoreDamaged`."""
    if not path.exists():
        return {}, 0
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            names = () if header_only else file.keys()
            found = {name: file.get_tensor(name) for name in names}
        if not header_only and about["digest"] != digest(found):
            raise ValueError("its checksum differs")
        return found, int(about["blocks"])
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        told = f"{path.parent.name}/{path.name} can't be read ({error})"
        raise StoreDamaged(f"{told}. Remove it: its blocks are computed anew.") from error


def blocks_in(path: Path) -> int:
    """How many blocks the saved sums are over. Raises `StoreDamaged`."""
    return load_sums(path, header_only=True)[1]


@contextmanager
def disk_full_is_told(folder: Path) -> Iterator[None]:
    """Raises `DiskFull` where the system says that there is no room."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors hands the system's number on as text only.
        in_text = any(f"(os error {number})" in str(error) for number in NO_ROOM)
        if not in_text and getattr(error, "errno", None) not in NO_ROOM:
            raise
        cure = "What is finished is kept: make room and run the same command again, it goes on from there."
        raise DiskFull(f"No room left for {folder} ({error}). {cure}") from error
