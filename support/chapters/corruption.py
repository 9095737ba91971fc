"""05: wrong labels, put in on purpose, looked for, taken out. A ranking of reviews is a score for each; the
highest are inspected first, equal ones in their own order.
"""

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from tqdm.auto import tqdm

from support.chapters import figures
from support.ekfac import EkfacInfluence
from support.retraining import Recipe, Retraining, Reviews, accuracy, batches, losses, margins, untrained_head

Labels = Int[Tensor, " reviews"]
Marks = Bool[Tensor, " reviews"]
# Lines are told apart without colour, too.
COLORS = ("#4c72b0", "#c44e52", "#2f8f5b", "#8172b3", "#8c8c8c", "#000000")
LINES = list(zip(COLORS, ("-", "--", "-.", (0, (4, 1, 1, 1, 1, 1)), ":", "-"), strict=True))


def flip_labels(labels: Labels, share: float, seed: int) -> tuple[Labels, Marks]:
    """Labels 0 and 1 with this share of them, drawn from `seed`, turned round; and which those are. Raises
    `ValueError` when `share` is not in [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"The share of labels to flip must be from 0 to 1, not {share}.")
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    flipped = torch.isin(torch.arange(len(labels)), drawn[: round(share * len(labels))])
    return torch.where(flipped, 1 - labels, labels), flipped


def finding_curve(suspicion: Shaped[Tensor, " reviews"], flipped: Marks) -> Float[Tensor, " inspected"]:
    """Share of the flipped labels among the first 0, 1, … inspected. `ValueError` when none is flipped."""
    if not flipped.any():
        raise ValueError("No label is flipped, so there is nothing to find.")
    inspected = suspicion.argsort(descending=True, stable=True)
    return torch.cat([torch.zeros(1), flipped[inspected].cumsum(0) / flipped.sum()])


def rankings(
    head: nn.Module, train: Reviews, validation: Reviews, regularization: float, seed: int
) -> dict[str, Float[Tensor, " train"]]:
    """Five ways to suspect the labels that `head` was trained on. Harm is done to `validation`, whose labels
    are trusted; `seed` draws the ranking by chance."""
    engine = EkfacInfluence(head, hessian_regularization=regularization).fit(batches(train))
    self_influences = engine.self_influences(train.vectors, train.labels)
    on_validation = engine.influences(validation.vectors, validation.labels, train.vectors, train.labels)
    harm = -on_validation.sum(dim=0)
    chance = torch.rand(len(train), generator=torch.Generator().manual_seed(seed))
    return {
        "training loss": losses(margins(head, train)),
        "self-influence": self_influences,
        "harm to validation": harm,
        "relative harm": torch.where(self_influences > 0, harm / self_influences.sqrt(), 0),
        "chance": chance,
    }


def head_training(reviews: Reviews, epochs: int) -> Retraining:
    """Training of a classification head alone on these reviews, for so many epochs."""
    return Retraining(untrained_head(reviews.vectors.shape[1]), reviews, Recipe(epochs, learning_rate=1e-3))


@dataclass(frozen=True)
class Trial:
    """One draw: the reviews as they are, the training on the flipped labels, and how they rank."""

    clean: Reviews
    training: Retraining
    flipped: Marks
    rankings: dict[str, Float[Tensor, " reviews"]]
    seed: int

    def references(self, validation: Reviews, held_out: Reviews) -> dict[str, float]:
        """Accuracy of heads for which no review was dropped: trained on the flipped labels, on those
        and the trusted reviews, on the right labels."""
        noisy, epochs = self.training.reviews, self.training.recipe.epochs
        added = Reviews(
            torch.cat([noisy.vectors, validation.vectors]),
            torch.cat([noisy.labels, validation.labels]),
            noisy.texts + validation.texts,
        )
        kept = {"all kept": noisy, "all kept, validation added": added, "no label flipped": self.clean}
        heads = {name: head_training(reviews, epochs).run_on_all(self.seed) for name, reviews in kept.items()}
        return {name: accuracy(head, held_out) for name, head in heads.items()}


def search(
    clean: Reviews, validation: Reviews, epochs: int, share: float, regularization: float, seed: int
) -> Trial:
    """Flip this share of the labels, train a head on all reviews, rank them by suspicion."""
    labels, flipped = flip_labels(clean.labels, share, seed)
    training = head_training(replace(clean, labels=labels), epochs)
    head = training.run_on_all(seed)
    ranked = rankings(head, training.reviews, validation, regularization, seed)
    return Trial(clean, training, flipped, ranked, seed)


def curves(trials: Sequence[Trial]) -> dict[str, Float[np.ndarray, "trials inspected"]]:
    """The finding curves of every ranking, a row for each trial."""
    return {
        name: torch.stack([finding_curve(t.rankings[name], t.flipped) for t in trials]).numpy()
        for name in trials[0].rankings
    }


def areas(trials: Sequence[Trial]) -> pd.DataFrame:
    """Area under the finding curve over the share inspected, a row for each trial, a column for each
    ranking: 0.5 by chance, 1 − share/2 when every flipped label comes first, share/2 when all come last."""
    step = 1 / len(trials[0].flipped)
    found = {name: curve.astype(np.float64) for name, curve in curves(trials).items()}
    return pd.DataFrame({name: np.trapezoid(curve, dx=step) for name, curve in found.items()})


def found_in_first(share: float, trials: Sequence[Trial]) -> pd.DataFrame:
    """Share of the flipped labels found when this share of the reviews is inspected, as `areas`."""
    inspected = round(share * len(trials[0].flipped))
    return pd.DataFrame({name: found[:, inspected] for name, found in curves(trials).items()})


def at_once(function: Callable, items: Iterable, what: str | None = None) -> list:
    """The function of each item, in their order: as many at once as there are processors, which pays where
    torch takes one thread. `what` names a progress bar."""
    items = list(items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(function, items)
        return list(tqdm(done, what, len(items), unit="draw", disable=what is None))


def drop_and_train(
    trials: Sequence[Trial], shares: Sequence[float], held_out: Reviews, progress: bool = False
) -> dict[float, pd.DataFrame]:
    """Share → held-out accuracies of heads trained without that most suspicious share of the reviews: a
    row for each trial, a column for each ranking and for one who knows the flips."""

    def dropped(trial: Trial) -> list[dict[str, float]]:
        training = copy.deepcopy(trial.training)  # one trial may be there twice
        of_share: list[dict[str, float]] = [{} for _ in shares]
        for name, rank in (trial.rankings | {"flips known": trial.flipped}).items():
            inspected = rank.argsort(descending=True, stable=True)
            for share, accuracies in zip(shares, of_share, strict=True):
                kept = inspected[round(share * len(rank)) :].sort().values
                accuracies[name] = accuracy(training.run(kept, trial.seed), held_out)
        return of_share

    rows = at_once(dropped, trials, "training again" if progress else None)
    return {share: pd.DataFrame(found) for share, found in zip(shares, zip(*rows, strict=True), strict=True)}


def mean_and_spread(draws: pd.DataFrame) -> pd.Series:
    """Mean ± standard deviation over the draws (rows) of each ranking (column), as text."""
    return draws.agg(lambda drawn: f"{drawn.mean():.3f} ± {drawn.std():.3f}")


def finding_curves(curves: list[dict[str, np.ndarray]], share_flipped: float, titles: list[str]) -> None:
    """Share of the wrong labels found against the share of reviews inspected: for each panel, ranking →
    (draws, inspected + 1); the mean over draws in a band of one standard deviation to either side."""
    panels = np.atleast_1d(figures.new_axes(4.2 * len(curves), 3.8, len(curves)))
    for axes, of_panel, title in zip(panels, curves, titles, strict=True):
        for (name, draws), (color, line) in zip(of_panel.items(), LINES, strict=False):
            inspected = np.linspace(0, 100, draws.shape[1])
            mean, spread = 100 * draws.mean(axis=0), 100 * draws.std(axis=0)
            axes.plot(inspected, mean, color=color, linestyle=line, linewidth=1.8, label=name)
            axes.fill_between(inspected, mean - spread, mean + spread, color=color, alpha=0.15, lw=0)
        perfect = [0, 100 * share_flipped, 100]
        axes.plot(perfect, [0, 100, 100], color="black", linewidth=0.7, label="flips known")
        axes.set(xlim=(0, 100), ylim=(0, 102), title=title, xlabel="reviews inspected, %")
    panels[-1].legend(loc="lower right")
    figures.show(panels, ylabel="flipped labels found, %")


def accuracy_after_dropping(
    accuracies: dict[str, np.ndarray], shares: Sequence[float], references: dict[str, float], title: str
) -> None:
    """Accuracy of the model trained again without the most suspicious share: ranking → (draws, shares);
    mean and standard deviation over draws."""
    axes = figures.new_axes(7.5, 4)
    for number, (name, draws) in enumerate(accuracies.items()):
        color, line = LINES[number % len(LINES)]
        dodged = 100 * np.asarray(shares) + 0.12 * (number - (len(accuracies) - 1) / 2)
        mean, spread = 100 * draws.mean(axis=0), 100 * draws.std(axis=0, ddof=1)
        axes.errorbar(dodged, mean, spread, label=name, color=color, linestyle=line, fmt="o", ms=3)
    for name, value in references.items():
        axes.axhline(100 * value, color=figures.NEUTRAL, linewidth=0.7)
        figures.name_beside(axes, name, 100 * value, fontsize=8)
    axes.set(xticks=[100 * share for share in shares], xlabel="most suspicious reviews dropped, %")
    axes.figure.legend(loc="outside lower center", ncols=3)
    figures.show(axes, title=title, ylabel="held-out accuracy, % (mean ± standard deviation)")
