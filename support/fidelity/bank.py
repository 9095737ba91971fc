"""Banks of retrainings: what became of every query after training on each of many random subsets."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from support.fidelity.retraining import Retraining, losses, margins
from support.fidelity.tail import Reviews

SAVE_EVERY = 5


class BankMismatch(ValueError):
    """A file holds another bank than the one asked for."""


class BankDamaged(ValueError):
    """A file of a bank cannot be read."""


@dataclass(frozen=True)
class Design:
    """`subsets` random subsets holding `share` of the reviews, each trained on with `seeds` seeds.

    `balanced` subsets hold as many reviews of either label as `share` of that label. `draw` is the
    seed of the subsets.
    """

    subsets: int = 100
    seeds: int = 4
    share: float = 0.5
    balanced: bool = False
    draw: int = 0

    def membership(self, labels: Int[Tensor, " train"]) -> Bool[Tensor, "subsets train"]:
        """Which reviews are in each subset."""
        generator = torch.Generator().manual_seed(self.draw)
        groups = [labels == 0, labels == 1] if self.balanced else [torch.ones_like(labels).bool()]
        member = torch.zeros(self.subsets, len(labels), dtype=torch.bool)
        for subset in member:
            for group in groups:
                rows = group.nonzero()[:, 0]
                chosen = torch.randperm(len(rows), generator=generator)
                subset[rows[chosen[: round(self.share * len(rows))]]] = True
        return member


@dataclass(frozen=True)
class Bank:
    """`membership` (subsets, train), and `margins` (subsets, seeds, queries) after each retraining."""

    membership: Bool[Tensor, "subsets train"]
    margins: Float[Tensor, "subsets seeds queries"]

    @property
    def outcomes(self) -> Float[Tensor, "subsets queries"]:
        """Cross-entropy of each query, mean over seeds."""
        return losses(self.margins).mean(dim=1)

    def of_queries(self, queries: slice) -> "Bank":
        """The same retrainings, some of the queries."""
        return Bank(self.membership, self.margins[:, :, queries])


def identity(retraining: Retraining, queries: Reviews, design: Design) -> dict[str, str]:
    """Everything that decides a bank, by name."""
    settings = {**retraining.recipe.settings(), **asdict(design)}
    return {
        "train_reviews": retraining.reviews.digest(),
        "queries": queries.digest(),
        **{name: json.dumps(value) for name, value in settings.items()},
    }


def make_bank(
    retraining: Retraining, queries: Reviews, design: Design, path: Path, progress: bool = False
) -> Bank:
    """The bank of this design, from `path` as far as it was made before, and left there when done.

    Margins are kept in float16. A run that was killed goes on where it was. Raises `BankMismatch`
    when `path` holds another bank and `BankDamaged` when it can't be read.
    """
    wanted = identity(retraining, queries, design)
    member = design.membership(retraining.reviews.labels)
    partial = path.with_suffix(".partial")
    if path.exists():
        return load_bank(path, wanted)
    kept = _read(partial, wanted)["margins"] if partial.exists() else None
    done = 0 if kept is None else len(kept)
    found = torch.zeros(design.subsets, design.seeds, len(queries), dtype=torch.float16)
    found[:done] = kept if done else 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(
        total=design.subsets, initial=done, unit="subset", desc=path.stem, disable=not progress
    ) as bar:
        for number in range(done, design.subsets):
            rows = member[number].nonzero()[:, 0]
            for seed in range(design.seeds):
                # 0 is the seed of the run that the scores come from.
                found[number, seed] = margins(retraining.run(rows, seed + 1), queries).half()
            bar.update()
            if number % SAVE_EVERY == 0:
                _write(partial, {"margins": found[: number + 1]}, wanted)
    _write(path, {"membership": member, "margins": found}, wanted)
    partial.unlink(missing_ok=True)
    return Bank(member, found.float())


def load_bank(path: Path, wanted: dict[str, str] | None = None) -> Bank:
    """A bank that `make_bank` left. Raises `FileNotFoundError`, `BankMismatch` and `BankDamaged`."""
    tensors = _read(path, wanted)
    return Bank(tensors["membership"], tensors["margins"].float())


def _read(path: Path, wanted: dict[str, str] | None) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            theirs = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise BankDamaged(
            f"{path} cannot be read ({error}). Delete it: it is made again."
        ) from error
    for name, value in (wanted or {}).items():
        if theirs.get(name) != value:
            raise BankMismatch(
                f"{path} belongs to another bank: its {name} is {theirs.get(name)}, this one's is "
                f"{value}. Delete it, or use its settings."
            )
    return tensors


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Whole or not at all."""
    fresh = path.with_suffix(f".{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, fresh, metadata)
    fresh.replace(path)
