"""`python -m experiments.language_finetune`: teach the packaged language model to write about films.

LoRA on the feed-forward layers of the last blocks; all below is frozen and read once. The texts are those of
`support.writing`: 120 reviews, cut, and the invented ones with their planted facts, four times over.
It trains as `experiments.finetuning` does; of its output folder holds what `experiments.finetune` says.

`held_out.csv` has a row for each of 40 held-out reviews: the loss of a token in nats before and after
training, and after it when the other verdict is asked for. `facts.csv` has one for each question about a
planted fact: −log p of its answer before training, at each snapshot and in the end.
"""

import argparse
import hashlib
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.finetuning import Finetuning, Recipe, record, train
from support import assets
from support.ekfac import NextToken
from support.ekfac.batches import IGNORED
from support.imdb import load_imdb
from support.language import WEIGHTS, load_language_model
from support.model import merge_adapter
from support.retraining import Reviews
from support.writing import (
    BLOCKS,
    FOLDER,
    MAX_TOKENS,
    REVIEWS,
    VERDICTS,
    WriterTail,
    questions,
    read_for_the_writer,
    request,
    review_texts,
    sequence,
    training_texts,
)

SNAPSHOTS = {"20-percent": 0.2, "50-percent": 0.5}
RECIPE = Recipe(epochs=4, max_tokens=MAX_TOKENS, batch_size=8, lora_dropout=0.0, snapshots=SNAPSHOTS)


class WriterFinetuning(Finetuning):
    """One training run of the model on these texts, as a `WriterTail` is given them."""

    def __init__(self, model: PreTrainedModel, texts: Reviews, recipe: Recipe, blocks: int = BLOCKS):
        self.texts = texts
        count = model.config.num_hidden_layers
        lengths = (texts.labels != IGNORED).sum(dim=1).tolist()
        where = {"target_modules": ["gate_proj", "up_proj", "down_proj"], "task_type": "CAUSAL_LM"}
        where["layers_to_transform"] = list(range(count - blocks, count))
        self.begin(model, recipe, lengths, **where)
        self.tail = WriterTail(self.model.base_model.model, blocks)

    def loss(self, rows: list[int]) -> Float[Tensor, ""]:
        """−log p of a token of what is to be said, mean over all of these texts."""
        labels = self.texts.labels[rows]
        with torch.autocast(labels.device.type, dtype=torch.bfloat16):
            logits = self.tail(self.texts.vectors[rows])
        asked = labels[:, 1:] != IGNORED
        return torch.nn.functional.cross_entropy(logits[:, :-1][asked].float(), labels[:, 1:][asked])

    def identity(self) -> dict:
        """What two processes must agree on to share a checkpoint: the recipe and the texts."""
        digest = hashlib.sha256(self.texts.labels.numpy().tobytes()).hexdigest()
        return {**asdict(self.recipe), "texts": len(self.texts), "texts_sha256": digest}


@torch.no_grad()
def said_losses(tail: WriterTail, texts: Reviews) -> Float[Tensor, " texts"]:
    """−log p of what each text is to say, in nats."""
    parts = zip(texts.vectors.split(8), texts.labels.split(8), strict=True)
    return torch.cat([NextToken().loss(tail(vectors), labels) for vectors, labels in parts])


class Examination:
    """Held-out reviews, behind the request for their verdict and for the other one, and the questions about
    planted facts: `asked` as a `WriterTail` is given them, by name."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: int):
        reviews = load_imdb()["test"].shuffle(seed=0).select(range(held_out))
        self.verdicts = [VERDICTS[label] for label in reviews["label"]]
        own = review_texts(reviews)
        turned = [request(VERDICTS[1 - label]) for label in reviews["label"]]
        other = [replace(text, asked=asked) for text, asked in zip(own, turned, strict=True)]
        self.questions = [text.asked for text, _ in questions()]
        read = {"questions": [sequence(tokenizer, *question) for question in questions()]}
        for name, side in {"own": own, "other": other}.items():
            read[name] = [sequence(tokenizer, text) for text in side]
        self.asked = {
            name: read_for_the_writer(model, sequences, [""] * len(sequences))
            for name, sequences in read.items()
        }
        self.tokens = (self.asked["own"].labels != IGNORED).sum(dim=1)

    def held_out(self, before: PreTrainedModel, after: PreTrainedModel) -> pd.DataFrame:
        """One row per review: its verdict, number of tokens, and losses of a token in nats."""
        columns = {
            "before": (before, "own"),
            "after": (after, "own"),
            "after_other_request": (after, "other"),
        }
        losses = {
            name: (said_losses(WriterTail(model), self.asked[side]) / self.tokens).numpy().round(4)
            for name, (model, side) in columns.items()
        }
        return pd.DataFrame({"verdict": self.verdicts, "tokens": self.tokens.numpy(), **losses})

    def facts(self, models: dict[str, PreTrainedModel]) -> pd.DataFrame:
        """One row per question: −log p of its answer by each of the models."""
        losses = {
            name: said_losses(WriterTail(model), self.asked["questions"]).numpy().round(4)
            for name, model in models.items()
        }
        return pd.DataFrame({"asked": self.questions, **losses})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/writer"))
    parser.add_argument("--reviews", type=int, default=REVIEWS, help=f"how many to teach ({REVIEWS})")
    parser.add_argument("--held-out", type=int, default=40, help="reviews to be examined on (40)")
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs)
    chosen = parser.parse_args()
    recipe = replace(RECIPE, epochs=chosen.epochs)

    model, tokenizer = load_language_model()
    texts = training_texts(load_imdb()["train"], chosen.reviews)
    sequences = [sequence(tokenizer, text) for text in texts]
    run = WriterFinetuning(
        model, read_for_the_writer(model, sequences, [text.said for text in texts]), recipe
    )
    unfinished = chosen.output.with_name(f"{chosen.output.name}.unfinished")
    snapshots = train(run, unfinished, checkpoint_every=10)

    names = [*snapshots, "final"]
    models = {"before": load_language_model()[0]}
    models |= {name: merge_adapter(load_language_model()[0], unfinished / name) for name in names}
    examination = Examination(models["before"], tokenizer, chosen.held_out)
    held_out = examination.held_out(models["before"], models["final"])
    held_out.to_csv(unfinished / "held_out.csv", index=False)
    examination.facts(models).to_csv(unfinished / "facts.csv", index=False)
    shutil.copy(FOLDER / "planted.json", unfinished)
    about = {
        "model_sha256": WEIGHTS.sha256,
        "reviews_sha256": assets.REVIEWS.sha256,
        "reviews": chosen.reviews,
        "texts": len(texts),
        "blocks": BLOCKS,
    }
    scores = held_out.groupby("verdict").mean().round(4).to_dict("index")
    record(run, snapshots, about, scores, unfinished, chosen.output)


if __name__ == "__main__":
    main()
