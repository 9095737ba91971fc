"""Model and reviews of a setting, written to files that every engine's environment can read.

`python -m benchmarks.inputs '{"name": …}' FOLDER` writes them; it alone needs `support`'s loaders.
pyDVL's environment is too old for `support`, so measurements of all engines read the files
(`read`), which also spares each of them tokenising again.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from benchmarks.plan import Setting

PAD = 0
SEED = 0
POOL = 1000
"""Reviews of either split among which those of a setting are looked for, or as many as are wanted."""

SIZES = ("vocab_size", "dim", "hidden_dim", "n_layers", "n_heads")


class Classifier(nn.Module):
    """Token ids in, logits out: `support.ModelLogitsWrapper` for any version of transformers."""

    def __init__(self, model: nn.Module, tracked: list[str]):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.eval()  # the wrapper too: engines ask the module they are given
        self.tracked = [f"model.{name}" for name in tracked]
        for name in self.tracked:
            self.get_submodule(name).requires_grad_(True)

    def token_mask(self, input_ids: Tensor) -> Tensor:
        return input_ids != PAD

    def forward(self, input_ids: Tensor) -> Tensor:
        mask = self.token_mask(input_ids).long()
        return self.model(input_ids=input_ids, attention_mask=mask).logits


@dataclass(frozen=True)
class Reviews:
    """Token ids `(reviews, tokens)`, padded at their end, and labels `(reviews,)`."""

    input_ids: Tensor
    labels: Tensor

    def first(self, count: int) -> "Reviews":
        if count > len(self.labels):
            raise ValueError(f"{count} reviews are asked for, the setting has {len(self.labels)}.")
        return Reviews(self.input_ids[:count], self.labels[:count])

    def whole(self) -> tuple[Tensor, Tensor]:
        """All of them as one batch, padded to the longest."""
        return trimmed(self.input_ids), self.labels

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """In order, each batch padded to its longest review."""
        pairs = zip(self.input_ids.split(size), self.labels.split(size), strict=True)
        return [(trimmed(ids), labels) for ids, labels in pairs]


def trimmed(input_ids: Tensor) -> Tensor:
    """Without the columns that are padding in every row."""
    return input_ids[:, : int((input_ids != PAD).sum(dim=1).max())]


def read(folder: Path, **model_options) -> tuple[Classifier, Reviews, Reviews]:
    """Classifier in evaluation mode, train reviews, test reviews, as `write` left them."""
    described = json.loads((folder / "model.json").read_text())
    config = DistilBertConfig(num_labels=2, **described["sizes"], **model_options)
    model = DistilBertForSequenceClassification(config)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    reviews = load_file(folder / "reviews.safetensors")
    train, test = (
        Reviews(reviews[f"{split}_ids"], reviews[f"{split}_labels"]) for split in ("train", "test")
    )
    return Classifier(model, described["tracked"]), train, test


def write(setting: Setting, folder: Path) -> None:
    """Model and the first fitting reviews of either split, shuffled as in the notebooks."""
    from support.imdb import ImdbDataset, load_imdb
    from support.model import load_tokenizer, require_gradients_only

    imdb, tokenizer = load_imdb(), load_tokenizer()
    tensors = {}
    for split in ("train", "test"):
        pool = imdb[split].shuffle(seed=SEED)
        pool = pool.select(range(min(len(pool), max(POOL, setting.kept))))
        dataset = ImdbDataset(pool, tokenizer, max_tokens=setting.tokens)
        enough = setting.tokens if setting.exactly else 0
        rows = [row for row, length in enumerate(dataset.lengths()) if length >= enough][: setting.kept]
        tensors[f"{split}_ids"], tensors[f"{split}_labels"], _ = dataset.batch(rows)
    model = model_of(setting)
    described = {
        "sizes": {name: getattr(model.config, name) for name in SIZES},
        "tracked": require_gradients_only(model),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "reviews.safetensors")
    save_file(model.state_dict(), folder / "model.safetensors")
    # Last, and by its presence the sign that the others are whole.
    (folder / "model.json").write_text(json.dumps(described, indent=1))


def model_of(setting: Setting) -> DistilBertForSequenceClassification:
    """The packaged classifier, or a DistilBERT of the setting's width with weights drawn by seed."""
    from support.model import load_model

    if setting.width is None:
        return load_model()
    torch.manual_seed(SEED)
    config = DistilBertConfig(
        dim=setting.width, hidden_dim=4 * setting.width, n_layers=6, n_heads=12, num_labels=2
    )
    return DistilBertForSequenceClassification(config).eval()


if __name__ == "__main__":
    write(Setting(**json.loads(sys.argv[1])), Path(sys.argv[2]))
