"""Which models a job takes for models that write, adapters among them; and which it refuses."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BertConfig, BertModel, OPTConfig, OPTForCausalLM

from support.job.errors import BadSetting, ModelNotUsable
from support.job.settings import Subject
from support.job.tasks import load_task
from support.model import with_adapter
from tests import tiny_job
from tests.tiny_language import MARKS, WORDS, make_adapter, make_model, make_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    return make_adapter(model, folder, "down_proj", "q_proj", lora_alpha=6)


def tracked(task):
    names = {name for name, weight in task.model.named_parameters() if weight.requires_grad}
    return {name.removesuffix(".weight").removesuffix(".bias") for name in names}


def refused(told, kind=ModelNotUsable, **settings):
    with pytest.raises(kind, match=told):
        load_task(Subject(**{name: str(value) for name, value in settings.items()}), CPU)


def test_the_task_is_what_the_models_class_says_unless_it_is_named(model, tmp_path):
    assert load_task(Subject(model=str(model)), CPU).called == "causal language model"
    assert load_task(Subject(model=str(model), task="language-model"), CPU).called == "causal language model"
    classifier = tiny_job.make_model(tmp_path)
    assert load_task(Subject(model=str(classifier)), CPU).called == "sequence classifier"
    refused("has no weights that fit score.weight, which would be drawn", model=model, task="classifier")


def test_a_model_of_neither_task_is_refused_with_what_would_do(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, vocab_size=20)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    refused(
        "is a BertModel: no classifier of texts, .* and no model that writes, .* say with --task",
        model=tmp_path,
    )


def test_a_shared_head_that_is_asked_for_is_refused_with_the_reason(tmp_path):
    model = make_model(tmp_path, "gpt2")
    told = "has 'lm_head' in its name, but for those that share a weight with another"
    refused(told, model=model, layers="lm_head")


def test_a_model_without_feed_forward_layers_by_name_has_gradients_in_all_but_the_head(tmp_path):
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 1}
    config = OPTConfig(**sizes, vocab_size=len(MARKS) + len(WORDS), num_attention_heads=2, pad_token_id=0)
    OPTForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    task = load_task(Subject(model=str(tmp_path)), CPU)
    assert {name.rpartition(".")[2] for name in tracked(task)} >= {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert not {name for name in tracked(task) if "lm_head" in name}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_feed_forward_layers_are_tracked_and_neither_head_nor_embeddings(tmp_path, kind):
    found = tracked(load_task(Subject(model=str(make_model(tmp_path, kind))), CPU))
    assert found
    assert all(".mlp." in name for name in found)


def test_layers_may_be_chosen_by_several_parts_of_a_name_that_follow_each_other(model):
    task = load_task(Subject(model=str(model), layers="1.mlp"), CPU)
    assert tracked(task) == {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}


def test_an_adapters_matrices_are_tracked_and_the_base_is_the_one_that_it_names(adapter, model):
    task = load_task(Subject(model=str(adapter)), CPU)
    assert len(tracked(task)) == 2 * 2 * 2
    assert all(".lora_" in name for name in tracked(task))
    assert task.config["adapter"]["lora_alpha"] == 6
    ids = torch.arange(8).view(2, 4)
    base = load_task(Subject(model=str(model)), CPU).model(input_ids=ids).logits
    merged = with_adapter(AutoModelForCausalLM.from_pretrained(model), LoraConfig.from_pretrained(adapter))
    merged.load_adapter(adapter, "default")
    torch.testing.assert_close(
        task.model(input_ids=ids).logits, merged.merge_and_unload()(input_ids=ids).logits
    )
    assert (task.model(input_ids=ids).logits - base).abs().max() > 0.1


def moved(adapter, folder, **changed):
    """The adapter elsewhere, its configuration changed."""
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return folder


def test_the_base_of_an_adapter_may_be_named(adapter, model, tmp_path):
    nowhere = moved(adapter, tmp_path / "nowhere", base_model_name_or_path="gone")
    assert tracked(load_task(Subject(model=str(nowhere), base=str(model)), CPU))
    nameless = moved(adapter, tmp_path / "nameless", base_model_name_or_path=None)
    refused("doesn't say which model it was trained on. Name that with --base", model=nameless)


def test_an_adapter_of_another_model_is_refused_with_what_that_lacks(adapter, tmp_path):
    other = make_model(tmp_path, "gpt2")
    refused(
        "does not fit .*: Target modules .* not found .* Name its model with --base",
        model=adapter,
        base=other,
    )


def test_an_adapter_of_other_sizes_is_refused_by_its_first_tensor(adapter, tmp_path):
    larger = moved(adapter, tmp_path, r=3)
    told = r"does not fit .*: tensor '.*lora_A.*' is \(2, 12\) in the adapter, \(3, 12\) in the model\. Name"
    refused(told, model=larger)


def test_an_adapter_that_is_no_lora_and_one_without_safetensors_are_refused(adapter, tmp_path):
    refused(
        "holds an adapter of kind IA3; the job reads LoRA",
        model=moved(adapter, tmp_path / "a", peft_type="IA3"),
    )
    pickled = moved(adapter, tmp_path / "b")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused("the job reads LoRA, from adapter_model.safetensors", model=pickled)


def test_a_base_without_an_adapter_is_refused(model):
    refused(
        "^--base gpt2: --model .* is no folder with a LoRA adapter. Leave it out",
        BadSetting,
        model=model,
        base="gpt2",
    )


def test_a_setting_of_the_other_task_is_refused(model, tmp_path):
    told = "^--label-column means nothing to a causal language model. Leave it out, or see --task"
    refused(told, BadSetting, model=model, label_column="mood")
    classifier = tiny_job.make_model(tmp_path)
    with pytest.raises(BadSetting, match="^--pieces means nothing to a sequence classifier"):
        load_task(Subject(model=str(classifier), pieces=True), CPU)


def test_of_one_token_nothing_can_be_asked(model):
    with pytest.raises(ModelNotUsable, match="^--max-tokens 1: 0 are the tokenizer's own. Use 2 or more"):
        load_task(Subject(model=str(model), max_tokens=1), CPU)


def test_an_adapter_with_a_tokenizer_of_its_own_is_read_with_that(adapter, tmp_path):
    make_tokenizer("{{ 'mine' }}").save_pretrained(moved(adapter, tmp_path))
    assert load_task(Subject(model=str(tmp_path)), CPU).tokenizer.chat_template == "{{ 'mine' }}"
