"""The sentiment classifier: where it comes from, what of it gets gradients, what it says.

Both sources give a `DistilBertForSequenceClassification`. The packaged one is all-MiniLM-L6-v2, a
six-layer BERT of width 384, whose weights fit a DistilBERT exactly, with our LoRA adapter merged in.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import peft
import torch
import transformers
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DistilBertForSequenceClassification as Classifier
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from support import assets
from support.imdb import ImdbDataset

HUB_MODEL = "assemblyai/distilbert-base-uncased-sst2"
ADAPTER_FOLDER = Path(__file__).parent / "adapter"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
TRACKED_LAYERS = ("ffn", "pre_classifier", "classifier")
"""Parts of the names of the linear layers the collection looks at."""

LABELS = {0: "negative", 1: "positive"}


def load_tokenizer(source: str = "packaged", revision: str | None = None) -> PreTrainedTokenizerBase:
    """The uncased WordPiece tokenizer that belongs to `load_model(source)`. Raises `UnknownSource`,
    `AssetMissing`, `AssetDamaged` or `HubUnreachable`."""
    if not assets.is_packaged(source):
        return assets.from_hub(transformers.AutoTokenizer.from_pretrained, HUB_MODEL, revision)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk", "mask")}
    path = str(assets.find(assets.TOKENIZER))
    return transformers.PreTrainedTokenizerFast(tokenizer_file=path, model_max_length=512, **special)


def load_model(source: str = "packaged", revision: str | None = None, snapshot: str = "final") -> Classifier:
    """The classifier in evaluation mode, float32.

    `packaged`: the encoder with the adapter `snapshot` merged in; those from the way through training
    are in the repository only. `hub`: `HUB_MODEL` at `revision` (None is the hub's `main`), which has no
    snapshots (`ValueError`). Raises as `load_tokenizer` and `merge_adapter`.
    """
    if assets.is_packaged(source):
        return merge_committed(packaged_encoder(), ADAPTER_FOLDER / snapshot).eval()
    if snapshot != "final":
        raise ValueError(f'The hub\'s model has no snapshot {snapshot!r}. Snapshots need source="packaged".')
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    safe = {"dtype": torch.float32, "use_safetensors": True}  # a pickle could run code
    return assets.from_hub(load, HUB_MODEL, revision, **safe).eval()


def packaged_encoder(head_seed: int = 0) -> Classifier:
    """all-MiniLM-L6-v2 as a DistilBERT under an untrained two-class head drawn from `head_seed`."""
    sizes = {"dim": 384, "hidden_dim": 1536, "n_layers": 6, "n_heads": 12, "num_labels": 2}
    numbers = {name: label for label, name in LABELS.items()}
    config = transformers.DistilBertConfig(**sizes, id2label=LABELS, label2id=numbers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(head_seed)
        model = Classifier(config)
    model.distilbert.load_state_dict(distilbert_state(load_file(assets.find(assets.ENCODER_WEIGHTS))))
    return model


def distilbert_state(bert: dict[str, Tensor]) -> dict[str, Tensor]:
    """A BERT encoder's weights under DistilBERT's names. That of token type 0, which a single sentence
    has everywhere, goes into the position embeddings; BERT's pooler has no counterpart."""
    place = "embeddings.{}_embeddings.weight".format
    words, positions, types = map(place, ("word", "position", "token_type"))
    state = {words: bert[words], positions: bert[positions] + bert[types][0]}
    renamed = {
        "encoder.layer.": "transformer.layer.",
        "attention.self.query": "attention.q_lin",
        "attention.self.key": "attention.k_lin",
        "attention.self.value": "attention.v_lin",
        "attention.output.dense": "attention.out_lin",
        "attention.output.LayerNorm": "sa_layer_norm",
        "intermediate.dense": "ffn.lin1",
        "output.dense": "ffn.lin2",
        "output.LayerNorm": "output_layer_norm",
    }
    for name, weight in bert.items():
        if name.startswith(("encoder.", "embeddings.LayerNorm")):
            for berts, distilberts in renamed.items():
                name = name.replace(berts, distilberts)
            state[name] = weight
    return state


def training_record() -> dict:
    """How the committed adapter was trained and what it reached on the held-out reviews."""
    return json.loads((ADAPTER_FOLDER / "record.json").read_text())


def adapter_sha256(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of an adapter, by name, as a training record keeps it. Raises `AssetMissing`."""
    _require_adapter(folder)
    return {name: assets.sha256(folder / name) for name in ADAPTER_FILES}


def merge_committed(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`merge_adapter` for one of the repository's. Raises `AssetDamaged` unless it has the bytes that its
    training recorded, too."""
    found = adapter_sha256(folder)
    record = json.loads((folder.parent / "record.json").read_text())
    recorded = record.get("adapters_sha256", {}).get(folder.name, {})
    for name in ADAPTER_FILES:
        if found[name] != recorded.get(name):
            differs = f"has SHA-256 {found[name]}, expected {recorded.get(name)}"
            raise assets.AssetDamaged(
                f"{name} of the adapter {folder.name!r} {differs}. "
                f"Take it from the repository again: git checkout -- support/{_home(folder)}"
            )
    return merge_adapter(model, folder)


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the LoRA adapter in `folder` added to its weights: plain linear layers again. Raises
    `AssetMissing` when there is none, and `AssetDamaged` when it can't be read or is not of this model."""
    config, state = _read_adapter(folder)
    try:
        adapted = with_weights(model, config, state)
    except ValueError as error:
        told = f"The adapter {folder.name!r} does not fit the model: {error}"
        raise assets.AssetDamaged(f"{told} Train it again: {_trained_by(folder)}") from error
    return adapted.merge_and_unload().requires_grad_(True)


def with_weights(model: nn.Module, config: peft.LoraConfig, state: Mapping[str, Tensor]) -> peft.PeftModel:
    """The model with an adapter of these weights in its layers. Raises `ValueError` when the model has no
    such layers, and for tensors that are not those of this model, naming the first."""
    with torch.random.fork_rng(devices=[]):  # peft draws weights that are overwritten at once
        adapted = with_adapter(model, config)
    both = state, peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for name in sorted(set().union(*both)):
        found, expected = (tuple(one[name].shape) if name in one else "absent" for one in both)
        if found != expected:
            raise ValueError(f"tensor {name!r} is {found} in the adapter, {expected} in the model.")
    peft.set_peft_model_state_dict(adapted, {name: tensor.float() for name, tensor in state.items()})
    return adapted


def with_adapter(model: nn.Module, config: peft.LoraConfig) -> peft.PeftModel:
    """`peft.get_peft_model`, without a warning that is about peft's own code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.get_peft_model(model, config)


def _require_adapter(folder: Path) -> None:
    for needed in ADAPTER_FILES:
        if not (folder / needed).is_file():
            known = sorted(path.parent.name for path in folder.parent.glob("*/adapter_model.safetensors"))
            raise assets.AssetMissing(
                f"No adapter named {folder.name!r}: {needed} is missing there. "
                f"Adapters found: {known or 'none'}. Train one: {_trained_by(folder)}"
            )


def _read_adapter(folder: Path) -> tuple[peft.LoraConfig, dict[str, Tensor]]:
    _require_adapter(folder)
    try:
        return peft.LoraConfig.from_pretrained(str(folder)), load_file(folder / ADAPTER_FILES[1])
    except (ValueError, TypeError, SafetensorError) as error:
        raise assets.AssetDamaged(
            f"The adapter {folder.name!r} cannot be read ({type(error).__name__}: {error}). "
            f"Take it from the repository again: git checkout -- support/{_home(folder)}"
        ) from error


def _home(folder: Path) -> str:
    """Which of the package's folders of adapters one belongs to, the classifier's or the writer's."""
    return "writer" if folder.parent.name == "writer" else ADAPTER_FOLDER.name


def _trained_by(folder: Path) -> str:
    trained = {"writer": "experiments.language_finetune"}
    return f"python -m {trained.get(_home(folder), 'experiments.finetune')}"


def require_gradients_only(
    model: nn.Module, parts: Sequence[str] = TRACKED_LAYERS, without: Mapping[str, str] | None = None
) -> list[str]:
    """Freeze everything but the linear layers with one of `parts` in their dotted names (no parts: all of
    them); their names. `without` are layers that stay frozen, each with the reason in words, as
    `support.ekfac.layers.uncovered` gives them. Raises `ValueError`, naming the parts there are, for each
    part that matches no layer, and when there is no layer at all."""
    without = without or {}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    linear = [name for name in linear if name not in without]
    there = {part for name in linear for part in name.split(".")}
    for part in parts:
        if not any(is_part(part, name) for name in linear):
            why = next((f", but for those {why}" for name, why in without.items() if is_part(part, name)), "")
            known = ", ".join(sorted(one for one in there if one and not one.isdigit())) or "none"
            raise ValueError(f"No linear layer has {part!r} in its name{why}. There are: {known}.")
    if not linear:
        raise ValueError("The model has no linear layer that EK-FAC covers.")
    chosen = [name for name in linear if not parts or any(is_part(part, name) for part in parts)]
    model.requires_grad_(False)
    for name in chosen:
        model.get_submodule(name).requires_grad_(True)
    return chosen


def is_part(part: str, name: str) -> bool:
    """Whether it is one of the words between the dots of a name, or several that follow each other."""
    return f".{part}." in f".{name}."


class ModelLogitsWrapper(nn.Module):
    """Token ids in, logits out, nothing else: the shape in which the engine wants a model."""

    def __init__(self, model: nn.Module, pad_token_id: int = 0):
        super().__init__()
        self.model, self.pad_token_id = model, pad_token_id
        self.train(model.training)

    def token_mask(self, input_ids: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """True where a token is real, False where it is padding."""
        return input_ids != self.pad_token_id

    def forward(self, input_ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch classes"]:
        mask = self.token_mask(input_ids)
        return self.model(input_ids=input_ids, attention_mask=mask.long()).logits


def class_probabilities(
    model: ModelLogitsWrapper, dataset: ImdbDataset, batch_size: int = 16, progress: bool = False
) -> Float[Tensor, "reviews classes"]:
    """Softmax of the logits of every review, in the order of the dataset."""
    longest_first = torch.tensor(dataset.lengths()).argsort(descending=True, stable=True)
    bar = tqdm(total=len(dataset), unit="review", disable=not progress)
    found = []
    with torch.inference_mode(), bar:
        for rows in longest_first.split(batch_size):
            found.append(model(dataset.batch(rows.tolist())[0]).softmax(dim=1))
            bar.update(len(rows))
    return torch.cat(found).float()[longest_first.argsort()]


def held_out_predictions() -> pd.DataFrame:
    """What the packaged model said of each held-out review after training, in their order: columns
    `label`, `tokens` (after the cut) and `positive_probability`."""
    return pd.read_csv(ADAPTER_FOLDER / "held_out.csv")
