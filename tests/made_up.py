"""Made-up reviews for the judge, small enough to train on in a moment."""

import torch

from support.retraining import Reviews

WIDTH = 384


def reviews(number, seed=0):
    """Made-up reviews whose label the vectors tell, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (number,), generator=generator)
    vectors = torch.randn(number, WIDTH, generator=generator)
    vectors[:, 0] += 4.0 * (2 * labels - 1)
    words = [["dull", "flat", "poor"], ["fine", "great", "warm"]]
    texts = [f"a {words[label][n % 3]} film number {n}" for n, label in enumerate(labels.tolist())]
    return Reviews(vectors, labels, texts)
