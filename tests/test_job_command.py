"""The command line from the first run to the page, in this process, on a model of two blocks."""

import argparse
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import DistilBertForSequenceClassification

from support.job.command import main, parser
from support.job.store import Store
from support.model import LABELS, load_tokenizer
from tests.tiny_job import QUERIES, TRAINING, attributes, make_model, options

# From the first run to the page


def test_a_run_leaves_every_influence_and_says_what_it_is_about(finished):
    facts, store = attributes(finished), Store(finished)
    assert store.array("scores").shape == (QUERIES, TRAINING)
    assert np.isfinite(store.array("scores")[:]).all()
    assert (store.array("self_influences")[:] > 0).all()
    assert facts["subject"]["layers"] == "ffn,classifier"
    assert facts["fitted_on"]["examples"] == 5
    assert facts["damping"] == {"regularization": "0.01"}
    assert not store.partial_fit.exists()


def test_the_same_run_again_has_nothing_left_to_do_and_show_says_so(finished, inputs, said):
    scores = Store(finished).array("scores")[:]
    assert "It was fitted before." in said("run", *options(*inputs, finished), "--fit-rows", 5)
    np.testing.assert_array_equal(Store(finished).array("scores")[:], scores)
    out = said("show", "--store", finished)
    assert out.startswith(str(finished))
    assert "  layers: ffn,classifier\n" in out
    assert "prompt_column" not in out  # it is empty
    assert out.endswith("progress:\n  fit: done\n  score: done\n  self: done\n")


def test_top_prints_a_table_and_leaves_it_as_data_and_as_a_page(finished, said, tmp_path):
    out = said("top", "--store", finished, "--count", 2, "--output", tmp_path / "out")
    assert out.startswith("Over all queries:\n")
    for query in range(QUERIES):
        for effect in ("helps", "harms"):
            assert re.search(
                rf"\nQuery {query} \(row {query}, labelled \w+, predicted \w+ \d+%\), {effect}:\n", out
            )
    table = pd.read_parquet(tmp_path / "out" / "top.parquet")
    assert list(table) == [
        *("query", "query_row", "effect", "place", "training_row"),
        *("score", "share", "label", "text"),
        *("class_name", "predicted", "p_predicted", "p_label"),
    ]
    assert len(table) == QUERIES * 2 * 2
    overall = pd.read_parquet(tmp_path / "out" / "top_overall.parquet")
    assert list(overall) == ["place", "training_row", "share", "helps", "label", "text"]
    scores = Store(finished).array("scores")[:]
    np.testing.assert_allclose(table["score"], scores[table["query"], table["training_row"]])
    page = (tmp_path / "out" / "top.html").read_text(encoding="utf-8")
    assert "<td>plain and relative</td>" in page
    assert page.count('<section id="query-') == QUERIES
    assert table["text"][0] in page
    out = said("top", "--store", finished, "--relative")
    assert out.endswith(f"as data: {finished / 'top.parquet'}\n")
    assert "<td>relative and plain</td>" in (finished / "top.html").read_text(encoding="utf-8")


def test_top_tells_what_the_model_says_of_queries_and_training_examples(inputs, finished, said, tmp_path):
    said("top", "--store", finished, "--output", tmp_path)
    model, tokenizer = DistilBertForSequenceClassification.from_pretrained(inputs[0]).eval(), load_tokenizer()
    names = {name: number for number, name in LABELS.items()}
    for table in ("top", "top_queries"):
        for row in pd.read_parquet(tmp_path / f"{table}.parquet").to_dict("records"):
            p = model(**tokenizer(row["text"], return_tensors="pt")).logits.double().softmax(dim=1)[0]
            assert row["class_name"] == LABELS[row["label"]]
            assert row["p_label"] == pytest.approx(p[row["label"]].item(), rel=1e-4)
            assert row["p_predicted"] == pytest.approx(p.max().item(), rel=1e-4)
            assert names[row["predicted"]] == p.argmax()


def test_top_shows_and_adds_up_by_columns_of_ones_own(inputs, said, tmp_path):
    texts = shutil.copytree(inputs[1], tmp_path / "texts")
    for split in ("train", "test"):
        rows = pd.read_csv(texts / f"{split}.csv")
        rows["source"] = ["web", "mail", ""][: len(rows)] * (len(rows) // 3) + ["web"] * (len(rows) % 3)
        rows.assign(id=[f"{split}-{row}" for row in rows.index]).to_csv(texts / f"{split}.csv", index=False)
    store = tmp_path / "store"
    said("run", *options(inputs[0], texts, store))
    out = said("top", "--store", store, "--keep", "id,source", "--by", "source")
    assert "\nBy source:\n" in out
    for table in ("top", "top_overall"):
        kept = pd.read_parquet(store / f"{table}.parquet")
        assert kept["id"].tolist() == [f"train-{row}" for row in kept["training_row"]]
    asked = pd.read_parquet(store / "top_queries.parquet")
    assert asked["id"].tolist() == [f"test-{row}" for row in range(QUERIES)]
    by_source = pd.read_parquet(store / "top_by.parquet")
    assert set(by_source["value"]) == {"web", "mail", ""}
    assert by_source["examples"].sum() == TRAINING
    assert "train-0" in (store / "top.html").read_text(encoding="utf-8")
    told = said("top", "--store", store, "--keep", "score", status=1)
    assert "BadSetting: --keep score: the tables have a column of this name already. Leave it out" in told
    told = said("top", "--store", store, "--by", "writer", status=1)
    assert "has no column 'writer'. There are: text, label, source, id. See --keep, --by." in told


def test_the_tokens_of_training_texts_add_up_to_their_scores(finished, said, tmp_path):
    said("top", "--store", finished, "--count", 2, "--output", tmp_path, "--by-token")
    table, tokens = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("top", "top_tokens"))
    whole = tokens.groupby(["query", "training_row"])["score"].sum()
    found = whole[list(zip(table["query"], table["training_row"], strict=True))]
    np.testing.assert_allclose(found, table["score"], rtol=1e-3)
    assert set(tokens["side"]) == {"training"}
    one = tokens[tokens["training_row"] == table["training_row"][0]].drop_duplicates("token")
    assert "".join(one["said"]) == f"[CLS] {table['text'][0]} [SEP]"


def test_top_that_dies_while_it_writes_leaves_the_old_page_whole(finished, said, tmp_path, monkeypatch):
    said("top", "--store", finished, "--output", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def die(path, *_, **__):
        path.write_bytes(b"half")
        raise RuntimeError("killed")

    monkeypatch.setattr(type(tmp_path), "write_text", die)
    monkeypatch.setattr(pd.DataFrame, "to_parquet", lambda _, path: die(path))
    told = said("top", "--store", finished, "--count", 1, "--output", tmp_path, status=1)
    assert "RuntimeError: killed" in told
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# What is refused, with exit status 1 and a reason


def test_a_step_before_its_time_names_the_one_to_run(inputs, said, tmp_path):
    store = tmp_path / "store"
    given = options(*inputs, store)
    assert "There is no store at" in said("top", "--store", store, status=1)
    assert said("score", *given[:-2], status=1).endswith("has no curvature yet. Run: fit\n")
    said("fit", *given[:8])
    assert said("top", "--store", store, status=1).endswith("has no scores yet. Run: score\n")


def test_another_model_under_the_same_name_is_refused(inputs, said, tmp_path):
    _, reviews = inputs
    model, store = make_model(tmp_path / "model"), tmp_path / "store"
    said("fit", *options(model, reviews, store)[:6], "--layers", "classifier")
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"n_heads": 2', '"n_heads": 4'))
    told = "StoreMismatch: config: n_heads is 4 here, but 2 in the store"
    assert told in said("fit", "--store", store, status=1)
    make_model(model, seed=1)
    assert "StoreMismatch: model: " in said("fit", "--store", store, status=1)


@pytest.mark.parametrize("command", ["plan", "run", "fit", "score", "self"])
def test_a_folder_that_holds_other_things_is_refused_and_left_as_it_is(inputs, said, tmp_path, command):
    model, reviews = inputs
    (tmp_path / "thesis.tex").touch()
    given = ("--store", tmp_path, "--model", model, "--dataset", reviews)
    err = said(command, *given, status=1)
    assert "holds other things (thesis.tex) and no store. Name a new folder." in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_store_among_the_texts_is_refused(inputs, said):
    model, reviews = inputs
    told = said("run", *options(model, reviews, reviews / "store"), status=1)
    assert "lies among the files of --dataset. Name one elsewhere." in told
    assert not (reviews / "store").exists()


def test_texts_that_changed_since_they_were_scored_are_refused(inputs, said, tmp_path):
    model, reviews = inputs
    own = shutil.copytree(reviews, tmp_path / "reviews")
    said("run", *options(model, own, tmp_path / "store"))
    header, *rows = (own / "train.csv").read_text().splitlines()
    (own / "train.csv").write_text("\n".join([header, *reversed(rows)]) + "\n")
    for command in ("fit", "top"):
        refused = said(command, "--store", tmp_path / "store", status=1)
        assert "StoreMismatch: training: digest is " in refused


def test_a_single_file_is_not_training_examples_and_queries_at_once(inputs, said, tmp_path):
    model, reviews = inputs
    given = ["--model", str(model), "--dataset", str(reviews / "train.csv")]
    store = ["--store", str(tmp_path / "store")]
    said("fit", *store, *given, "--layers", "classifier")
    refused = said("score", *store, "--query-rows", "2", status=1)
    assert "has one split" in refused
    assert "--queries" in refused
    said("score", *store, "--query-rows", "2", "--queries", str(reviews / "test.csv"))


def test_a_wrong_option_of_score_settles_nothing_and_what_is_settled_holds(inputs, said, tmp_path):
    model, reviews = inputs
    given = options(model, reviews, tmp_path / "store")[:8]
    said("fit", *given)
    said("score", *given, "--query-rows", "99", "--regularization", "5", status=1)
    said("score", *given, "--query-rows", "2", "--regularization", "1e-2")
    said("score", *given, "--regularization", "0.010")
    refused = said("score", *given, "--regularization", "1", status=1)
    assert refused.startswith("\nStoreMismatch: --regularization is '1' here, but '0.01' in the store.")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--tell-seconds", "0"), "--tell-seconds 0.0: use 1 or more."),
        (("--query-block", "0"), "--query-block 0: use 1 or more."),
        (("--precision", "half"), "--precision half: use full or float32 or bfloat16."),
        (("--seed", "-1"), "--seed -1: use 0 or more."),
    ],
)
def test_numbers_that_mean_nothing_are_refused(inputs, said, tmp_path, option, message):
    given = options(*inputs, tmp_path / "store")[:8]
    assert message in said("run", *given, *option, status=1)


def test_all_that_is_wrong_with_settings_model_and_data_is_refused_at_once(inputs, said, tmp_path):
    model, reviews = inputs
    wrong = ("--block", 0, "--regularization", "x", "--query-block", 0)
    given = ("run", "--store", tmp_path / "store", "--dataset", reviews, *wrong)
    numbers = ["--block 0: use 1", "--regularization x: use", "--query-block 0: use 1"]
    nowhere = ("--model", tmp_path / "nowhere", "--training-split", "dev", "--query-split", "may")
    unusable = [f"--model {tmp_path}", "has no split 'dev'", "has no split 'may'"]
    columns = ("--model", model, "--text-column", "body", "--label-column", "mood", "--query-split", "may")
    unread = ["has no column 'body', 'mood'. There are: text, label", "has no split 'may'"]
    rows = ("--model", model, "--fit-rows", 99, "--query-rows", "99")
    unknown = ["--fit-rows 99: use all", "--query-rows 99: use all"]
    for others, told in ((nowhere, unusable), (columns, unread), (rows, unknown)):
        lines = said(*given, *others, status=1).strip().splitlines()
        assert len(lines) == len(numbers + told)
        assert all(any(one in line for line in lines) for one in numbers + told)
    assert not (tmp_path / "store" / "results.zarr").exists()


# What it will cost


def test_a_plan_says_time_memory_and_disk(inputs, said, tmp_path):
    given = options(*inputs, tmp_path / "store")[:10]
    out = said("plan", *given)
    assert out.startswith("13 training examples, ")
    assert "; 3 queries; 1 process\n" in out
    for line in ("fit ", "self ", "score ", "memory of a process", "disk: curvature", "disk: scores"):
        assert f"\n{line}" in out
    assert "scored in 2 groups" in said("plan", *given, "--query-block", 2)


# Help


def commands():
    actions = parser()._actions
    return next(one for one in actions if isinstance(one, argparse._SubParsersAction)).choices


def test_the_guide_names_every_step(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    for command in commands():
        assert f" {command} " in out


def test_the_users_page_names_every_option():
    page = (Path(__file__).parents[1] / "notebooks" / "api" / "jobs.md").read_text()
    for command in commands().values():
        for action in command._actions:
            typed = (
                action.option_strings[-1]
                if action.option_strings
                else f"{command.prog[-3:]} {action.metavar} …"
            )
            assert action.dest == "help" or f"`{typed}`" in page
