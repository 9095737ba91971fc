"""What holds of a job on a classifier holds of one on a model that writes; its numbers are the engine's."""

import re

import numpy as np
import pandas as pd
import pytest
import torch

from support.ekfac import EkfacInfluence, NextToken
from support.ekfac.low_rank import of_rank
from support.job.command import main
from support.job.settings import Subject
from support.job.store import Store
from support.job.tasks import load_task
from support.language import encoded, padded
from tests.page import Page
from tests.tiny_language import TRAINING, make_adapter, make_model, make_rows, make_texts, options, sentences

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def inputs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return make_model(folder / "model", request.param), make_texts(folder / "texts")


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A store after `run`."""
    store = tmp_path_factory.mktemp("finished") / "store"
    assert main(["run", *options(*inputs, store, "--by-layer")]) == 0
    return store


def array(store, name):
    return Store(store).array(name)[:]


def assert_same(found, expected):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def by_hand(model, prompts):
    """The engine on the same examples without a job: fitted, with training texts and queries."""
    task = load_task(Subject(model=str(model)), CPU)
    training = padded([encoded(task.tokenizer, text) for text in sentences(TRAINING)])
    queries = padded([encoded(task.tokenizer, *prompt) for prompt in prompts])
    engine = EkfacInfluence(task.model, likelihood=NextToken()).fit([training])
    return engine, *((batch, batch.pop("labels")) for batch in (training, queries))


PROMPTS = [("the film of", "who laughs"), ("dull", "plot fine the")]


def test_the_scores_of_a_job_are_the_engines(inputs, finished):
    engine, training, queries = by_hand(inputs[0], PROMPTS)
    assert_same(array(finished, "scores"), engine.influences(*queries, *training))
    assert_same(array(finished, "self_influences"), engine.self_influences(*training))
    assert_same(array(finished, "layer_scores").sum(axis=0), array(finished, "scores"))


def test_the_queries_in_another_order_and_grouping_have_the_same_scores(inputs, finished, said, tmp_path):
    said("run", *options(*inputs, tmp_path), "--query-block", 1, "--block", 3)
    assert_same(array(tmp_path, "scores"), array(finished, "scores"))


def test_scores_at_full_rank_are_the_full_scores_and_at_a_lower_one_the_loss_is_told(
    inputs, finished, said, tmp_path
):
    told = said("run", *options(*inputs, tmp_path / "full"), "--query-rank", 13)
    assert_same(array(tmp_path / "full", "scores"), array(finished, "scores"))
    assert "At rank 13 of each query 100.0% or more is kept." in told
    told = said("run", *options(*inputs, tmp_path / "low"), "--query-rank", 1)
    assert "At rank 1 of each query " in told
    one_by_one = said("run", *options(*inputs, tmp_path / "one"), "--query-rank", 1, "--query-block", 1)
    assert told.split("rank 1")[1] == one_by_one.split("rank 1")[1]
    assert_same(array(tmp_path / "low", "scores"), array(tmp_path / "one", "scores"))


def test_a_plan_says_what_a_job_will_cost(inputs, said, tmp_path):
    not_of_plan = ("--regularization", "0.01", "--save-seconds", "0")
    told = said("plan", *[one for one in options(*inputs, tmp_path) if one not in not_of_plan])
    assert told.startswith(f"{TRAINING} training examples, ")
    assert "; 2 queries; 1 process" in told


def test_top_says_what_was_asked_and_leaves_data_and_a_page(finished, said, tmp_path):
    told = said("top", "--store", finished, "--count", 2, "--output", tmp_path)
    assert re.search(r"\nQuery 0 \(row 0, [\d.]+ nats a token\), helps: the film of → who laughs\n", told)
    table = pd.read_parquet(tmp_path / "top.parquet")
    assert list(table)[-3:] == ["prompt", "text", "nats"]
    texts = sentences(TRAINING)
    assert [texts[row].split() for row in table["training_row"]] == [text.split() for text in table["text"]]
    assert not (tmp_path / "top_tokens.parquet").exists()


def test_what_is_added_to_each_token_adds_up_to_the_score_and_colours_the_page(finished, said, tmp_path):
    said("top", "--store", finished, "--count", 2, "--output", tmp_path, "--by-token")
    table, tokens = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("top", "top_tokens"))
    pairs = list(zip(table["query"], table["training_row"], strict=True))
    for _, side in tokens.groupby("side"):
        assert_same(side.groupby(["query", "training_row"])["score"].sum()[pairs], table["score"])
    first = tokens[(tokens["query"] == 0) & (tokens["training_row"] == table["training_row"][0])]
    words = {side: [one.strip() for one in of_side["said"]] for side, of_side in first.groupby("side")}
    assert words == {"query": ["who", "laughs"], "training": table["text"][0].split()}
    coloured = Page((tmp_path / "top.html").read_text(encoding="utf-8"))
    assert coloured.having("class").count("said coloured") == 2 * len(table)  # plain and relative
    assert "b" in coloured.kinds


def test_the_tokens_of_long_texts_add_up_over_their_pieces(inputs, said, tmp_path):
    store = tmp_path / "store"
    said("run", *options(*inputs, store), "--pieces", "--max-tokens", 4)
    said("top", "--store", store, "--by-token")
    table, tokens = (pd.read_parquet(store / f"{name}.parquet") for name in ("top", "top_tokens"))
    whole = tokens[tokens["side"] == "training"].groupby(["query", "training_row"])["score"].sum()
    assert_same(whole[list(zip(table["query"], table["training_row"], strict=True))], table["score"])


def test_what_a_model_that_writes_says_of_an_example_is_its_loss_a_token(inputs, finished, said, tmp_path):
    said("top", "--store", finished, "--output", tmp_path)
    engine, _, (asked, labels) = by_hand(inputs[0], PROMPTS)
    logits = engine.passes.model(**asked).logits[:, :-1].log_softmax(dim=2)
    for row, nats in enumerate(pd.read_parquet(tmp_path / "top_queries.parquet")["nats"]):
        places = (labels[row, 1:] != -100).nonzero()[:, 0]
        expected = -logits[row, places, labels[row, places + 1]].mean()
        assert nats == pytest.approx(expected.item(), rel=1e-4)


def test_a_prompt_alone_is_completed_by_the_likeliest_tokens_which_the_store_keeps(
    inputs, said, tmp_path, monkeypatch
):
    queries = make_rows(tmp_path / "queries.jsonl", [{"prompt": "the film of"}])
    given = [*options(*inputs, tmp_path / "store"), "--queries", queries, "--new-tokens", 4]
    said("run", *given)
    task = load_task(Subject(model=str(inputs[0])), CPU)
    ids = task.tokenizer("the film of", return_tensors="pt")["input_ids"]
    for _ in range(4):
        ids = torch.cat([ids, task.model(input_ids=ids).logits[:, -1:].argmax(dim=2)], dim=1)
        if ids[0, -1] == task.tokenizer.eos_token_id:
            break
    prompt, completion = (task.tokenizer.decode(part) for part in (ids[0, :3], ids[0, 3:]))
    engine, training, asked = by_hand(inputs[0], [(prompt, completion)])
    assert_same(array(tmp_path / "store", "scores"), engine.influences(*asked, *training))

    def refuse(*_):
        raise AssertionError("Asked again.")

    monkeypatch.setattr("support.job.language_model.LanguageModel.completed", refuse)
    said("run", *given)
    said("top", "--store", tmp_path / "store")


def test_scores_and_self_influences_of_a_text_in_pieces_are_those_of_all_its_pieces_together(
    inputs, said, tmp_path
):
    told = said("run", *options(*inputs, tmp_path), "--pieces", "--max-tokens", 5)
    assert f"Scored {TRAINING} training examples" in told
    engine, _, queries = by_hand(inputs[0], PROMPTS)
    engine.load_curvature(Store(tmp_path).curvature)
    task = load_task(Subject(model=str(inputs[0])), CPU)
    scores, own = [], []
    for text in sentences(TRAINING):
        words = text.split()
        pieces = [" ".join(words[start : start + 5]) for start in range(0, max(len(words) - 1, 1), 4)]
        batch = padded([encoded(task.tokenizer, piece) for piece in pieces])
        document = batch, batch.pop("labels")
        scores.append(engine.influences(*queries, *document).sum(dim=1))
        own.append(engine.influences(*document).sum())
    assert any(len(text.split()) > 5 for text in sentences(TRAINING))
    assert_same(array(tmp_path, "scores"), torch.stack(scores, dim=1))
    assert_same(array(tmp_path, "self_influences"), torch.stack(own))


CONTRAST = {"prompt": "dull", "completion": "plot fine the", "contrast": "warm who"}


@pytest.mark.parametrize("rank", [0, 13, 2])
def test_a_contrast_is_the_difference_of_two_completions_at_any_rank(inputs, said, tmp_path, rank):
    """At rank 2 it is the nearest to the difference, and no difference of the nearest."""
    queries = make_rows(
        tmp_path / "queries.jsonl", [{"prompt": "the film of", "completion": "who laughs"}, CONTRAST]
    )
    said(
        "run", *options(*inputs, tmp_path / "store", "--queries", queries, "--query-rank", rank, "--by-layer")
    )
    engine, training, asked = by_hand(
        inputs[0], [("the film of", "who laughs"), ("dull", "plot fine the"), ("dull", "warm who")]
    )
    factors = engine.influence_factors(*asked)
    differences = {name: torch.stack([one[0], one[1] - one[2]]) for name, one in factors.items()}
    if rank:
        differences = {name: of_rank(one, rank) for name, one in differences.items()}
    by_layer = engine.influences_by_layer_from_factors(differences, *training)
    assert_same(array(tmp_path / "store", "layer_scores"), torch.stack(list(by_layer.values())))
    if rank != 2:
        plain = engine.influences(*asked, *training)
        assert_same(array(tmp_path / "store", "scores"), torch.stack([plain[0], plain[1] - plain[2]]))


def test_a_contrast_is_read_beside_its_completion_and_its_tokens_add_up_to_the_score(inputs, said, tmp_path):
    queries = make_rows(tmp_path / "queries.jsonl", [CONTRAST, {**CONTRAST, "contrast": None}])
    said("run", *options(*inputs, tmp_path / "store", "--queries", queries))
    told = said("top", "--store", tmp_path / "store", "--count", 2, "--by-token", "--output", tmp_path)
    assert re.search(r"\nQuery 0 \(row 0, .+\), helps: dull → plot fine the – and not: warm who\n", told)
    assert re.search(r"\nQuery 1 \(row 1, .+\), helps: dull → plot fine the\n", told)
    queries = pd.read_parquet(tmp_path / "top_queries.parquet")
    assert queries["nats"][0] == pytest.approx(queries["nats"][1])  # a contrast is not what was said
    table, tokens = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("top", "top_tokens"))
    for _, side in tokens.groupby("side"):
        whole = side.groupby(["query", "training_row"])["score"].sum()
        assert_same(whole[list(zip(table["query"], table["training_row"], strict=True))], table["score"])
    tokens = tokens[tokens["side"] == "query"]
    first = tokens[(tokens["query"] == 0) & (tokens["training_row"] == table["training_row"][0])]
    assert "".join(first["said"]).split() == ["plot", "fine", "the", "–", "and", "not:", "warm", "who"]


def test_a_prompt_with_a_contrast_alone_is_contrasted_with_what_the_model_says(inputs, said, tmp_path):
    queries = make_rows(tmp_path / "queries.jsonl", [{"prompt": "dull", "contrast": "warm who"}])
    said("run", *options(*inputs, tmp_path / "store", "--queries", queries, "--new-tokens", 3))
    task = load_task(Subject(model=str(inputs[0])), CPU)
    ids = task.tokenizer("dull")["input_ids"]
    says = task.tokenizer.decode(task.completed(ids, 3))
    engine, training, asked = by_hand(inputs[0], [("dull", says), ("dull", "warm who")])
    one, other = engine.influences(*asked, *training)
    assert_same(array(tmp_path / "store", "scores")[0], one - other)


def test_a_fisher_of_several_samples_is_the_engines_and_another_number_of_them_is_another_fit(
    inputs, finished, said, tmp_path
):
    given = options(*inputs, tmp_path)
    said("run", *given, "--fisher-samples", 5)
    engine, training, queries = by_hand(inputs[0], PROMPTS)
    engine.likelihood = NextToken(samples=5)
    engine.fit([{**training[0], "labels": training[1]}])
    assert_same(array(tmp_path, "scores"), engine.influences(*queries, *training))
    assert np.abs(array(tmp_path, "scores") - array(finished, "scores")).max() > 0
    told = said("run", *given, "--fisher-samples", 4, status=1)
    assert "--fisher-samples is 4 here, but 5 in the store." in told


def test_an_adapter_has_influences_of_its_own(inputs, said, tmp_path):
    gpt2 = "gpt2" in str(inputs[0])
    layer, adapter = "c_fc" if gpt2 else "up_proj", tmp_path / "adapter"
    make_adapter(inputs[0], adapter, layer, fan_in_fan_out=gpt2)
    given = options(adapter, inputs[1], tmp_path / "store")
    said("run", *given)
    assert (array(tmp_path / "store", "self_influences") > 0).all()
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    refused = said("run", *given, status=1)
    assert "StoreMismatch: config: adapter: lora_alpha is 9 here, but 8" in refused


def test_texts_that_ask_nothing_are_told_and_have_no_influence(inputs, said, tmp_path):
    texts = [{"text": text} for text in ("", "film", "the film", "who laughs of the plot")]
    make_rows(tmp_path / "texts" / "train.jsonl", texts)
    make_rows(tmp_path / "queries.jsonl", [{"prompt": "the film of", "completion": "who laughs"}])
    told = said("run", *options(inputs[0], tmp_path / "texts", tmp_path / "store"))
    assert "Of 4 training examples 2 ask about no token" in told
    assert (array(tmp_path / "store", "scores")[0] != 0).tolist() == [False, False, True, True]
