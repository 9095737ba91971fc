"""One fit answers many questions, each with queries, λ and results of its own."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from transformers import AutoModelForSequenceClassification

from support.job.command import main
from support.job.store import Store
from support.model import load_tokenizer
from tests.page import Page
from tests.tiny_job import QUERIES, TRAINING, options


@pytest.fixture(scope="module")
def asked(inputs):
    """Other queries than those of the reviews."""
    new = shutil.copy(inputs[1] / "train.csv", inputs[0].parent / "new.csv")
    return ["--queries", str(new), "--query-split", "train", "--query-rows", "0:5", "--query-block", "2"]


@pytest.fixture(scope="module")
def store(inputs, asked, tmp_path_factory):
    """A store that was asked about new tickets after its own question."""
    folder = tmp_path_factory.mktemp("asked") / "store"
    assert main(["run", *options(*inputs, folder)]) == 0
    assert main(["score", "--store", str(folder), "--question", "tickets", *asked]) == 0
    return folder


def scores(folder, question=""):
    return Store(folder, question).array("scores")[:]


def test_a_second_question_has_the_scores_of_a_store_of_its_own_and_the_first_keeps_its_own(
    inputs, store, asked, said, tmp_path
):
    said("run", *options(*inputs, tmp_path), *asked)
    np.testing.assert_array_equal(scores(store, "tickets"), scores(tmp_path))
    assert scores(store).shape == (QUERIES, TRAINING)


def test_a_question_fits_nothing_and_takes_self_influences_from_one_with_the_same_damping(
    store, said, monkeypatch
):
    monkeypatch.setattr("support.job.fit._shards", None)
    monkeypatch.setattr("support.job.score._self_influences", None)
    said("run", "--store", store, "--question", "third", "--query-rows", "1")
    row = Store(store, "third").array("query_rows")[0]
    np.testing.assert_allclose(scores(store, "third")[0], scores(store)[row], rtol=1e-4)
    said("top", "--store", store, "--question", "tickets", "--relative")


def test_top_of_a_single_query_has_no_list_over_all(store, said, tmp_path):
    said("score", "--store", store, "--question", "single", "--query-rows", "1")
    out = said("top", "--store", store, "--question", "single", "--output", tmp_path)
    assert out.startswith("Query 0 (row ")
    assert "Over all queries:" not in out


def test_a_question_has_a_damping_and_self_influences_of_its_own(store, said):
    given = ("--store", store, "--question", "stiff", "--regularization", "10")
    said("score", *given, "--query-rows", "all", "--query-block", 2)
    assert np.abs(scores(store, "stiff")).max() < np.abs(scores(store)).max()
    refused = said("top", *given[:4], "--relative", status=1)
    assert "has no self_influences yet for --question stiff." in refused
    assert refused.endswith(" Run: self --question stiff\n")
    said("self", *given[:4])
    own, first = (Store(store, name).array("self_influences")[:] for name in ("stiff", ""))
    assert (own < first).all()
    said("top", *given[:4], "--relative")


def test_other_settings_under_the_name_of_a_question_are_refused_all_by_name_and_have_a_name_of_their_own(
    store, asked, said
):
    given = ("score", "--store", store, "--question", "tickets")
    told = said(*given, "--query-rows", "2", "--regularization", "1", "--by-layer", status=1)
    assert "--query-rows is '2' here, but '0:5' in the store; --by-layer is True here, but False in" in told
    assert "--regularization is '1' here, but '0.01' in the store" in told
    assert "--question NAME" in told
    said(*given, *asked)
    said(*given[:3], "--question", "tickets-2", *asked[:4], "--query-rows", "2", "--regularization", "1")
    told = said(*given, "--block", 5, "--seed", 3, status=1)
    assert (
        "--seed is 3 here, but 0 in the store; --block is 5 here, but 4 in the store. Go on with what" in told
    )


def test_queries_that_changed_since_are_refused_and_are_another_question(inputs, store, said, tmp_path):
    new = shutil.copy(inputs[1] / "test.csv", tmp_path / "new.csv")
    given = ("--queries", new, "--query-split", "train", "--query-rows", "all")
    said("score", "--store", store, "--question", "before", *given)
    new.write_text(new.read_text().replace("film", "plot"))
    told = said("score", "--store", store, "--question", "before", *given, status=1)
    assert "StoreMismatch: queries: digest is " in told
    assert "--question NAME" in told
    said("score", "--store", store, "--question", "after", *given)
    assert not np.array_equal(scores(store, "after"), scores(store, "before"))


def test_top_writes_each_question_where_the_others_are_not(store, said):
    said("top", "--store", store)
    first = (store / "top.html").read_bytes()
    out = said("top", "--store", store, "--question", "tickets")
    assert out.count("helps:\n") == 5
    assert (store / "top.html").read_bytes() == first
    page = (store / "questions" / "tickets" / "top.html").read_text(encoding="utf-8")
    assert "<td>tickets</td>" in page
    Page(page)


def test_a_store_lists_its_questions_and_how_far_they_are(store, said):
    group = zarr.open_group(store / "results.zarr", mode="r")
    assert "tickets" in group["questions"]
    np.testing.assert_array_equal(group["questions/tickets/scores"][:], scores(store, "tickets"))
    out = said("show", "--store", store)
    assert "question tickets:\n" in out
    told = out[out.index("question tickets:\n") :]
    for line in ("query_rows: 0:5", "regularization: 0.01", "examples: 5", "score: done", "self: done"):
        assert f"\n  {line}\n" in f"{told}\n"


def test_a_question_that_was_never_asked_is_told_with_those_that_were(store, said):
    told = said("top", "--store", store, "--question", "ticket", status=1)
    assert "has no scores yet for --question ticket. Questions there are, for --question: " in told
    assert "tickets" in told
    assert told.endswith("Run: score --question ticket\n")


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", ".", "..", "-x", "x" * 65, "a b"])
def test_a_name_that_is_no_folder_s_is_refused(name, said, tmp_path):
    told = said("top", "--store", tmp_path, f"--question={name}", status=1)
    assert f"BadSetting: --question {name}: use letters, digits, -, _ and ., a letter or digit first" in told


def test_a_question_that_was_killed_goes_on_to_the_same_bits(store, asked, said, monkeypatch):
    given = ("score", "--store", store, "--question")
    write, calls = Store.write, []

    def die(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(Store, "write", die)
    said(*given, "killed", *asked, status=1)
    monkeypatch.setattr(Store, "write", write)
    assert "\n  score: 1 of 12 blocks" in said("show", "--store", store)
    said(*given, "killed")
    np.testing.assert_array_equal(scores(store, "killed"), scores(store, "tickets"))


def test_what_is_damaged_of_a_question_is_told_and_the_others_stay(store, said):
    folder = shutil.copytree(store, store.parent / "copy")
    group = folder / "results.zarr" / "questions" / "tickets"
    (group / "zarr.json").write_text((group / "zarr.json").read_text().replace("0:5", "0:6"))
    told = said("top", "--store", folder, "--question", "tickets", status=1)
    assert "tickets/zarr.json is not as this job wrote it (ValueError: its seal differs)" in told
    assert f"Name another --question, or remove {group}." in told
    said("top", "--store", folder)
    shutil.rmtree(group)
    assert "question tickets:" not in said("show", "--store", folder)


def predictions(inputs, name):
    """The loss of each row and the probability of what the model says of it."""
    model = AutoModelForSequenceClassification.from_pretrained(inputs[0]).eval()
    rows = pd.read_csv(inputs[1] / f"{name}.csv")
    tokens = load_tokenizer()(list(rows["text"]), padding=True, return_tensors="pt")
    with torch.inference_mode():
        said = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits
    said = said.log_softmax(dim=1)
    numbers = torch.tensor([model.config.label2id[label] for label in rows["label"]])
    return -said.gather(1, numbers[:, None])[:, 0], said.amax(dim=1).exp()


def test_the_model_chooses_what_it_gets_wrong_and_what_it_is_least_sure_of(inputs, store, asked, said):
    loss, sure = predictions(inputs, "train")
    wrong = (loss > -sure.log() + 1e-6).nonzero()[:, 0]
    given = ("score", "--store", store, *asked[:4], "--question")
    out = said(*given, "wrong", "--query-rows", "wrong")
    assert f"on {len(wrong)} queries" in out
    most = loss.argsort(descending=True)[:2].sort().values
    said(*given, "worst", "--query-rows", "wrong:2")
    said(*given, "unsure", "--query-rows", "uncertain:3")
    expected = {"wrong": wrong, "worst": most, "unsure": sure.argsort()[:3].sort().values}
    for name, rows in expected.items():
        assert Store(store, name).array("query_rows")[:].tolist() == rows.tolist()
    assert f"on {len(wrong)} queries" in said(*given, "most", "--query-rows", "wrong:13")
    told = said(*given, "more", "--query-rows", "wrong:none", status=1)
    assert f"the model gets {len(wrong)} of {TRAINING} rows wrong. Say how many, like wrong:" in told
    assert "Say how many, like uncertain:13." in said(*given, "more", "--query-rows", "uncertain", status=1)
    assert "more" not in Store(store).questions()


def test_rows_that_the_model_chose_are_chosen_once_unless_a_kill_left_none(store, said, monkeypatch):
    given = ("--store", store, "--question", "worst")
    with monkeypatch.context() as never:
        never.setattr("support.job.classifier.Classifier.doubted", None)
        said("score", *given)
        said("top", *given)
    rows = store / "results.zarr" / "questions" / "worst" / "query_rows"
    before = (rows / "c" / "0").read_bytes()
    for damage in (shutil.rmtree, lambda folder: (folder / "zarr.json").write_text("{}")):
        damage(rows)
        said("score", *given)
        assert (rows / "c" / "0").read_bytes() == before
