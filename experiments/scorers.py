"""The scorers that retraining judges. Each gives `(queries, train)`: positive lowers the query's loss.

Some look at texts and labels only, some at the trained model, some at its path through training. All
take the same `Question`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn

from support.chapters.language import shared_words
from support.ekfac import EkfacInfluence, ExactInfluence
from support.ekfac.curvature import Regularization
from support.ekfac.exact import InnerProducts, exact_influences
from support.retraining import Checkpoint, Reviews, batches, losses, margins

Scores = Float[Tensor, "queries train"]


@dataclass(frozen=True)
class Question:
    """Which of `train` matter for `queries`, to a model that went along `path` in training?

    The last checkpoint of the path is the trained model.
    """

    path: list[Checkpoint]
    train: Reviews
    queries: Reviews

    def trained(self) -> nn.Module:
        """The model at the end of the path."""
        return self.path[-1].model()


def same_label(question: Question) -> Scores:
    """1 where the labels agree, −1 where they differ."""
    train, queries = question.train.labels, question.queries.labels
    return 2.0 * (queries[:, None] == train[None]) - 1


def training_loss(question: Question) -> Scores:
    """The trained model's loss on the training review, with the sign of the labels' agreement."""
    loss = losses(margins(question.trained(), question.train))
    return same_label(question) * loss


def tf_idf(question: Question) -> Scores:
    """Cosine of the texts' TF-IDF vectors."""
    words = TfidfVectorizer(stop_words="english").fit(question.train.texts)
    queries, train = (words.transform(side.texts) for side in (question.queries, question.train))
    return torch.from_numpy((queries @ train.T).toarray()).float()


def bm25(question: Question) -> Scores:
    """Okapi BM25 of the training text for the words of the query."""
    return shared_words(question.queries.texts, question.train.texts)


def representation_cosine(question: Question) -> Scores:
    """Cosine of what the frozen layers make of the texts, about the training reviews' mean."""
    centre = question.train.vectors.mean(dim=0)
    queries, train = (
        nn.functional.normalize(side.vectors - centre) for side in (question.queries, question.train)
    )
    return queries @ train.T


def with_label_sign(scorer: Callable[[Question], Scores]) -> Callable[[Question], Scores]:
    """A similarity that helps where the labels agree and harms where they differ."""
    return lambda question: same_label(question) * scorer(question)


SIMILARITIES = {
    "same label": same_label,
    "training loss, label sign": training_loss,
    "TF-IDF": tf_idf,
    "TF-IDF, label sign": with_label_sign(tf_idf),
    "BM25": bm25,
    "BM25, label sign": with_label_sign(bm25),
    "representation cosine": representation_cosine,
    "representation cosine, label sign": with_label_sign(representation_cosine),
}


@dataclass(frozen=True)
class Normalised:
    """Influences and what divides them.

    `plain` as they are; `relative` divides by √self-influence; `unit residual` by the size ‖p − e_y‖
    of the training residual, so that it says how much the review could say, not how wrong the model is
    about it.
    """

    influences: Scores
    self_influences: Float[Tensor, " train"]
    residuals: Float[Tensor, " train"]

    def all(self) -> dict[str, Scores]:
        """The three, by name; 0 where a training review has nothing to divide by, so no say."""
        return {
            "plain": self.influences,
            "relative": _quotient(self.influences, self.self_influences.sqrt()),
            "unit residual": _quotient(self.influences, self.residuals),
        }


def _quotient(scores: Scores, sizes: Float[Tensor, " train"]) -> Scores:
    return torch.where(sizes > 0, scores / sizes, 0)


def residual_sizes(model: nn.Module, reviews: Reviews) -> Float[Tensor, " reviews"]:
    """‖p − e_y‖, √2 times the probability that the model gives to the other label."""
    return 2**0.5 * torch.sigmoid(-margins(model, reviews))


def ekfac_at(
    checkpoint: Checkpoint,
    question: Question,
    regularizations: tuple[Regularization, ...],
    update_diagonal: bool = True,
) -> Iterator[tuple[Regularization, Normalised]]:
    """EK-FAC (or K-FAC) influences at one checkpoint, both sides there, for one λ after the other."""
    model = checkpoint.model()
    engine = EkfacInfluence(model, update_diagonal).fit(batches(question.train))
    residuals = residual_sizes(model, question.train)
    train = question.train
    for regularization in regularizations:
        engine.hessian_regularization = regularization
        influences = engine.score(batches(question.queries), batches(train))
        self_influences = engine.self_influences(train.vectors, train.labels)
        yield regularization, Normalised(influences, self_influences, residuals)


def gradient_products(checkpoint: Checkpoint, question: Question) -> dict[str, Scores]:
    """Inner product and cosine of the loss gradients at one checkpoint."""
    products = _inner_products(checkpoint, question, joint=True)[0]
    cosine = _quotient(products.test_train, products.train_squared.sqrt())
    return {"gradient dot product": products.test_train, "gradient cosine": cosine}


def exact_at(
    checkpoint: Checkpoint, question: Question, regularizations: tuple[float, ...], joint: bool
) -> Iterator[tuple[float, Normalised]]:
    """Influences by the exact damped Gauss–Newton solve at one checkpoint."""
    systems = _inner_products(checkpoint, question, joint)
    residuals = residual_sizes(checkpoint.model(), question.train)
    for regularization in regularizations:
        parts = [exact_influences(system, regularization) for system in systems]
        yield (
            regularization,
            Normalised(sum(part for part, _ in parts), sum(part for _, part in parts), residuals),
        )


def _inner_products(checkpoint: Checkpoint, question: Question, joint: bool) -> list[InnerProducts]:
    # In float64: λ is many orders of magnitude below the largest inner product.
    exact = ExactInfluence(checkpoint.model().double(), joint=joint)
    train, queries = ([(side.vectors.double(), side.labels)] for side in (question.train, question.queries))
    return exact.inner_products(train, queries, train)
