"""08: how the influence on a prediction is spread over many training examples. `scores` is
`(queries, training)`; shares are of sizes, signs left out, in the sum over all examples.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist
from sklearn.feature_extraction.text import TfidfVectorizer

from support.chapters.figures import NEGATIVE, NEUTRAL, POSITIVE, new_axes, show


def cumulative_shares(scores: np.ndarray) -> np.ndarray:
    """`(queries, training)`: at column k − 1 the share of the k strongest training examples.
    Raises `ValueError` for a query that nothing acts on."""
    sizes = -np.sort(-np.abs(scores), axis=1)
    whole = sizes.sum(axis=1, keepdims=True)
    if not whole.all():
        query = np.argmin(whole != 0)
        raise ValueError(f"All influences on query {query} are zero, and have no shares. Leave it out.")
    shares = np.cumsum(sizes, axis=1) / whole
    shares[:, -1] = 1  # to rounding it may be less
    return shares


def examples_for(share: float, scores: np.ndarray) -> np.ndarray:
    """`(queries,)`: how many of the strongest training examples it takes to have a share."""
    return (cumulative_shares(scores) < share).sum(axis=1) + 1


def word_similarities(texts: Sequence[str]) -> np.ndarray:
    """`(texts, texts)`: cosine of the TF-IDF vectors of every two texts, from 0 to 1."""
    words = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    return (words @ words.T).toarray()


def distances(scores: np.ndarray) -> np.ndarray:
    """`(training, training)`: ‖a − b‖ over the larger of ‖a‖ and ‖b‖, with a and b the influences of two
    training examples on all queries. 0 means the same on every query, none on any included."""
    columns = scores.T.astype(np.float64)
    norms = np.linalg.norm(columns, axis=1)
    larger = np.maximum.outer(norms, norms)
    return cdist(columns, columns) / np.where(larger > 0, larger, 1)


def nearest(scores: np.ndarray) -> pd.DataFrame:
    """Each training example with the one at the least of the `distances`, nearest pairs first: columns
    `one`, `other`, `distance`; a pair stands once."""
    apart = distances(scores)
    np.fill_diagonal(apart, np.inf)
    pairs = np.stack([np.arange(len(apart)), apart.argmin(axis=1)])
    frame = pd.DataFrame(np.sort(pairs, axis=0).T, columns=["one", "other"])
    frame["distance"] = apart.min(axis=1)
    return frame.drop_duplicates(["one", "other"]).sort_values("distance", ignore_index=True)


def concentration(scores: np.ndarray, marked: Sequence[float], title: str) -> None:
    """Share of the influence in the k strongest training examples: a line for each query, their median
    bold with dots where it reaches the `marked` shares, and equal influences dashed."""
    axes = new_axes(7, 3.4)
    shares = 100 * cumulative_shares(scores)
    median, counts = np.median(shares, axis=0), np.arange(1, scores.shape[1] + 1)
    names = ["each query", *[None] * (len(shares) - 1)]
    axes.plot(counts, shares.T, color=NEUTRAL, linewidth=0.7, alpha=0.5, label=names)
    axes.plot(counts, median, color=POSITIVE, linewidth=2.2, label="median of the queries")
    axes.plot(counts, 100 * counts / len(counts), "--", color=NEGATIVE, label="if all were equal")
    for share in marked:
        place = (median < 100 * share).sum()
        here = counts[place], median[place]
        axes.plot(*here, "o", color=POSITIVE)
        axes.annotate(f"{share:.0%}: {here[0]:,}", here, (8, -10), textcoords="offset points")
    axes.set(xscale="log", xlim=(1, len(counts)), ylim=(0, 100))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="upper left")
    show(axes, title=title, xlabel="strongest training reviews", ylabel="share of the influence, %")


def twins(distance: pd.Series, similarity: pd.Series, title: str) -> None:
    """Pairs of training examples by how far apart their influences are, and how alike their texts."""
    axes = new_axes(7, 3.2)
    axes.scatter(distance, similarity, s=16, color=POSITIVE, alpha=0.6, linewidth=0)
    axes.set_xscale("symlog", linthresh=1e-4)  # those of twins are 0 to rounding
    axes.set(xlim=(-1e-5, 1.2), ylim=(-0.03, 1.06), title=title)
    show(axes, xlabel="distance of their influences", ylabel="similarity of their words")
