"""What a classifier says about many reviews."""

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from support.imdb import ImdbDataset
from support.model import ADAPTER_FOLDER, LABELS, ModelLogitsWrapper


def class_probabilities(
    model: ModelLogitsWrapper, dataset: ImdbDataset, batch_size: int = 16, progress: bool = False
) -> Float[Tensor, "reviews classes"]:
    """Softmax of the logits of every review, in the order of the dataset.

    Reviews of similar length share a batch, so that little work goes into padding.
    """
    by_length = sorted(range(len(dataset)), key=lambda row: -dataset.input_ids[row].numel())
    batches = [
        by_length[start : start + batch_size] for start in range(0, len(dataset), batch_size)
    ]
    probabilities = []
    with (
        torch.inference_mode(),
        tqdm(total=len(dataset), unit="review", disable=not progress) as bar,
    ):
        for rows in batches:
            input_ids, _, _ = dataset.batch(rows)
            probabilities.append(model(input_ids).softmax(dim=1))
            bar.update(len(rows))
    in_order = torch.empty(len(dataset), probabilities[0].shape[1])
    in_order[by_length] = torch.cat(probabilities).float()
    return in_order


def held_out_predictions() -> pd.DataFrame:
    """What the packaged model says about each of the 5,000 held-out reviews, in their order.

    Columns `label`, `tokens` (after the cut) and `positive_probability`. Written by
    `python -m support.finetune` after training, so that no reader has to wait for it.
    """
    return pd.read_csv(ADAPTER_FOLDER / "held_out.csv")


def print_sentiment_preds(
    model: ModelLogitsWrapper, model_input: Int[Tensor, "..."], true_label: int | Tensor
) -> None:
    """Print the probability of both sentiments and the true label of one review, in words.

    `model_input` is `(tokens,)` or `(1, tokens)`.
    """
    with torch.inference_mode():
        negative, positive = model(model_input.reshape(1, -1)).softmax(dim=1)[0].tolist()
    print(
        f"positive {positive:6.1%}   negative {negative:6.1%}   true label: {LABELS[int(true_label)]}"
    )
