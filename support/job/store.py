"""A job's results on disk: a folder that knows what it belongs to and takes each part whole.

- `results.zarr/`: what the job is about, as attributes under a seal, and `ARRAYS`, `scores` in one chunk per
  (query group, training block), each chunk with its seal; in `questions/`, each with attributes and arrays of
  its own, the questions that have a name;
- `curvature.safetensors`: the fit;
- `fit/`: the fit as far as it has come, gone when it is done;
- `tokens/`: the examples, tokenised;
- `locks/`: one for each process at work.

What is written takes its place when it is whole: after a kill it is there, or not there. Under the checksum
of each part is what it follows from, its role and its place, so that a part of another store, or of another
place, is no part of this one. An influence that is not there is NaN for whoever reads with zarr.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import torch
import zarr
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from support.ekfac.storage import digest, replacing
from support.job import layout
from support.job.errors import (
    StepMissing,
    StoreBusy,
    StoreDamaged,
    StoreMismatch,
    damage_is_told,
    disk_full_is_told,
    refuse_all,
)
from support.job.layout import ARRAYS, FITTED, FORMAT, SUFFIX, SUMMED, Sizes, seal, sealed
from support.job.settings import ASKED, mismatch
from support.job.team import Team

HALF_WRITTEN = ("results.zarr/**/*.partial", "*.partial", "fit/*.partial", "tokens/*.partial", "tokens/tmp*")
FIT_AGAIN = "Remove it and run: fit"


class Store:
    """The folder of one job, as one of its questions sees it; the one without a name is the job's own."""

    def __init__(self, folder: str | Path, question: str = ""):
        self.folder, self.question = Path(folder), question
        self.curvature = self.folder / "curvature.safetensors"
        self.partial_fit = self.folder / "fit"
        self.tokens = self.folder / "tokens"
        self._results = self.folder / "results.zarr"
        self._questions = self._results / "questions"
        self._own = self._questions / question if question else self._results

    @property
    def exists(self) -> bool:
        return layout.begun(self._results)

    def begin(self) -> None:
        """Make the store, unless there is one already. Raises `DiskFull`."""
        if not self.exists:
            self._write(self._results / "zarr.json", layout.described({"format": FORMAT}))

    def questions(self) -> list[str]:
        """Those that have a name."""
        return sorted(path.name for path in self._questions.glob("*") if layout.begun(path))

    def facts(self) -> dict[str, object]:
        """All attributes. Raises `StepMissing` without a store, `StoreDamaged` and `StoreMismatch`."""
        if not self.exists:
            raise StepMissing(f"There is no store at {self.folder}. Begin one with: fit --store …")
        facts = layout.facts_of(self._results)
        if not self.question:
            return facts
        shared = {name: fact for name, fact in facts.items() if name not in ASKED}
        return layout.facts_of(self._own) | shared

    def settle(self, facts: Mapping[str, object]) -> None:
        """Write attributes. Raises `StoreMismatch`, and writes none, when the store has another one."""
        refuse_all(mismatch(self.facts(), facts))
        if self.question:
            self._write(self._questions / "zarr.json", layout.described({}))
        for group, is_asked in ((self._results, False), (self._own, True)):
            if own := {name: fact for name, fact in facts.items() if (name in ASKED) is is_asked}:
                self._write(group / "zarr.json", layout.described(layout.facts_of(group) | own))

    def _write(self, path: Path, content: bytes) -> None:
        """A small file, whole, unless it is there already. Raises `DiskFull`."""
        if not path.is_file() or path.read_bytes() != content:
            with disk_full_is_told(self.folder), replacing(path) as fresh:
                fresh.write_bytes(content)

    def belonging(self, names: tuple[str, ...]) -> str:
        """Stands for the facts of these names."""
        facts = self.facts()
        return layout.digest_of({name: facts.get(name) for name in names})

    def make_array(self, name: str, shape: Sizes, chunks: Sizes, dtype: str | torch.dtype) -> None:
        """An array of missing values, unless it is there; other chunks while none is whole only."""
        try:
            kept = self.array(name).shape == shape and any(self._whole(name))
        except (StepMissing, StoreDamaged):
            kept = False
        if not kept:
            described = layout.array(name, shape, chunks, str(dtype).removeprefix("torch."))
            self._write(self._place(name) / "zarr.json", described)

    def _place(self, name: str) -> Path:
        """An array's folder: the job's, where all that the numbers follow from is, as self-influences for the
        same λ are; or else the question's own."""
        own, shared = self._own / name, self._results / name
        jobs, facts = layout.facts_of(self._results), self.facts()
        same = all(jobs.get(one) == facts.get(one) for one in ARRAYS[name][1])
        return shared if same and not (own / "zarr.json").exists() else own

    def keep_rows(self, name: str, rows: np.ndarray) -> None:
        """Row numbers of examples. They are written again each time: a kill may have left none."""
        self.make_array(name, rows.shape, rows.shape, "int64")
        self.write(name, (range(len(rows)),), rows)

    def array(self, name: str) -> zarr.Array:
        """Raises as `facts`, `StepMissing`, naming the step that makes the array, and `StoreDamaged`.

        It is opened only when its description is what a job writes, byte by byte: zarr would let a
        description from elsewhere name any codec.
        """
        self.facts()
        path = self._place(name) / "zarr.json"
        if not path.exists():
            told = f"{self.folder} has no {name} yet{self.question and f' for --question {self.question}'}."
            if others := self.questions():
                told += f" Questions there are, for --question: {', '.join(others)}."
            raise StepMissing(f"{told} {self._cure(name)}")
        with damage_is_told(path.relative_to(self.folder), "Run the step again: it is written anew"):
            content = path.read_bytes()
            told = json.loads(content)
            sizes = told["shape"], told["chunk_grid"]["configuration"]["chunk_shape"]
            if content != layout.array(name, *map(tuple, sizes), told["data_type"]):
                raise ValueError("another description than a job writes")
        return zarr.open_array(path.parent, mode="r+", zarr_format=3)

    def write(self, name: str, place: tuple[range, ...], values: np.ndarray) -> None:
        """Whole chunks, or nothing of them; `place` is in the last dimensions. Raises `DiskFull`."""
        with disk_full_is_told(self.folder):
            self.array(name)[_part(place)] = values
            for chunk in self._chunks(name, place):
                seal(*chunk)

    def read(self, name: str, place: tuple[range, ...]) -> np.ndarray:
        """A part of an array. Raises `StepMissing` when not all of it is there, and `StoreDamaged`."""
        for folder, chunk, of in self._chunks(name, place):
            if not (folder / chunk).exists():
                cure = f"{self._cure(name)}. It goes on where it was."
                raise StepMissing(f"Not all {name} are there yet. {cure}")
            if not sealed(folder, chunk, of):
                told = f"Chunk {chunk} of {name} is damaged, half written, or belongs elsewhere"
                raise StoreDamaged(f"{told}. Run the step again: it is computed anew.")
        return self.array(name)[_part(place)]

    def _cure(self, name: str) -> str:
        return ARRAYS[name][2] + (f" --question {self.question}" if self.question else "")

    def has(self, name: str, place: tuple[range, ...]) -> bool:
        """Whether a part of an array is there and whole."""
        try:
            return all(sealed(*chunk) for chunk in self._chunks(name, place))
        except (StepMissing, StoreDamaged):  # of the array: whoever makes it makes it anew
            return False

    def _chunks(self, name: str, place: tuple[range, ...]) -> Iterator[tuple[Path, str, str]]:
        """The files that hold a part of an array, each as `seal` wants it."""
        array = self.array(name)
        sizes = zip(place, array.chunks[-len(place) :], strict=True)
        numbers = [range(part.start // size, -(-part.stop // size)) for part, size in sizes]
        for number in product(*[range(1)] * (array.ndim - len(place)), *numbers):
            yield self._place(name), "/".join(map(str, ("c", *number))), self._of(name, array)

    def _of(self, name: str, array: zarr.Array) -> str:
        return f"{self.belonging(ARRAYS[name][1])} {name} {array.shape} {array.chunks} {array.dtype}"

    def fitted(self) -> bool:
        """Whether the curvature is there. Raises `StoreDamaged`, for that of another job, too."""
        if not self.curvature.exists():
            return False
        _read(self.curvature, self.belonging(FITTED), header_only=True)
        return True

    def save_sums(self, name: str, sums: Mapping[str, Tensor], blocks: int) -> None:
        """Write tensors to `fit/`, sums over so many blocks of examples, one or more. Raises `DiskFull`."""
        tensors = {key: tensor.contiguous() for key, tensor in sums.items()}
        about = {"job": f"{self.belonging(SUMMED)} {name}", "blocks": str(blocks)}
        path = self.partial_fit / f"{name}.safetensors"
        with disk_full_is_told(self.folder), replacing(path) as fresh:
            save_file(tensors, fresh, metadata=about | {"digest": digest(tensors, about)})

    def load_sums(self, name: str, header_only: bool = False) -> tuple[dict[str, Tensor], int]:
        """Saved tensors, and how many blocks they are over; none without a file. Raises `StoreDamaged`."""
        path = self.partial_fit / f"{name}.safetensors"
        return _read(path, f"{self.belonging(SUMMED)} {name}", header_only) if path.exists() else ({}, 0)

    def progress(self) -> dict[str, str]:
        """How far each step is, in words. Raises `StoreDamaged`."""
        return {"fit": self._fitted(), "score": self._share("scores"), "self": self._share("self_influences")}

    def _fitted(self) -> str:
        if self.fitted():
            return "done"
        for sums in ("eigenvalues", "covariances"):
            files = self.partial_fit.glob(f"{sums}-*.safetensors")
            blocks = sum(self.load_sums(path.stem, header_only=True)[1] for path in files)
            if blocks:
                return f"{sums} of {blocks} block{'s' if blocks > 1 else ''}"
        return "begun" if self.partial_fit.exists() else "not yet"

    def _share(self, name: str) -> str:
        if not (self._place(name) / "zarr.json").exists():
            return "not yet"
        done, chunks = sum(self._whole(name)), self.array(name).nchunks
        return "done" if done == chunks else f"{done} of {chunks} blocks"

    def _whole(self, name: str) -> Iterator[bool]:
        """Of each sealed chunk, whether it is whole. What is there is looked at: a shape may be any."""
        folder, of = self._place(name), self._of(name, self.array(name))
        for path in folder.glob(f"c/**/*{SUFFIX}"):
            yield sealed(folder, path.relative_to(folder).as_posix().removesuffix(SUFFIX), of)

    def refuse_links(self) -> None:
        """Raise `StoreMismatch` for a link in the folder: writing and sweeping would reach behind it."""
        for path in self.folder.glob("**/*"):
            if path.is_symlink():
                told = "is a link, and a store holds none. Remove it, or put there what it points to."
                raise StoreMismatch(f"{path} {told}")

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
            self.refuse_links()
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


def _read(path: Path, of: str, header_only: bool) -> tuple[dict[str, Tensor], int]:
    """Tensors, and how many blocks they are over. Raises `StoreDamaged`, for those of another job, too."""
    with damage_is_told(path.name, FIT_AGAIN):
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            found = {} if header_only else {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if about["job"] != of:
            raise ValueError("it is of other examples, another model, another step or other settings")
        if not header_only and about.pop("digest") != digest(found, about):
            raise ValueError("its checksum differs")
        return found, int(about.get("blocks", 0))
