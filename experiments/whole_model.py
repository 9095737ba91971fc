"""`python -m experiments.whole_model`: a bank of retrainings of the whole model, not of its tail.

The packaged encoder is fine-tuned as the collection's model is, LoRA on every projection of all blocks
and the head in full, on random halves of a thousand reviews, and every query's margin is kept. Nothing
but the rows and their order is random: LoRA starts from one draw, and there is no dropout, so that
retrainings differ by what they were trained on. Reviews are cut at 128 tokens.

About 80 s a training on one thread. A run that was killed goes on where it was; all subsets are first
trained with one seed, then with the next, so that what is there is a bank at any time.
"""

import copy
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experiments.bank_making import BANKS, QUERIES, TRAIN_REVIEWS, fill
from experiments.finetuning import Finetuning, Recipe
from support.ekfac.storage import digest
from support.imdb import ImdbDataset, load_imdb
from support.judge import Design
from support.model import ModelLogitsWrapper, load_tokenizer, packaged_encoder

RECIPE = Recipe(epochs=3, max_tokens=128, batch_size=16, lora_dropout=0.0, snapshots={})
DESIGN = Design(subsets=60, seeds=2)
BANK = BANKS / "whole_model.safetensors"


def reviews(split: str, rows: int) -> ImdbDataset:
    """The first rows of a split, shuffled with seed 0: those of the `main` bank, cut at 128 tokens."""
    chosen = load_imdb()[split].shuffle(seed=0).select(range(rows))
    return ImdbDataset(chosen, load_tokenizer(), RECIPE.max_tokens)


class WholeRetraining:
    """Trains LoRA and head on rows of these reviews again and again from the same start."""

    def __init__(self, dataset: ImdbDataset, recipe: Recipe = RECIPE):
        self.dataset, self.recipe = dataset, recipe
        self.start = {name: tensor.detach().clone() for name, tensor in self._begun([0], 0).trained.items()}

    def steps(self, rows: list[int], seed: int) -> Iterator[Finetuning]:
        """One training, after each of its steps, and first before them."""
        run = self._begun(rows, seed)
        for name, tensor in self.start.items():
            run.trained[name].data.copy_(tensor)
        yield run
        while run.steps_done < len(run.batches):
            run.step()
            yield run

    def _begun(self, rows: list[int], seed: int) -> Finetuning:
        model = packaged_encoder()
        model.set_attn_implementation("eager")  # faster backwards than fused in bfloat16 on a CPU
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return Finetuning(model, chosen(self.dataset, rows), replace(self.recipe, seed=seed))


def chosen(dataset: ImdbDataset, rows: list[int]) -> ImdbDataset:
    """Some of the reviews."""
    part = copy.copy(dataset)
    part.texts = [dataset.texts[row] for row in rows]
    part.input_ids = [dataset.input_ids[row] for row in rows]
    part.labels = dataset.labels[rows]
    return part


@torch.no_grad()
def margins(run: Finetuning, queries: ImdbDataset) -> Float[Tensor, " queries"]:
    """Logit of each query's own label minus that of the other one."""
    run.model.eval()
    model = ModelLogitsWrapper(run.model)
    logits = torch.cat([model(input_ids) for input_ids, *_ in queries.loader(50)])
    run.model.train()
    return (logits[:, 1] - logits[:, 0]) * (2.0 * queries.labels - 1)


def make(path: Path = BANK, design: Design = DESIGN) -> None:
    """The bank, from `path` as far as it was made before; margins of what is not yet trained are NaN.

    Raises `BankMismatch` when the file holds another bank.
    """
    train, queries = reviews("train", TRAIN_REVIEWS), reviews("test", QUERIES)
    named = {f"train {row}": ids for row, ids in enumerate(train.input_ids)}
    named |= {f"query {row}": ids for row, ids in enumerate(queries.input_ids)}
    retraining = WholeRetraining(train)

    def trained(rows: Tensor, seed: int) -> Tensor:
        *_, run = retraining.steps(rows.tolist(), seed)
        return margins(run, queries)

    fill(
        path,
        {"recipe": asdict(RECIPE), "design": asdict(design), "reviews": digest(named)},
        design.membership(train.labels),
        torch.full((design.subsets, design.seeds, len(queries)), torch.nan, dtype=torch.float16),
        trained,
    )


if __name__ == "__main__":
    make()
