"""A model of transformers, its tokenizer and data as people have them; what is answered, with names."""

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch.utils.data import DataLoader

from support import TextInfluence
from support.ekfac import EkfacInfluence
from support.model import require_gradients_only, with_adapter
from support.text_influence import RowsNotUsable
from tests.tiny_language import make_tokenizer, sentences

SIZES = {"dim": 8, "hidden_dim": 12, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}
NAMES = {0: "bad", 1: "so-so", 2: "good"}
TOKENIZER = make_tokenizer()
TEXTS, LABELS = sentences(8), [2, 0, 1, 1, 2, 0, 0, 1]
ROWS = Dataset.from_dict({"text": TEXTS, "label": LABELS})
QUERIES = ROWS.select([5, 2])
FEED_FORWARD = [f"distilbert.transformer.layer.{block}.ffn.lin{one}" for block in (0, 1) for one in (1, 2)]


def random(model):
    """The model with weights for which gradients differ."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


def tiny(kind="SequenceClassification", **settings):
    settings = settings or {"id2label": NAMES, "label2id": {name: number for number, name in NAMES.items()}}
    config = transformers.DistilBertConfig(vocab_size=len(TOKENIZER), **SIZES, **settings)
    return random(getattr(transformers, f"DistilBertFor{kind}")(config))


def writer():
    sizes = {"n_embd": 8, "n_inner": 12, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return random(transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(TOKENIZER), **sizes)))


def asked(model=None, tokenizer=TOKENIZER, **settings):
    return TextInfluence(model or tiny(), tokenizer, **({"hessian_regularization": 0.1} | settings))


def with_tokens(rows):
    """As one prepares it for a `Trainer`."""
    return rows.map(lambda row: TOKENIZER(row["text"]))


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.fixture(scope="module")
def influence():
    return asked().fit(ROWS)


# What is asked


def by_collator(rows):
    names = "input_ids", "attention_mask", "label"
    prepared = [{name: row[name] for name in names} for row in with_tokens(rows)]
    return transformers.DataCollatorWithPadding(TOKENIZER)(prepared)


FORMS = {
    "tokens": with_tokens,
    "tensors": lambda rows: with_tokens(rows).with_format("torch"),
    "frame": lambda rows: rows.to_pandas(),
    "names": lambda rows: rows.to_pandas().replace({"label": NAMES}),
    "slice": lambda rows: rows[:],
    "a batch": by_collator,
    "batches": lambda rows: [by_collator(rows.select([n])) for n in range(len(rows))],
    "loader": lambda rows: DataLoader([by_collator(rows.select([n])) for n in range(len(rows))], None),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_influences_are_the_same_in_whatever_form_data_come(influence, form):
    expected = influence.score(QUERIES, ROWS)
    assert_same(asked().fit(form(ROWS)).influences(form(QUERIES), form(ROWS)), expected)
    assert_same(influence.influences(*influence.batch(QUERIES), *influence.batch(ROWS)), expected)
    assert_same(influence.influences(QUERIES), expected[:, [5, 2]])


def test_influences_are_the_engine_s_on_a_model_made_ready_by_hand(influence):
    model = tiny().eval()
    assert require_gradients_only(model, ("ffn", "pre_classifier", "classifier")) == influence.layer_names
    engine = EkfacInfluence(model, hessian_regularization=0.1).fit([by_collator(ROWS)])
    assert_same(influence.score(QUERIES, ROWS), engine.score([by_collator(QUERIES)], [by_collator(ROWS)]))


def test_numbers_may_come_as_a_collator_has_them():
    rows = columns(label=[0.5, -1.0] * 4)
    influence = asked(tiny(num_labels=1)).fit(rows)
    assert_same(influence.score(by_collator(rows), by_collator(rows)), influence.score(rows, rows))


def columns(**named):
    return Dataset.from_dict({"text": TEXTS} | named)


def page(heading):
    """The code below a heading of the page for own models."""
    text = (Path(__file__).parents[1] / "notebooks" / "own_model.md").read_text()
    return re.search(rf"^#+ {heading}$.*?```python\n(.*?)```", text, flags=re.DOTALL | re.MULTILINE)[1]


ANSWERS = TEXTS[::-1]
YES, MORE = [float(label > 0) for label in LABELS], [label > 1 for label in LABELS]
BOTH = [list(map(float, both)) for both in zip(YES, MORE, strict=True)]
CLASSES = [[-100] + [len(word) % 3 for word in text.split()[1:]] for text in TEXTS]
OF_TOKENS = with_tokens(columns()).add_column("labels", CLASSES)
TWO = {"num_labels": 2, "problem_type": "multi_label_classification"}
USUAL = "influence = TextInfluence(model, tokenizer).fit(train)"


def several(**settings):
    return lambda: tiny(**TWO | settings)


CASES = {
    "classes": (USUAL, tiny, ROWS, 1),
    "pairs": (page("Pairs of texts"), tiny, columns(premise=TEXTS, hypothesis=ANSWERS, label=LABELS), 1),
    "columns": (page("Several labels at once"), several(), columns(toxic=YES, threat=MORE), 2),
    "lists": (USUAL, several(), columns(label=BOTH), 2),
    "regression": (page("Regression"), lambda: tiny(num_labels=1), columns(stars=LABELS), 1 / 2),
    "numbers": (USUAL, several(problem_type="regression"), columns(label=BOTH), 1),
    "tokens": (page("A class for each token"), lambda: tiny("TokenClassification"), OF_TOKENS, None),
    "completions": (page("A model that writes"), writer, columns(prompt=TEXTS, completion=ANSWERS), None),
    "texts": (USUAL, writer, columns(), None),
    "texts in tokens": (USUAL, writer, with_tokens(columns()), None),
}


@pytest.mark.parametrize(("code", "model", "rows", "numbers"), CASES.values(), ids=CASES)
def test_the_loss_that_is_asked_is_the_one_trained_with_summed_not_averaged(code, model, rows, numbers):
    names = {"TextInfluence": TextInfluence, "model": model(), "tokenizer": TOKENIZER, "train": rows}
    exec(code, names)
    influence = names["influence"]
    assert (influence.influences(rows).diagonal() > 0).all()
    for row, found in enumerate(influence.described(rows)["loss"]):
        inputs, labels = influence.batch(rows.select([row]))
        said = influence.model(**inputs, labels=labels).loss
        asked = labels[:, influence.likelihood.shift :] if numbers is None else labels
        assert found == pytest.approx(said.item() * (numbers or (asked != -100).sum().item()), rel=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_of_an_adapter_its_matrices_and_the_head_beside_them_are_asked(tmp_path, monkeypatch):
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_lin", "lin1"], init_lora_weights=False)
    with_adapter(tiny(), config).save_pretrained(tmp_path / "my-adapter")
    monkeypatch.chdir(tmp_path)
    names = {"TextInfluence": TextInfluence, "PeftModel": PeftModel, "tokenizer": TOKENIZER}
    names |= {"model": tiny(), "train": ROWS}
    exec(page("An adapter"), names)
    influence = names["influence"]
    assert len(influence.layers) == 2 * 2 * 2 + 2
    trained = {name for name in influence.layer_names if "lora_" not in name}
    assert trained == {"pre_classifier.modules_to_save.default", "classifier.modules_to_save.default"}
    assert (influence.influences(QUERIES).diagonal() > 0).all()


def test_layers_are_the_feed_forward_ones_and_heads_unless_others_are_named():
    assert asked().layer_names == [*FEED_FORWARD, "pre_classifier", "classifier"]
    assert asked(layers="1.ffn").layer_names == FEED_FORWARD[2:]
    with pytest.raises(ValueError, match=r"^No linear layer has 'head' in its name\. There are: "):
        asked(layers=["ffn", "head"])


def test_a_model_of_no_known_loss_is_refused_until_it_is_said():
    with pytest.raises(ValueError, match=r"with which loss a DistilBertForMaskedLM .*Say likelihood=…"):
        asked(tiny("MaskedLM"))


# What is answered


def test_the_top_are_the_strongest_of_each_sign_with_what_is_known_of_them():
    named = ROWS.add_column("id", [f"row {n}" for n in range(8)])
    influence = asked(name="id").fit(named)
    queries = named.select([5, 2])
    scores = influence.score_frame(queries, named)
    assert (list(scores.index), list(scores.columns)) == (["row 5", "row 2"], named["id"][:])
    top = influence.top(queries, named, count=2)
    for (query, effect), rows in top.groupby(["query", "effect"]):
        row = scores.loc[query].sort_values(ascending=effect == "harms")[:2]
        assert list(rows["training"]) == list(row.index)
        assert list(rows["score"]) == pytest.approx(list(row))
    texts = dict(zip(named["id"], TEXTS, strict=True))
    assert list(top["text"]) == [texts[name] for name in top["training"]]
    assert list(influence.top(queries, by_collator(named), count=2)["text"]) == list(top["text"])
    again = influence.top(queries, named, count=2, scores=influence.score(queries, named))
    pd.testing.assert_frame_equal(again, top)
    with pytest.raises(ValueError, match=r"^The scores are of 8 examples, but the data set has 7\."):
        influence.top(queries, named.select(range(7)), scores=influence.score(queries, named))


def test_examples_are_described_as_the_model_says_them(influence):
    said = influence.described(with_tokens(ROWS.add_column("source", ["web"] * 8)))
    logits = influence.model(**influence.batch(ROWS)[0]).logits
    assert list(said["predicted"]) == [NAMES[n] for n in logits.argmax(dim=1).tolist()]
    assert list(said["probability"]) == pytest.approx(logits.softmax(dim=1).amax(dim=1).tolist())
    assert list(said["label"]) == [NAMES[n] for n in LABELS]
    assert (list(said["source"]), list(said["text"])) == (["web"] * 8, TEXTS)
    bare = with_tokens(ROWS).remove_columns("text")
    assert list(influence.described(bare)["text"]) == TEXTS


def test_of_several_labels_those_that_are_said_are_named_and_numbers_are_numbers():
    both = asked(tiny(**TWO)).described(columns(label=BOTH))
    assert set(both["label"]) == {"", "LABEL_0", "LABEL_0, LABEL_1"}
    numbers = asked(tiny(num_labels=1)).described(columns(label=[0.5] * 8))
    assert set(numbers["label"]) == {0.5}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_without_matrices_is_refused():
    sizes = {"num_virtual_tokens": 2, "num_layers": 2, "token_dim": 8, "num_attention_heads": 2}
    prompt = PromptTuningConfig(task_type="SEQ_CLS", **sizes)
    with pytest.raises(ValueError, match="^The adapter adds words before a text"):
        asked(get_peft_model(tiny(), prompt))


def test_what_is_saved_is_loaded_with_the_tokenizer(influence, tmp_path):
    influence.save(tmp_path / "curvature")
    how = {"tokenizer": TOKENIZER, "hessian_regularization": 0.1}
    loaded = TextInfluence.load(tmp_path / "curvature", tiny(), **how)
    assert_same(loaded.score(QUERIES, ROWS), influence.score(QUERIES, ROWS))


# What is refused


def test_rows_that_can_not_be_asked_about_are_told_together(influence):
    wrong = Dataset.from_dict({"text": ["film", None, ""], "label": ["good", "Fine", "fine"]})
    with pytest.raises(RowsNotUsable) as told:
        influence.score(QUERIES, wrong)
    assert str(told.value) == (
        "2 of 3 rows have no text in 'text'; the first is row 1, with None. 2 of 3 rows have a label that is "
        "none of bad, so-so, good; the first is row 1, with 'Fine'."
    )


def test_columns_that_are_not_there_are_told_with_those_that_are(influence):
    rows = ROWS.rename_columns({"text": "review", "label": "stars"})
    told = r"^The data set has no column 'text', 'label'\. There are: review, stars\. Say which"
    with pytest.raises(RowsNotUsable, match=told):
        influence.fit(rows)
    expected = influence.score(ROWS, ROWS)
    assert_same(asked(text="review", label="stars").fit(rows).score(rows, rows), expected)
    with pytest.raises(RowsNotUsable, match="no column 'input_ids', 'labels'"):
        asked(tiny("TokenClassification")).fit(ROWS)
    with pytest.raises(RowsNotUsable, match="choose one of train, test"):
        influence.fit(DatasetDict(train=ROWS, test=QUERIES))


def test_a_number_that_is_none_and_classes_that_only_half_agree_are_refused(influence):
    with pytest.raises(
        RowsNotUsable, match=r"1 of 8 rows have a label that is no number; .* row 0, with nan"
    ):
        asked(tiny(num_labels=1)).fit(columns(label=[float("nan")] + [0.5] * 7))
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "fine", "good"])})
    with pytest.raises(RowsNotUsable, match="some are the same and some are not"):
        influence.fit(ROWS.cast(kinds))


def test_an_engine_shows_what_it_holds(influence):
    assert repr(influence) == (
        f"TextInfluence: 6 layers, {FEED_FORWARD[0]} to classifier, 523 parameters; "
        "Categorical(exact_classes=10, samples=1), λ = 0.1, fitted on 8 examples"
    )
    assert repr(asked()).endswith("not fitted")
    assert repr(influence.plan(ROWS)).startswith("8 training examples, ")
