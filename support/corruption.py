"""Wrong labels: put in on purpose, looked for, taken out.

A ranking of reviews is a score for each, higher for the more suspicious; whoever inspects them begins at
the top.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from tqdm.auto import tqdm

from support.ekfac import EkfacInfluence
from support.fidelity.retraining import losses, margins
from support.fidelity.tail import Reviews
from support.heads import HeadTraining, accuracy, batches, joined


def sign_changes(
    before: Float[Tensor, "test train"], after: Float[Tensor, "test train"]
) -> pd.DataFrame:
    """How many influences help, harm or are zero before (rows) and after (columns)."""
    words = {1: "helps", -1: "harms", 0: "zero"}
    before, after = (
        pd.Series([words[int(sign)] for sign in values.flatten().sign()], name=name)
        for values, name in [(before, "before"), (after, "after")]
    )
    return pd.crosstab(before, after)


def flip_labels(
    labels: Int[Tensor, " reviews"], share: float, seed: int
) -> tuple[Int[Tensor, " reviews"], Bool[Tensor, " reviews"]]:
    """Labels 0 and 1 with this share of them, drawn from `seed`, turned round; and which those are.

    round(share · reviews) labels are flipped. Raises `ValueError` when `share` is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"The share of labels to flip must be from 0 to 1, not {share}.")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    flipped = torch.zeros(len(labels), dtype=torch.bool)
    flipped[drawn] = True
    return torch.where(flipped, 1 - labels, labels), flipped


def most_suspicious(suspicion: Shaped[Tensor, " reviews"]) -> Int[Tensor, " reviews"]:
    """Rows in the order of inspection: highest first, equal ones in their own order."""
    return suspicion.argsort(descending=True, stable=True)


def finding_curve(
    suspicion: Shaped[Tensor, " reviews"], flipped: Bool[Tensor, " reviews"]
) -> Float[Tensor, " inspected"]:
    """Share of the flipped labels among the first 0, 1, …, `reviews` inspected; from 0 to 1.

    Raises `ValueError` when no label is flipped: there is nothing to find.
    """
    if not flipped.any():
        raise ValueError("No label is flipped, so there is nothing to find.")
    found = flipped[most_suspicious(suspicion)].cumsum(0) / flipped.sum()
    return torch.cat([torch.zeros(1), found])


def area_under(curve: Float[Tensor, " inspected"]) -> float:
    """Area under a finding curve over the share inspected.

    0.5 by chance; 1 − share/2 when every flipped label comes first, share/2 when all come last.
    """
    return torch.trapezoid(curve.double(), dx=1 / (len(curve) - 1)).item()


def influence_on_all(
    engine: EkfacInfluence, tests: Reviews, train: Reviews
) -> Float[Tensor, " train"]:
    """Σ over `tests` of the influence of each training review, at the price of one test review.

    Influence is linear in the test gradient, so the factors may be added up before they are used.
    """
    factors = engine.influence_factors(tests.vectors, tests.labels)
    total = {name: factor.sum(dim=0, keepdim=True) for name, factor in factors.items()}
    return engine.influences_from_factors(total, train.vectors, train.labels)[0]


def rankings(
    head: nn.Module, train: Reviews, validation: Reviews, regularization: float, seed: int
) -> dict[str, Float[Tensor, " train"]]:
    """Five ways to suspect the labels of reviews that `head` was trained on; higher, more suspicious.

    Reviews that raise the loss of the `validation` reviews, whose labels are trusted, are suspicious;
    so are reviews that pull hard on themselves, and reviews the head does not agree with. `seed`
    draws the ranking by chance.
    """
    engine = EkfacInfluence(head, hessian_regularization=regularization).fit(batches(train))
    self_influences = engine.self_influences(train.vectors, train.labels)
    harm = -influence_on_all(engine, validation, train)
    relative = torch.where(self_influences > 0, harm / self_influences.sqrt(), 0)
    generator = torch.Generator().manual_seed(seed)
    return {
        "training loss": losses(margins(head, train)),
        "self-influence": self_influences,
        "harm to validation": harm,
        "relative harm": relative,
        "chance": torch.rand(len(train), generator=generator),
    }


@dataclass(frozen=True)
class Trial:
    """One draw of flipped labels: the reviews as they are, which flip, and how reviews then rank."""

    clean: Reviews
    training: HeadTraining
    flipped: Bool[Tensor, " reviews"]
    rankings: dict[str, Float[Tensor, " reviews"]]
    seed: int

    @property
    def noisy(self) -> Reviews:
        """The reviews with the labels they were trained on."""
        return self.training.reviews

    def curves(self) -> dict[str, Float[Tensor, " inspected"]]:
        """The finding curve of every ranking."""
        return {name: finding_curve(rank, self.flipped) for name, rank in self.rankings.items()}

    def areas(self) -> dict[str, float]:
        """The area under the finding curve of every ranking."""
        return {name: area_under(curve) for name, curve in self.curves().items()}

    def accuracies_without_the_worst(self, share: float, held_out: Reviews) -> dict[str, float]:
        """Accuracy of a head trained without this share of the reviews, the most suspicious ones.

        `flips known` is the ranking of one who knows them.
        """
        return {
            name: accuracy(self.training.run(without_the_worst(rank, share), self.seed), held_out)
            for name, rank in (self.rankings | {"flips known": self.flipped}).items()
        }

    def references(self, validation: Reviews, held_out: Reviews) -> dict[str, float]:
        """Accuracy of heads for which no review was dropped.

        Trained on the flipped labels; on those and the trusted reviews; on the right labels.
        """
        kept = {
            "all kept": self.noisy,
            "all kept, validation added": joined(self.noisy, validation),
            "no label flipped": self.clean,
        }
        epochs = self.training.recipe.epochs
        return {
            name: accuracy(HeadTraining(reviews, epochs).run_on_all(self.seed), held_out)
            for name, reviews in kept.items()
        }


def search(
    clean: Reviews,
    validation: Reviews,
    epochs: int,
    share: float,
    regularization: float,
    seed: int,
) -> Trial:
    """Flip this share of the labels, train a head on all reviews, rank them by suspicion."""
    labels, flipped = flip_labels(clean.labels, share, seed)
    noisy = replace(clean, labels=labels)
    training = HeadTraining(noisy, epochs)
    ranked = rankings(training.run_on_all(seed), noisy, validation, regularization, seed)
    return Trial(clean, training, flipped, ranked, seed)


def without_the_worst(suspicion: Shaped[Tensor, " reviews"], share: float) -> Int[Tensor, " kept"]:
    """Rows that are left, in their own order, when the most suspicious share is taken out."""
    return most_suspicious(suspicion)[round(share * len(suspicion)) :].sort().values


def stacked_curves(trials: Sequence[Trial]) -> dict[str, np.ndarray]:
    """Ranking → finding curves of all trials, (trials, inspected)."""
    curves = [trial.curves() for trial in trials]
    return {name: torch.stack([one[name] for one in curves]).numpy() for name in curves[0]}


def areas(trials: Sequence[Trial]) -> pd.DataFrame:
    """Area under the finding curve: a row for each trial, a column for each ranking."""
    return pd.DataFrame([trial.areas() for trial in trials])


def found_in_first(share: float, trials: Sequence[Trial]) -> pd.DataFrame:
    """Share of the flipped labels found when this share of the reviews is inspected, as `areas`."""
    rows = [trial.curves() for trial in trials]
    inspected = round(share * len(trials[0].flipped))
    return pd.DataFrame(
        [{name: curve[inspected].item() for name, curve in row.items()} for row in rows]
    )


def drop_and_train(
    trials: Sequence[Trial], shares: Sequence[float], held_out: Reviews, progress: bool = False
) -> dict[float, pd.DataFrame]:
    """Share → held-out accuracies without that share of the reviews, a row for each trial."""
    accuracies: dict[float, list] = {share: [] for share in shares}
    for trial in tqdm(trials, "training again", unit="draw", disable=not progress):
        for share, rows in accuracies.items():
            rows.append(trial.accuracies_without_the_worst(share, held_out))
    return {share: pd.DataFrame(rows) for share, rows in accuracies.items()}


def mean_and_spread(draws: pd.DataFrame) -> pd.Series:
    """Mean ± standard deviation over the draws (rows) of each ranking (column), as text."""
    return pd.Series(
        [f"{draws[name].mean():.3f} ± {draws[name].std():.3f}" for name in draws], draws.columns
    )
