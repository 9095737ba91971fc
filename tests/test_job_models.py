"""Of every family of models a job tracks the layers that it can; and it says which models it can't use."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaConfig,
    DebertaV2Config,
    EsmConfig,
    GPT2Config,
    LongformerConfig,
    OPTConfig,
    RobertaConfig,
)

from support.ekfac import Bernoulli, EkfacInfluence, Gaussian
from support.job.errors import ModelNotUsable
from support.job.settings import Subject
from support.job.sources import load_classifier
from support.model import with_adapter
from tests.tiny_job import make_model

CPU = torch.device("cpu")
SIZES = {"initializer_range": 0.2, "pad_token_id": None}
BERT = SIZES | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
GPT2 = SIZES | {"n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 101, "eos_token_id": 102}
OPT = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
FED = "that are not fed with (batch, tokens, features)"
FAMILIES = {
    "bert": (BertConfig, BERT, ""),
    "roberta": (RobertaConfig, BERT, ""),
    "gpt2": (GPT2Config, GPT2, ""),
    "deberta": (
        DebertaConfig,
        BERT | RELATIVE,
        f"4 {FED}; the first is 'deberta.encoder.layer.0.attention.self.pos_proj'",
    ),
    "deberta-v2": (
        DebertaV2Config,
        BERT | RELATIVE | {"share_att_key": True},
        "4 called more than once; the first is 'deberta.encoder.layer.0.attention.self.query_proj'",
    ),
    "albert": (
        AlbertConfig,
        BERT | {"embedding_size": 8},
        "6 called more than once; the first is "
        "'albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query'",
    ),
    "opt": (
        OPTConfig,
        OPT | {"num_attention_heads": 2, "pad_token_id": 0},
        f"4 {FED}; the first is 'model.decoder.layers.0.fc1'",
    ),
    "esm": (
        EsmConfig,
        BERT | {"mask_token_id": 103},
        "1 not called; the first is 'esm.contact_head.regression'",
    ),
    "longformer": (
        LongformerConfig,
        BERT | {"attention_window": 4, "max_position_embeddings": 66},
        f"18 {FED}; the first is 'longformer.encoder.layer.0.attention.self.query'",
    ),
}
"""Configuration, its sizes, and what is left out of the model's linear layers."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def gradients_of(subject):
    model = load_classifier(subject, CPU).model
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_without_a_choice_every_linear_layer_gets_gradients_and_nothing_else(tiny):
    classifier = load_classifier(Subject(model=str(tiny)), CPU)
    linear = [part for part in classifier.model.modules() if isinstance(part, torch.nn.Linear)]
    wanted = {id(weight) for part in linear for weight in part.parameters()}
    found = {id(weight) for weight in classifier.model.parameters() if weight.requires_grad}
    assert found == wanted


@pytest.mark.parametrize(("layers", "part"), [("mlp", "mlp"), ("ffn,clasifier", "clasifier"), (",", ",")])
def test_each_part_that_matches_no_layer_is_refused_with_the_names_there_are(tiny, layers, part):
    subject = Subject(model=str(tiny), layers=layers)
    told = (
        rf"^--layers {layers}: No linear layer has '{part}' in its name\. There are: .* classifier, .*ffn, "
    )
    with pytest.raises(ModelNotUsable, match=told):
        load_classifier(subject, CPU)


def test_a_folder_without_a_model_is_refused_by_name(tmp_path):
    with pytest.raises(ModelNotUsable, match=r"can't be loaded .*Name a folder that holds config"):
        load_classifier(Subject(model=str(tmp_path)), CPU)


def test_a_tokenizer_without_padding_is_refused(tmp_path, tokenizer, tiny):
    make_model(tmp_path)
    bare = type(tokenizer).from_pretrained(tmp_path)
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(ModelNotUsable, match="has no padding token"):
        load_classifier(Subject(model=str(tmp_path)), CPU)


def random_model(folder, tokenizer, configure, sizes):
    torch.manual_seed(0)
    config = configure(vocab_size=len(tokenizer), **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory, tokenizer):
    configure, sizes, left_out = FAMILIES[request.param]
    return random_model(tmp_path_factory.mktemp(request.param), tokenizer, configure, sizes), left_out


def test_every_family_of_models_has_influences_that_padding_does_not_change(family, tokenizer):
    model = load_classifier(Subject(model=family[0]), CPU).model
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
    assert load_classifier(Subject(model=folder), CPU).left_out == told
    head = "score" if "opt" in folder or "gpt2" in folder else "classifier"
    assert load_classifier(Subject(model=folder, layers=head), CPU).left_out == ""


def test_layers_of_which_none_can_be_tracked_are_refused_with_the_reason_and_what_there_is(
    tmp_path, tokenizer
):
    configure, sizes, _ = FAMILIES["deberta-v2"]
    subject = Subject(model=random_model(tmp_path, tokenizer, configure, sizes), layers="dense,query_proj")
    told = "layer has 'query_proj' in its name, but for those called more than once. There are: attention, "
    refused(subject, told)


def kept(tmp_path, tokenizer, change=lambda weights: weights, **config):
    """A tiny BERT in a folder, its weights and configuration changed."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **BERT))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(change(weights), tmp_path / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return Subject(model=str(tmp_path))


def refused(subject, words):
    with pytest.raises(ModelNotUsable, match=words):
        load_classifier(subject, CPU)


def test_weights_that_would_be_drawn_at_random_are_refused_by_name(tmp_path, tokenizer):
    headless = kept(tmp_path, tokenizer, lambda w: {k: v for k, v in w.items() if "classifier" not in k})
    refused(
        headless,
        "no weights that fit classifier.bias, classifier.weight, which would be drawn at random: 2 in all",
    )


@pytest.mark.parametrize(
    ("kind", "likelihood"), [("multi_label_classification", Bernoulli), ("regression", Gaussian)]
)
def test_a_loss_that_is_no_softmax_over_classes_is_refused_by_name(tmp_path, tokenizer, kind, likelihood):
    told = (
        rf"is a model for {kind.replace('_', ' ')}; .* In Python, .* {likelihood.__name__}\(\) for {kind[:5]}"
    )
    refused(kept(tmp_path, tokenizer, problem_type=kind), told)


@pytest.mark.parametrize("configured", [False, True])
def test_a_model_without_its_tokenizer_is_refused(tmp_path, tokenizer, configured):
    subject = kept(tmp_path, tokenizer)
    for path in tmp_path.glob("*token*"):
        path.unlink()
    if configured:
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    refused(subject, "has no tokenizer: save the model's own beside it")


def test_weights_of_other_sizes_are_refused_by_name(tmp_path, tokenizer):
    refused(
        kept(tmp_path, tokenizer, vocab_size=99), "no weights that fit bert.embeddings.word_embeddings.weight"
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_is_refused_because_its_head_may_be_nowhere(tmp_path, tokenizer):
    subject = kept(tmp_path / "encoder", tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(subject.model)
    with_adapter(model, LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    refused(Subject(model=str(tmp_path / "adapter")), "is an adapter. Merge it with peft's merge_and_unload")


def test_classes_of_one_name_are_refused(tmp_path, tokenizer):
    names = {"id2label": {"0": "good", "1": "good"}, "label2id": {"good": 0}}
    refused(
        kept(tmp_path, tokenizer, **names), "some have the same name: good. Give each its own, in id2label"
    )


def test_a_cut_that_leaves_nothing_of_a_text_is_refused(tiny):
    refused(
        Subject(model=str(tiny), max_tokens=2), "--max-tokens 2: 2 are the tokenizer's own. Use 3 or more"
    )
    assert load_classifier(Subject(model=str(tiny), max_tokens=3), CPU).max_tokens == 3


def test_a_tokenizer_of_more_tokens_than_the_model_knows_is_refused(tmp_path, tokenizer):
    name = "bert.embeddings.word_embeddings.weight"
    small = kept(tmp_path, tokenizer, lambda w: w | {name: w[name][:100].clone()}, vocab_size=100)
    refused(small, "but the model knows 100 tokens.*resize_token_embeddings")


def test_code_of_a_model_s_folder_is_not_run(tmp_path, tokenizer):
    proof = tmp_path / "proof"
    (tmp_path / "theirs.py").write_text(f"open({str(proof)!r}, 'w')\n")
    mapped = {"AutoConfig": "theirs.C", "AutoModelForSequenceClassification": "theirs.M"}
    refused(kept(tmp_path, tokenizer, model_type="theirs", auto_map=mapped), "can't be loaded")
    assert not proof.exists()


def test_texts_are_cut_where_the_model_reads_no_further(tmp_path, tokenizer):
    sizes = BERT | {"pad_token_id": 1, "max_position_embeddings": 66}
    random_model(tmp_path, tokenizer, RobertaConfig, sizes)
    assert load_classifier(Subject(model=str(tmp_path)), CPU).max_tokens == 64
    assert load_classifier(Subject(model=str(tmp_path), max_tokens=9), CPU).max_tokens == 9


def test_a_name_of_the_hub_is_an_error_offline(offline):
    refused(Subject(model="nobody/no-model"), r"^--model nobody/no-model can't be loaded ")


def test_layers_are_chosen_by_parts_of_their_names(tiny):
    chosen = gradients_of(Subject(model=str(tiny), layers="lin2, classifier"))
    assert {name.removesuffix(".weight").removesuffix(".bias") for name in chosen} == {
        "model.classifier",
        "model.distilbert.transformer.layer.0.ffn.lin2",
        "model.distilbert.transformer.layer.1.ffn.lin2",
    }
