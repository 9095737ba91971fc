"""Of every family of models a job tracks the layers that it can; and it says which models it can't use."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from support.ekfac import EkfacInfluence
from support.job.errors import BadSetting, ModelNotUsable
from support.job.settings import Subject
from support.job.tasks import load_task
from support.model import with_adapter
from tests.tiny_job import make_model

CPU = torch.device("cpu")
SIZES = {"initializer_range": 0.2, "pad_token_id": None}
BERT = SIZES | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
BERT |= {"num_attention_heads": 2, "pad_token_id": 0}
GPT2 = SIZES | {"n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 101, "eos_token_id": 102}
OPT = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
FED = "that are not fed with (batch, tokens, features); the first is"
TWICE = "called more than once; the first is"
ALBERT = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query"
FAMILIES = {
    "Bert": (BERT, ""),
    "Roberta": (BERT, ""),
    "GPT2": (GPT2, ""),
    "Deberta": (BERT | RELATIVE, ""),
    "DebertaV2": (BERT | RELATIVE | {"share_att_key": True}, ""),
    "Albert": (BERT | {"embedding_size": 8}, f"6 {TWICE} '{ALBERT}'"),
    "OPT": (OPT | {"num_attention_heads": 2, "pad_token_id": 0}, f"4 {FED} 'model.decoder.layers.0.fc1'"),
    "Esm": (BERT | {"mask_token_id": 103}, "1 not called; the first is 'esm.contact_head.regression'"),
    "Longformer": (
        BERT | {"attention_window": 4, "max_position_embeddings": 66},
        f"18 {FED} 'longformer.encoder.layer.0.attention.self.query'",
    ),
}
"""Sizes of each configuration, and what is left out of the model's linear layers."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def refused(subject, words):
    with pytest.raises(ModelNotUsable, match=words):
        load_task(subject, CPU)


@pytest.mark.parametrize(("layers", "part"), [("mlp", "mlp"), ("ffn,clasifier", "clasifier"), (",", ",")])
def test_each_part_that_matches_no_layer_is_refused_with_the_names_there_are(tiny, layers, part):
    told = (
        rf"^--layers {layers}: No linear layer has '{part}' in its name\. There are: .* classifier, .*ffn, "
    )
    refused(Subject(model=str(tiny), layers=layers), told)


def test_a_folder_without_a_model_and_a_name_of_the_hub_are_errors_offline(tmp_path, offline):
    refused(Subject(model=str(tmp_path)), r"can't be loaded .*Name a folder that holds config")
    refused(Subject(model="nobody/no-model"), r"^--model nobody/no-model can't be loaded ")


def test_a_tokenizer_without_padding_is_refused(tmp_path):
    make_model(tmp_path)
    bare = transformers.AutoTokenizer.from_pretrained(tmp_path)
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    refused(Subject(model=str(tmp_path)), "has no padding token")


def random_model(folder, tokenizer, family, sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory, tokenizer):
    sizes, left_out = FAMILIES[request.param]
    return random_model(tmp_path_factory.mktemp(request.param), tokenizer, request.param, sizes), left_out


def test_every_family_of_models_has_influences_that_padding_does_not_change(family, tokenizer):
    model = load_task(Subject(model=family[0]), CPU).model
    inputs = tokenizer(["a warm and dull film", "great"], padding=True, return_tensors="pt")
    x, y = inputs["input_ids"], torch.tensor([0, 1])
    engine = EkfacInfluence(model, hessian_regularization=0.1).fit([(x, y)])
    both = engine.influences(x, y)
    short = tokenizer(["great"], return_tensors="pt")["input_ids"]
    assert both.isfinite().all()
    assert (both.diagonal() > 0).all()
    torch.testing.assert_close(engine.influences(short, y[1:]), both[1:, 1:], rtol=1e-3, atol=1e-5)


def test_layers_that_can_not_be_tracked_are_left_out_and_told_of_when_they_were_asked_for(family):
    folder, left_out = family
    told = f"Linear layers that EK-FAC can't cover are left out: {left_out}." if left_out else ""
    assert load_task(Subject(model=folder), CPU).told == told
    head = "score" if "OPT" in folder or "GPT2" in folder else "classifier"
    assert load_task(Subject(model=folder, layers=head), CPU).told == ""


def test_layers_of_which_none_can_be_tracked_are_refused_with_the_reason_and_what_there_is(
    tmp_path, tokenizer
):
    folder = random_model(tmp_path, tokenizer, "DebertaV2", FAMILIES["DebertaV2"][0])
    told = "layer has 'query_proj' in its name, but for those called more than once. There are: attention, "
    refused(Subject(model=folder, layers="dense,query_proj"), told)


def kept(folder, tokenizer, change=lambda weights: weights, **config):
    """A tiny BERT in a folder, its weights and configuration changed."""
    random_model(folder, tokenizer, "Bert", BERT)
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return Subject(model=str(folder))


def headless(weights):
    return {name: tensor for name, tensor in weights.items() if "classifier" not in name}


def of_fewer_words(weights):
    return weights | {WORDS: weights[WORDS][:100].clone()}


def as_they_are(weights):
    return weights


WORDS = "bert.embeddings.word_embeddings.weight"
AT_RANDOM = "no weights that fit classifier.bias, classifier.weight, which would be drawn at random: 2 in all"
ONE_NAME = {"id2label": {"0": "good", "1": "good"}, "label2id": {"good": 0}}


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (headless, {}, AT_RANDOM),
        (as_they_are, {"vocab_size": 99}, f"no weights that fit {WORDS}"),
        (of_fewer_words, {"vocab_size": 100}, "but the model knows 100 tokens.*resize_token_embeddings"),
        (as_they_are, ONE_NAME, "some have the same name: good. Give each its own, in id2label"),
        (as_they_are, {"problem_type": "regression"}, "for regression; .* In Python, .* takes this one"),
        (
            as_they_are,
            {"problem_type": "multi_label_classification"},
            "for multi label classification; .* In Python, .* takes this one",
        ),
    ],
    ids=["no head", "other sizes", "few words", "one name", "regression", "several labels"],
)
def test_a_model_that_does_not_fit_is_refused_with_what_does_not(tmp_path, tokenizer, change, config, words):
    refused(kept(tmp_path, tokenizer, change, **config), words)


@pytest.mark.parametrize("configured", [False, True])
def test_a_model_without_its_tokenizer_is_refused(tmp_path, tokenizer, configured):
    subject = kept(tmp_path, tokenizer)
    for path in tmp_path.glob("*token*"):
        path.unlink()
    if configured:
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    refused(subject, "has no tokenizer: save the model's own beside it")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def adapter(model, folder, **settings):
    """A LoRA adapter in the attention of a tiny BERT, with a head of three classes, nothing of it zero."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=3, ignore_mismatched_sizes=True
    )
    config = LoraConfig(r=2, target_modules=["query"], **settings)
    adapted = with_adapter(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("base", ["encoder", "classifier of two classes"])
def test_an_adapter_brings_its_head_and_gradients_are_in_all_that_was_trained(tmp_path, tokenizer, base):
    subject = kept(tmp_path / "base", tokenizer, headless if base == "encoder" else lambda weights: weights)
    merged = adapter(subject.model, tmp_path / "adapter", task_type="SEQ_CLS").merge_and_unload().eval()
    task = load_task(Subject(model=str(tmp_path / "adapter"), labels="bad, so-so, good"), CPU)
    assert task.called == "sequence classifier"
    assert task.class_names == {"bad": 0, "so-so": 1, "good": 2}
    names = {name for name, weight in task.model.named_parameters() if weight.requires_grad}
    assert len([name for name in names if ".lora_" in name]) == 2 * 2
    head = {f"model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")}
    assert names == {name for name in names if ".lora_" in name} | head
    inputs = tokenizer(["a warm and dull film", "great"], padding=True, return_tensors="pt")
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(task.model(inputs["input_ids"]), merged(**given).logits)
    x, y = inputs["input_ids"], torch.tensor([0, 2])
    assert (EkfacInfluence(task.model).fit([(x, y)]).self_influences(x, y) > 0).all()


def test_an_adapter_whose_head_is_nowhere_is_refused(tmp_path, tokenizer):
    subject = kept(tmp_path / "encoder", tokenizer, headless)
    adapter(subject.model, tmp_path / "adapter")
    subject = Subject(model=str(tmp_path / "adapter"), task="classifier")
    refused(subject, "has no weights that fit classifier.bias, classifier.weight, which would be drawn")


def test_settings_that_do_not_go_with_the_classes_are_refused_all_at_once(tiny):
    with pytest.raises(BadSetting) as told:
        load_task(Subject(model=str(tiny), labels="good,bad,ugly", fisher_samples=4), CPU)
    assert str(told.value).splitlines() == [
        "--labels good,bad,ugly: these are 3, and the model has 2 classes. Name each of them, in the model's "
        "order.",
        "--fisher-samples 4: of 2 classes the Fisher is exact, without samples. Leave it out.",
    ]


def test_of_more_than_ten_classes_the_fisher_may_have_several_samples(tmp_path, tokenizer):
    folder = random_model(tmp_path, tokenizer, "Bert", BERT | {"num_labels": 11})
    assert load_task(Subject(model=folder, fisher_samples=4), CPU).class_names


def test_a_cut_that_leaves_nothing_of_a_text_is_refused(tiny):
    told = "--max-tokens 2: 2 are the tokenizer's own. Use 3 or more"
    refused(Subject(model=str(tiny), max_tokens=2), told)
    assert load_task(Subject(model=str(tiny), max_tokens=3), CPU).max_tokens == 3


def test_code_of_a_model_s_folder_is_not_run(tmp_path, tokenizer):
    proof = tmp_path / "proof"
    (tmp_path / "theirs.py").write_text(f"open({str(proof)!r}, 'w')\n")
    mapped = {"AutoConfig": "theirs.C", "AutoModelForSequenceClassification": "theirs.M"}
    refused(kept(tmp_path, tokenizer, model_type="theirs", auto_map=mapped), "can't be loaded")
    assert not proof.exists()


MORE = "Texts are cut at 64 tokens: the model reads no more, whatever --max-tokens."


def test_texts_are_cut_where_the_model_reads_no_further(tmp_path, tokenizer):
    sizes = BERT | {"pad_token_id": 1, "max_position_embeddings": 66}
    random_model(tmp_path, tokenizer, "Roberta", sizes)
    for asked, cut, told in ((512, 64, ""), (64, 64, ""), (63, 63, ""), (65, 64, MORE)):
        task = load_task(Subject(model=str(tmp_path), max_tokens=asked), CPU)
        assert (task.max_tokens, task.told) == (cut, told)


def test_layers_are_chosen_by_parts_of_their_names(tiny):
    model = load_task(Subject(model=str(tiny), layers="lin2, classifier"), CPU).model
    chosen = {name.rpartition(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}
    blocks = {f"model.distilbert.transformer.layer.{number}.ffn.lin2" for number in (0, 1)}
    assert chosen == {"model.classifier", *blocks}
