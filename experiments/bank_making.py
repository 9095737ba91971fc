"""The experiments: which reviews, trained how, in how many subsets. Drawn once, tuned to nothing.

`main` is the bank that scores are reported on. Its recipe is that of the collection's fine-tuning. The
others change one thing each, to see whether what holds on `main` holds beyond it.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from support.assets import AssetDamaged
from support.ekfac.storage import replacing
from support.imdb import ImdbDataset, load_imdb
from support.judge import Bank, Design, Membership, load_bank, retrained_margins
from support.model import load_tokenizer
from support.retraining import Recipe, Retraining, Reviews, read_for_the_tail, untrained_tail

BANKS = Path(__file__).parent / "banks"
SAVE_EVERY = 5
TRAIN_REVIEWS, QUERIES = 1_000, 200

SHARES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Where checkpoints are kept, as shares of the steps of a run."""


@dataclass(frozen=True)
class Experiment:
    """One bank: what differs from `main`, in words; the recipe; the design; how many reviews, from
    which on."""

    about: str
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=3, learning_rate=1e-3))
    design: Design = field(default_factory=Design)
    first_review: int = 0
    train_reviews: int = TRAIN_REVIEWS
    queries: int = QUERIES


EXPERIMENTS = {
    "main": Experiment("three epochs on random halves", design=Design(subsets=150, seeds=8)),
    "again": Experiment(
        "the same with other subsets, balanced by label", design=Design(balanced=True, draw=1)
    ),
    "gentle": Experiment("a smaller learning rate", Recipe(3, learning_rate=3e-4)),
    "longer": Experiment("ten epochs", Recipe(10, learning_rate=1e-3)),
    "converged": Experiment(
        "thirty epochs, until the loss is gone", Recipe(30, learning_rate=1e-3), Design(subsets=60, seeds=3)
    ),
    "trained": Experiment("three epochs more, from weights trained on all", Recipe(3, 1e-3, trained_for=3)),
    "other head": Experiment("another untrained head", Recipe(3, 1e-3, head_seed=1)),
    "other reviews": Experiment("another 1,000 training reviews", first_review=TRAIN_REVIEWS),
    "nine tenths": Experiment("a tenth left out instead of half", design=Design(share=0.9)),
}


def training_reviews(experiment: Experiment, progress: bool = False) -> Reviews:
    """The experiment's reviews: consecutive rows of the train split, shuffled with seed 0."""
    first = experiment.first_review
    return _reviews("train", range(first, first + experiment.train_reviews), progress)


def queries(experiment: Experiment, progress: bool = False) -> Reviews:
    """The test reviews asked about: the first rows of the test split, shuffled with seed 0."""
    return _reviews("test", range(experiment.queries), progress)


def _reviews(split: str, rows: range, progress: bool) -> Reviews:
    chosen = load_imdb()[split].shuffle(seed=0).select(rows)
    return read_for_the_tail(ImdbDataset(chosen, load_tokenizer()), progress)


def digest(reviews: Reviews) -> str:
    """A name for exactly these texts, in this order, with these labels."""
    found = hashlib.sha256(reviews.labels.numpy().tobytes())
    for text in reviews.texts:
        found.update(hashlib.sha256(text.encode()).digest())
    return found.hexdigest()[:16]


def bank_path(name: str) -> Path:
    """Where the repository keeps the bank of an experiment."""
    return BANKS / f"{name.replace(' ', '_')}.safetensors"


def retraining(experiment: Experiment, progress: bool = False) -> Retraining:
    """What trains the tail on the experiment's reviews by its recipe."""
    recipe, reviews = experiment.recipe, training_reviews(experiment, progress)
    part = untrained_tail(recipe.head_seed)
    if recipe.trained_for:
        part = Retraining(part, reviews, replace(recipe, epochs=recipe.trained_for)).run_on_all(seed=0)
    return Retraining(part, reviews, recipe)


def make(name: str, progress: bool = False) -> Bank:
    """The bank of an experiment: what is there of it is taken, the rest is retrained."""
    experiment = EXPERIMENTS[name]
    run, asked = retraining(experiment, progress), queries(experiment, progress)
    return make_or_load(run, asked, experiment.design, bank_path(name), progress)


class BankMismatch(ValueError):
    """A file holds another bank than the one asked for."""


def make_or_load(
    retraining: Retraining, queries: Reviews, design: Design, path: Path, progress: bool = False
) -> Bank:
    """The bank of this design, from `path` as far as it was made before, and left there when done.

    Margins are kept in float16. A run that was killed goes on where it was. Raises `BankMismatch`
    when `path` holds another bank and `AssetDamaged` when it can't be read.
    """
    wanted = identity(retraining, queries, design)
    if path.exists():
        _check(path, wanted)
        return load_bank(path)
    unfinished = path.with_suffix(".partial")
    member = design.membership(retraining.reviews.labels)
    found = torch.zeros(design.subsets, design.seeds, len(queries), dtype=torch.float16)
    done = 0
    if unfinished.exists():
        _check(unfinished, wanted)
        kept = load_bank(unfinished).margins
        done = len(kept)
        found[:done] = kept
    made = retrained_margins(retraining, queries, design, first=done)
    bar = tqdm(made, path.stem, design.subsets, initial=done, unit="subset", disable=not progress)
    for number, margins in enumerate(bar, start=done):
        found[number] = margins
        if number % SAVE_EVERY == 0:
            _save(unfinished, member[: number + 1], found[: number + 1], wanted)
    _save(path, member, found, wanted)
    unfinished.unlink(missing_ok=True)
    return Bank(member, found.float())


def identity(retraining: Retraining, queries: Reviews, design: Design) -> dict[str, str]:
    """Everything that decides a bank, by name."""
    settings = {**asdict(retraining.recipe), **asdict(design)}
    return {
        "train_reviews": digest(retraining.reviews),
        "queries": digest(queries),
        **{name: json.dumps(value) for name, value in settings.items()},
    }


def _check(path: Path, wanted: dict[str, str]) -> None:
    try:
        with safe_open(path, "pt") as file:
            theirs = file.metadata() or {}
    except SafetensorError as error:
        raise AssetDamaged(f"{path} cannot be read ({error}). Delete it: it is made again.") from error
    for name, value in wanted.items():
        if theirs.get(name) != value:
            raise BankMismatch(
                f"{path} belongs to another bank: its {name} is {theirs.get(name)}, this one's is "
                f"{value}. Delete it, or use its settings."
            )


def _save(path: Path, member: torch.Tensor, margins: torch.Tensor, metadata: dict[str, str]) -> None:
    with replacing(path) as fresh:
        save_file({"membership": member, "margins": margins.contiguous()}, fresh, metadata)


def fill(
    path: Path,
    told: dict,
    membership: Membership,
    margins: Float[Tensor, "subsets seeds queries"],
    trained: Callable[[Int[Tensor, " rows"], int], Float[Tensor, " queries"]],
) -> None:
    """A bank of trainings that take long, saved after each: all subsets with seed 1, then with the next, so
    that what is there is a bank at any time. `margins` come full of NaN, which tells what is missing;
    `trained` gives those of one training, of these rows with that seed; `told` decides the bank.

    What `path` holds of it is kept. Raises `BankMismatch` when it holds another bank.
    """
    found = {"membership": membership, "margins": margins}
    record = path.with_suffix(".json")
    if path.exists():
        found = load_file(path)
        if json.loads(record.read_text()) != json.loads(json.dumps(told)):
            raise BankMismatch(f"{path} is a bank of another recipe or other reviews. Delete it.")
    with replacing(record) as fresh:
        fresh.write_text(json.dumps(told, indent=1) + "\n")
    subsets, seeds, _ = margins.shape
    places = [(subset, seed) for seed in range(seeds) for subset in range(subsets)]
    missing = [place for place in places if found["margins"][place].isnan().any()]
    for subset, seed in tqdm(missing, path.stem, len(places), initial=len(places) - len(missing)):
        rows = found["membership"][subset].nonzero()[:, 0]
        # 0 is the seed of the run that scores come from.
        found["margins"][subset, seed] = trained(rows, seed + 1).to(margins.dtype)
        with replacing(path) as fresh:
            save_file(found, fresh)


def finished(path: Path, seeds: int | None = None) -> Bank:
    """Of a bank that `fill` makes: the subsets that have been trained on with so many seeds; by default with
    as many as every subset has been, or, before that is one, with one."""
    bank = load_bank(path)
    done = ~bank.margins.isnan().any(dim=2)
    seeds = seeds or max(1, int(done.all(dim=0).sum()))
    subsets = done[:, :seeds].all(dim=1)
    return Bank(bank.membership[subsets], bank.margins[subsets, :seeds])
