"""However texts, labels and models are kept, a job sees the same; and it says what it can't use."""

import gc
import json
import os

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
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
from support.job.errors import BadSetting, DatasetNotUsable, ModelNotUsable
from support.job.examples import chosen_rows, tokenised
from support.job.settings import Subject
from support.job.sources import load_classifier, load_texts
from support.model import LABELS, with_adapter
from tests.tiny_job import make_model

TEXTS = ["a dull film", 'great, "warm" plot', "bad\nbut fine"]
NUMBERS = [0, 1, 0]
NAMES = [LABELS[number] for number in NUMBERS]
CLASSES = {name: number for number, name in LABELS.items()}
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


def reviews(labels=NUMBERS):
    return Dataset.from_dict({"text": TEXTS, "label": list(labels)})


def loaded(name, split="train", subject=None):
    found = load_texts(str(name), split, subject or Subject(), CLASSES)
    return found["text"][:], found["label"][:]


# Texts


@pytest.mark.parametrize("labels", [NUMBERS, NAMES], ids=["numbers", "names"])
@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "json"])
def test_a_file_of_every_kind_gives_the_same_texts_and_numbers(tmp_path, kind, labels):
    path = tmp_path / f"reviews.{kind}"
    write = reviews(labels).to_json if "json" in kind else getattr(reviews(labels), f"to_{kind}")
    write(path)
    assert loaded(path) == (TEXTS, NUMBERS)


def test_a_folder_gives_each_split_from_the_file_of_its_name(tmp_path):
    reviews().to_csv(tmp_path / "train.csv")
    reviews(NAMES[::-1]).select([2]).to_csv(tmp_path / "test.csv")
    with pytest.raises(DatasetNotUsable):
        loaded(tmp_path)  # one split with numbers, one with names: no table has both
    reviews().select([2, 1]).to_csv(tmp_path / "test.csv")
    assert loaded(tmp_path) == (TEXTS, NUMBERS)
    assert loaded(tmp_path, "test") == (TEXTS[:0:-1], NUMBERS[:0:-1])


def test_a_saved_dataset_has_no_splits_and_a_saved_dictionary_has_its_own(tmp_path):
    reviews().save_to_disk(tmp_path / "one")
    DatasetDict(train=reviews(), held_out=reviews().select([1])).save_to_disk(tmp_path / "two")
    assert loaded(tmp_path / "one") == loaded(tmp_path / "two") == (TEXTS, NUMBERS)
    assert loaded(tmp_path / "two", "held_out") == (TEXTS[1:2], NUMBERS[1:2])


def test_columns_may_have_other_names(tmp_path):
    renamed = reviews().rename_columns({"text": "said", "label": "mood"})
    renamed.add_column("label", [7, 7, 7]).to_csv(tmp_path / "reviews.csv")
    subject = Subject(text_column="said", label_column="mood")
    assert loaded(tmp_path / "reviews.csv", subject=subject) == (TEXTS, NUMBERS)


def test_the_packaged_reviews_need_no_file(imdb):
    texts = load_texts("packaged", "test", Subject(), CLASSES)
    assert texts.num_rows == imdb["test"].num_rows
    assert texts[3] == imdb["test"][3]


def test_a_file_that_is_missing_is_named_with_what_would_do(tmp_path):
    missing = tmp_path / "reviews.csv"
    with pytest.raises(DatasetNotUsable, match=r"reviews\.csv' can't be read .*Name a file \(\.csv"):
        loaded(missing)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("latin.csv", "text,label\ncaf\xe9,1\n", "UnicodeDecodeError: .* A csv file is UTF-8, "),
        ("empty.csv", "", "it is empty.* names its columns in the first line, "),
        ("empty.jsonl", "", "it is empty.* A json file is UTF-8 and holds an object for each text"),
        ("ragged.csv", "text,label\na,1\nb,c,0\n", "Expected 2 fields in line 3, saw 3.* double quotes"),
        ("open.csv", 'text,label\n"a,1\n', "EOF inside string.* double quotes"),
        ("big.csv", "text,label\na,99999999999999999999\n", "OverflowError: "),
        ("ragged.jsonl", '{"text":"a","label":1}\n{"text":\n', "JSON parse error.* one a line"),
        ("half.parquet", "PAR1", r"ArrowInvalid: .*half a file is none"),
    ],
)
@pytest.mark.parametrize("folder", [False, True], ids=["alone", "in a folder"])
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the reader leaves the file open
def test_a_file_that_is_damaged_is_named_with_the_cause_and_what_it_has_to_be(
    tmp_path, name, content, told, folder
):
    path = tmp_path / name
    if folder:
        path = tmp_path / f"test{path.suffix}"
        writer = {".jsonl": "to_json"}.get(path.suffix, f"to_{path.suffix[1:]}")
        getattr(reviews(), writer)(tmp_path / f"train{path.suffix}")
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DatasetNotUsable, match=rf"^'{path}' can't be read \(.*{told}"):
        loaded(tmp_path if folder else path)
    gc.collect()


@pytest.mark.parametrize(
    ("header", "line", "told"),
    [
        (
            "text;label",
            "a;1",
            "has no column 'text'. There are: text;label. A csv file .* has .* commas between",
        ),
        (
            "text,label",
            "a, or b,1",
            "has more fields than names of columns. A csv .* quotes around a text with",
        ),
        ("review,label", "a,1", "There are: review, label. Say which with --text-column"),
    ],
    ids=["semicolons", "commas in every text", "another column"],
)
def test_a_csv_of_other_columns_is_refused_with_what_there_is_and_a_cure(tmp_path, header, line, told):
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text(f"{header}\n{line}\n{line}\n")
    for source in (tmp_path, tmp_path / "train.csv"):
        with pytest.raises(DatasetNotUsable, match=told):
            loaded(source)


@pytest.mark.parametrize(
    ("kinds", "told"), [([], "doesn't contain any data files"), (["csv", "json"], "Couldn't infer the same")]
)
def test_a_folder_without_data_and_one_of_two_kinds_are_refused_with_what_would_do(tmp_path, kinds, told):
    for kind, split in zip(kinds, ("train", "test"), strict=False):
        getattr(reviews(), f"to_{kind}")(tmp_path / f"{split}.{kind}")
    cure = r"Name a file .* a folder with files called train\.csv or the like, all of one kind"
    with pytest.raises(DatasetNotUsable, match=rf"can't be read \(.*{told}.*\)\. {cure}"):
        loaded(tmp_path)


@pytest.mark.parametrize("folder", [False, True])
def test_a_file_that_changed_within_its_time_and_size_is_read_anew(tmp_path, folder):
    path = tmp_path / "train.csv"
    reviews().to_csv(path)
    name, times = tmp_path if folder else path, path.stat()
    assert loaded(name) == (TEXTS, NUMBERS)
    path.write_text(path.read_text().replace("dull", "warm"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert loaded(name) == (["a warm film", *TEXTS[1:]], NUMBERS)


def test_the_name_of_a_file_is_no_pattern(tmp_path):
    reviews().to_csv(tmp_path / "part[1]*.csv")
    reviews([1, 1, 1]).to_csv(tmp_path / "part1.csv")
    assert loaded(tmp_path / "part[1]*.csv") == (TEXTS, NUMBERS)


def test_one_column_is_not_texts_and_labels_at_once(tmp_path):
    reviews().to_csv(tmp_path / "train.csv")
    told = "Texts and labels are both in 'text': see --text-column, --label-column"
    with pytest.raises(DatasetNotUsable, match=told):
        loaded(tmp_path / "train.csv", subject=Subject(label_column="text"))


def test_what_is_not_there_is_refused_with_what_there_is(tmp_path):
    (tmp_path / "reviews.txt").write_text("great")
    with pytest.raises(DatasetNotUsable, match=r"^reviews\.txt is neither of \.csv, \.parquet,"):
        loaded(tmp_path / "reviews.txt")
    DatasetDict(train=reviews(), held_out=reviews()).save_to_disk(tmp_path)
    with pytest.raises(DatasetNotUsable, match=r"no split 'test'\. There are: train, held_out\."):
        loaded(tmp_path, "test")


@pytest.mark.parametrize("option", ["text_column", "label_column"])
def test_a_column_that_is_missing_is_refused_with_those_that_are_there(tmp_path, option):
    reviews().save_to_disk(tmp_path)
    subject = Subject(**{option: "said"})
    with pytest.raises(DatasetNotUsable, match=r"'said'\. There are: text, label\. .*--text-column"):
        loaded(tmp_path, subject=subject)


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (["good", None, "bad"], NUMBERS, r"^Row 1 of .* has no text but None\. .*or see --text-column\.$"),
        (TEXTS, ["positive", "so-so", "negative"], r"^Row 1 .* label 'so-so', .* negative, positive\."),
        (TEXTS, [0, 2, 1], "^Row 1 of .* has the label 2, "),
        (TEXTS, [0, -1, 1], "^Row 1 of .* has the label -1, "),
        (TEXTS, [0, None, 1], "^Row 1 of .* has the label None, "),
    ],
)
def test_a_row_that_is_of_no_use_is_named_with_what_would_do(tmp_path, texts, labels, message):
    Dataset.from_dict({"text": texts, "label": labels}).to_parquet(tmp_path / "reviews.parquet")
    with pytest.raises(DatasetNotUsable, match=message):
        loaded(tmp_path / "reviews.parquet")


@pytest.mark.parametrize(("names", "numbers"), [(["no", "yes"], NUMBERS), (NAMES[1::-1], [1, 0, 1])])
def test_class_labels_are_numbers_or_the_models_names_in_any_order(tmp_path, names, numbers):
    reviews().cast_column("label", ClassLabel(names=names)).save_to_disk(tmp_path)
    assert loaded(tmp_path) == (TEXTS, numbers)


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_names_of_the_hub_are_errors_offline(offline):
    with pytest.raises(DatasetNotUsable, match=r"^'nobody/no-reviews' can't be read "):
        loaded("nobody/no-reviews")
    with pytest.raises(ModelNotUsable, match=r"^--model nobody/no-model can't be loaded "):
        load_classifier(Subject(model="nobody/no-model"), CPU)


def test_a_folder_that_the_library_kept_is_not_taken_for_a_name_of_the_hub(tmp_path, offline, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    reviews().to_csv(tmp_path / "mine" / "train.csv")
    load_dataset(str(tmp_path / "mine"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        DatasetNotUsable, match="the hub can't be reached, and what is kept here was a folder"
    ):
        loaded("mine")


# Models


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def gradients_of(subject):
    model = load_classifier(subject, CPU).model
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_layers_are_chosen_by_parts_of_their_names(tiny):
    chosen = gradients_of(Subject(model=str(tiny), layers="lin2, classifier"))
    assert {name.removesuffix(".weight").removesuffix(".bias") for name in chosen} == {
        "model.classifier",
        "model.distilbert.transformer.layer.0.ffn.lin2",
        "model.distilbert.transformer.layer.1.ffn.lin2",
    }


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


# Rows


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ("all", [*range(8)]),
        ("2:5", [2, 3, 4]),
        ("5,0,2,5", [0, 2, 5]),
        ("4,", [4]),
        ("5,0:3,2,6,", [0, 1, 2, 5, 6]),
    ],
)
def test_rows_are_what_they_say_ascending_and_once(rows, chosen):
    assert chosen_rows(rows, 8, 0, "rows").tolist() == chosen


def test_a_sample_ascends_repeats_nothing_and_depends_on_its_seed_alone():
    sample, again, other = (chosen_rows("20", 100, seed, "rows") for seed in (0, 0, 1))
    assert len(sample) == 20
    assert (np.diff(sample) > 0).all()
    assert sample.tolist() == again.tolist() != other.tolist()
    assert chosen_rows("100", 100, 3, "rows").tolist() == list(range(100))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("8", r"^--query-rows 8: use all, a number of rows like 50 .from 1 to 7."),
        ("0", r"from 1 to 7"),
        ("-2", r"from 1 to 7"),
        ("5:8", r"from 0 to 6"),
        ("-1:3", r"from 0 to 6"),
        ("3:3", r"at least one"),
        ("2,7", r"from 0 to 6"),
        (",", r"from 0 to 6, at least one in each"),
        ("0:99999999999999", r"from 0 to 6"),
        ("some", r"^--query-rows some: use all, a number of rows like 50"),
        ("1:2:3", r"or rows and ranges like"),
        ("1.5", r"use all, a number of rows"),
        ("", r"use all, a number of rows"),
    ],
)
def test_rows_that_mean_nothing_or_are_not_there_are_refused(rows, message):
    with pytest.raises(BadSetting, match=message):
        chosen_rows(rows, 7, 0, "query-rows")


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


def test_a_text_with_the_padding_token_in_it_is_refused_by_its_row(tmp_path, tokenizer):
    texts = Dataset.from_dict({"text": ["fine", "a [PAD] film"], "label": [0, 1]})
    with pytest.raises(DatasetNotUsable, match=r"Row 1 has a text with the padding token '\[PAD\]'"):
        tokenised(texts, np.arange(2), tokenizer, 16, tmp_path)


@pytest.mark.parametrize(
    "labels",
    [["0", "1", "0"], [0.0, 1.0, 0.0], [False, True, False], ["NEGATIVE", " Positive", "negative"]],
    ids=["strings", "floats", "booleans", "capitals"],
)
def test_labels_say_the_same_in_every_guise(tmp_path, labels):
    reviews(labels).to_parquet(tmp_path / "train.parquet")
    assert loaded(tmp_path / "train.parquet")[1] == NUMBERS


@pytest.mark.parametrize("label", [-1, 2, None, "so-so", 0.5])
def test_a_label_that_is_no_class_is_refused_by_its_row(tmp_path, label):
    reviews([type(label)(0) if label is not None else 0, label, label]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DatasetNotUsable, match="Row [01] of .* has the label"):
        loaded(tmp_path / "train.parquet")


def test_class_names_in_another_order_and_other_capitals_are_matched_by_name(tmp_path):
    kind = ClassLabel(names=["Positive", "Negative"])
    DatasetDict(train=reviews([1, 0, 1]).cast_column("label", kind)).save_to_disk(tmp_path)
    assert loaded(tmp_path)[1] == NUMBERS


def test_class_names_of_which_some_are_the_model_s_are_refused(tmp_path):
    kind = ClassLabel(names=["positive", "so-so"])
    DatasetDict(train=reviews([1, 0, 1]).cast_column("label", kind)).save_to_disk(tmp_path)
    with pytest.raises(DatasetNotUsable, match="positive, so-so, the model negative, positive"):
        loaded(tmp_path)


def test_na_in_a_csv_is_a_word(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\nfine,NA\ndull,EU\n")
    found = load_texts(str(tmp_path / "train.csv"), "train", Subject(), {"EU": 0, "NA": 1})
    assert found["label"][:] == [1, 0]


@pytest.mark.parametrize("labels", [[1, 2, 1], [1.0, 2.0, 1.0]])
def test_numbers_that_could_be_names_or_places_of_classes_are_refused_and_as_text_are_names(tmp_path, labels):
    stars = {str(number + 1): number for number in range(3)}
    reviews(labels).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DatasetNotUsable, match="label 1 could be a name or a place. Write"):
        load_texts(str(tmp_path / "train.parquet"), "train", Subject(), stars)
    reviews([str(int(label)) for label in labels]).to_parquet(tmp_path / "train.parquet")
    assert load_texts(str(tmp_path / "train.parquet"), "train", Subject(), stars)["label"][:] == [0, 1, 0]


def test_a_file_behind_a_link_is_read_anew_when_it_changes(tmp_path):
    (tmp_path / "mine").mkdir()
    path = tmp_path / "elsewhere.csv"
    (tmp_path / "mine" / "train.csv").symlink_to(path)
    reviews().to_csv(path)
    times = path.stat()
    assert loaded(tmp_path / "mine") == (TEXTS, NUMBERS)
    path.write_text(path.read_text().replace("dull", "warm"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert loaded(tmp_path / "mine") == (["a warm film", *TEXTS[1:]], NUMBERS)
