"""What the chapters from 04 on share: the reviews, the finished model and its early snapshot, and the engine.

The one setting in which a story about single pairs is told. A retrained whole model agrees best with it
among all that `hessian_regularization` takes (`experiments/whole_model.csv`, on the queries to choose by).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from support import assets
from support.cache import fit_or_load
from support.ekfac import EkfacInfluence
from support.imdb import ImdbDataset, load_imdb
from support.model import ModelLogitsWrapper, load_model, load_tokenizer, require_gradients_only

SNAPSHOT = "20-percent"
REGULARIZATION = "auto"


@dataclass(frozen=True)
class Story:
    """Reviews and model. `model` is the finished one, whose predictions are to be explained; `early_model`
    the same model a fifth of the way through its training, at which influences are taken."""

    imdb: Mapping[str, Dataset]
    tokenizer: PreTrainedTokenizerBase
    model: ModelLogitsWrapper
    early_model: ModelLogitsWrapper
    train: ImdbDataset
    test: ImdbDataset

    @property
    def train_loader(self) -> DataLoader:
        """The training reviews, seven in a batch."""
        return self.train.loader(batch_size=7)

    @property
    def test_loader(self) -> DataLoader:
        """The test reviews, five in a batch."""
        return self.test.loader(batch_size=5)


def begin(source: str, seed: int, num_train: int, num_test: int) -> Story:
    """Seeded samples of both splits, and the model with the layers of `TRACKED_LAYERS` open, ready for the
    engine. The hub has no snapshots: a line says that its finished model is taken. Raises as the loaders."""
    imdb, tokenizer = load_imdb(source), load_tokenizer(source)
    packaged = assets.is_packaged(source)
    if not packaged:
        print("The hub's model has no snapshots: the finished model stands in for the early one.")
    models = []
    for snapshot in ("final", SNAPSHOT if packaged else "final"):
        model = load_model(source, snapshot=snapshot)
        require_gradients_only(model)
        models.append(ModelLogitsWrapper(model, tokenizer.pad_token_id).eval())
    samples = (
        ImdbDataset(imdb[split].shuffle(seed=seed).select(range(size)), tokenizer)
        for split, size in [("train", num_train), ("test", num_test)]
    )
    return Story(imdb, tokenizer, *models, *samples)


def early_engine(story: Story) -> EkfacInfluence:
    """The engine in the recommended setting, fitted on the training reviews, or taken from the cache."""
    engine = EkfacInfluence(story.early_model, hessian_regularization=REGULARIZATION, progress=True)
    return fit_or_load(engine, story.train_loader)
