"""`python -m experiments.finetune`: teach the packaged encoder sentiment, on the packaged train split.

LoRA (Hu et al. 2021) on every attention and feed-forward projection; the two layers of the head are
trained in full, as `experiments.finetuning` trains.

Leaves in the output folder one adapter per snapshot and the `final` one (float16, safetensors), the
training record `record.json`, and `held_out.csv`: what the final model says about each held-out
review. They are written beside that folder, in one that ends in `.unfinished`, and take its place when
all is done; `--output support/adapter` replaces the committed ones.
"""

import argparse
from pathlib import Path

import pandas as pd
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from experiments.finetuning import Finetuning, Recipe, record, train
from support import assets
from support.imdb import ImdbDataset, load_imdb
from support.model import (
    ModelLogitsWrapper,
    class_probabilities,
    load_tokenizer,
    merge_adapter,
    packaged_encoder,
)


def evaluate(folder: Path, held_out: ImdbDataset) -> pd.DataFrame:
    """One row per held-out review: its true label and the final model's probability of positive."""
    model = ModelLogitsWrapper(merge_adapter(packaged_encoder(), folder).eval())
    probabilities = class_probabilities(model, held_out, progress=True)
    return pd.DataFrame(
        {
            "label": held_out.labels.numpy(),
            "tokens": held_out.lengths(),
            "positive_probability": probabilities[:, 1].numpy().round(6),
        }
    )


def held_out_scores(predictions: pd.DataFrame) -> dict:
    """Accuracy, F1 and confusion matrix (rows true, columns predicted) of an `evaluate` table."""
    predicted = (predictions["positive_probability"] > 0.5).astype(int)
    return {
        "reviews": len(predictions),
        "accuracy": accuracy_score(predictions["label"], predicted),
        "f1": f1_score(predictions["label"], predicted),
        "confusion": confusion_matrix(predictions["label"], predicted).tolist(),
    }


def main() -> None:
    defaults = Recipe()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/adapter"))
    parser.add_argument("--rows", type=int, help="train on that many reviews only (default: all)")
    parser.add_argument("--test-rows", type=int, help="evaluate on that many only (default: all)")
    parser.add_argument("--epochs", type=int, default=defaults.epochs)
    parser.add_argument("--max-tokens", type=int, default=defaults.max_tokens)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    arguments = parser.parse_args()
    recipe = Recipe(seed=arguments.seed, epochs=arguments.epochs, max_tokens=arguments.max_tokens)

    imdb, tokenizer = load_imdb(), load_tokenizer()
    train_reviews, test_reviews = (
        imdb[split].shuffle(seed=recipe.seed).select(range(rows)) if rows else imdb[split]
        for split, rows in [("train", arguments.rows), ("test", arguments.test_rows)]
    )
    dataset = ImdbDataset(train_reviews, tokenizer, recipe.max_tokens)
    run = Finetuning(packaged_encoder(recipe.seed), dataset, recipe)
    unfinished = arguments.output.with_name(f"{arguments.output.name}.unfinished")
    snapshots = train(run, unfinished)

    held_out = evaluate(unfinished / "final", ImdbDataset(test_reviews, tokenizer))
    held_out.to_csv(unfinished / "held_out.csv", index=False)
    about = {
        "encoder_sha256": assets.ENCODER_WEIGHTS.sha256,
        "reviews_sha256": assets.REVIEWS.sha256,
        "train_reviews": len(dataset),
    }
    record(run, snapshots, about, held_out_scores(held_out), unfinished, arguments.output)


if __name__ == "__main__":
    main()
