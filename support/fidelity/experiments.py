"""The experiments: which reviews, trained how, in how many subsets. Drawn once, tuned to nothing.

`main` is the bank that scores are reported on. Its recipe is that of the collection's fine-tuning. The
others change one thing each, to see whether what holds on `main` holds beyond it.
"""

from dataclasses import dataclass, field
from pathlib import Path

from support.curvature_cache import cache_folder
from support.fidelity.bank import Bank, Design, make_bank
from support.fidelity.retraining import Recipe, Retraining
from support.fidelity.tail import Reviews, read_reviews
from support.imdb import ImdbDataset, load_imdb
from support.model import load_tokenizer

BANKS = Path(__file__).parent / "banks"
TRAIN_REVIEWS, QUERIES = 1_000, 200

SHARES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Where checkpoints are kept, as shares of the steps of a run."""


@dataclass(frozen=True)
class Experiment:
    """One bank: what differs from `main`, in words; the recipe; the design; how many reviews, from
    which on; whether the repository holds it."""

    about: str
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=3, learning_rate=1e-3))
    design: Design = field(default_factory=Design)
    first_review: int = 0
    train_reviews: int = TRAIN_REVIEWS
    queries: int = QUERIES
    is_committed: bool = True


EXPERIMENTS = {
    "main": Experiment("three epochs on random halves", design=Design(subsets=150, seeds=8)),
    "again": Experiment(
        "the same with other subsets, balanced by label", design=Design(balanced=True, draw=1)
    ),
    "gentle": Experiment("a smaller learning rate", Recipe(3, learning_rate=3e-4)),
    "longer": Experiment("ten epochs", Recipe(10, learning_rate=1e-3)),
    "converged": Experiment(
        "thirty epochs, until the loss is gone",
        Recipe(30, learning_rate=1e-3),
        Design(subsets=60, seeds=3),
    ),
    "trained": Experiment(
        "three epochs more, from weights trained on all", Recipe(3, 1e-3, trained_for=3)
    ),
    "other head": Experiment("another untrained head", Recipe(3, 1e-3, head_seed=1)),
    "other reviews": Experiment("another 1,000 training reviews", first_review=TRAIN_REVIEWS),
    "nine tenths": Experiment("a tenth left out instead of half", design=Design(share=0.9)),
    "tiny": Experiment(
        "small enough to retrain in seconds",
        design=Design(subsets=12, seeds=2),
        train_reviews=60,
        queries=12,
        is_committed=False,
    ),
}
COMMITTED = [name for name, experiment in EXPERIMENTS.items() if experiment.is_committed]


def training_reviews(experiment: Experiment, progress: bool = False) -> Reviews:
    """The experiment's reviews: consecutive rows of the train split, shuffled with seed 0."""
    first = experiment.first_review
    return _reviews("train", range(first, first + experiment.train_reviews), progress)


def queries(experiment: Experiment, progress: bool = False) -> Reviews:
    """The test reviews asked about: the first rows of the test split, shuffled with seed 0."""
    return _reviews("test", range(experiment.queries), progress)


def halves(number: int) -> tuple[slice, slice]:
    """Queries on which λ, normalisation and checkpoints are chosen, and those that are reported."""
    return slice(0, number // 2), slice(number // 2, number)


def _reviews(split: str, rows: range, progress: bool) -> Reviews:
    chosen = load_imdb()[split].shuffle(seed=0).select(rows)
    return read_reviews(ImdbDataset(chosen, load_tokenizer()), progress)


def bank_path(name: str) -> Path:
    """Where the bank of an experiment is kept: in the repository, or in the cache."""
    folder = BANKS if EXPERIMENTS[name].is_committed else cache_folder() / "fidelity"
    return folder / f"{name.replace(' ', '_')}.safetensors"


def retraining(experiment: Experiment, progress: bool = False) -> Retraining:
    """What trains the tail on the experiment's reviews by its recipe."""
    return Retraining(training_reviews(experiment, progress), experiment.recipe)


def make(name: str, progress: bool = False) -> Bank:
    """The bank of an experiment: what is there of it is taken, the rest is retrained."""
    experiment = EXPERIMENTS[name]
    return make_bank(
        retraining(experiment, progress),
        queries(experiment, progress),
        experiment.design,
        bank_path(name),
        progress,
    )
