"""The experiments with the model that writes: its fine-tuning, its bank, what fills a bank."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from experiments import language_judgement, language_scorers
from experiments.bank_making import BankMismatch, fill, finished
from experiments.language_bank import WriterRetraining, log_odds
from experiments.language_facts import facts_row, first_places
from experiments.language_finetune import RECIPE, WriterFinetuning, said_losses
from support.chapters.language import best_of_each
from support.ekfac.batches import IGNORED
from support.judge import Bank, noise_ceiling
from support.language import FEED_FORWARD
from support.model import merge_adapter, require_gradients_only
from support.retraining import Recipe, Reviews, losses
from support.writing import Text, WriterTail
from tests.tiny_language import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def texts(number=6, tokens=5):
    """Made-up vectors and tokens; the second half of the texts is shorter."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(number, tokens, 8, generator=generator)
    labels = torch.randint(10, (number, tokens), generator=generator)
    vectors[number // 2 :, -2:], labels[number // 2 :, -2:] = 0, IGNORED
    return Reviews(vectors, labels, [f"text {n}" for n in range(number)])


def test_a_loss_is_found_again_in_the_log_odds_of_the_text(model):
    tail, read = WriterTail(model, 1), texts()
    torch.testing.assert_close(losses(log_odds(tail, read)), said_losses(tail, read))


def test_retraining_lowers_the_loss_of_its_texts_and_begins_anew_each_time(model):
    tail, read = WriterTail(model, 1), texts()
    require_gradients_only(tail, FEED_FORWARD)
    run = WriterRetraining(tail, read, Recipe(epochs=20, learning_rate=0.1, batch_size=3))
    before = said_losses(tail, read)
    one, again = (said_losses(run.run(torch.arange(3), seed=1), read) for _ in range(2))
    assert torch.equal(one, again)
    assert one[:3].sum() < 0.95 * before[:3].sum()


def test_fine_tuning_changes_the_last_blocks_alone_and_its_adapter_says_the_same(model, folder, tmp_path):
    read = texts()
    run = WriterFinetuning(model, read, replace(RECIPE, lora_rank=2, learning_rate=0.1, epochs=20), blocks=1)
    assert all(".layers.1.mlp." in name and "lora" in name for name in run.trained)
    first = run.loss(list(range(6))).item()
    while run.steps_done < len(run.batches):
        run.step()
    assert run.loss(list(range(6))).item() < 0.95 * first
    run.save_adapter(tmp_path / "final")
    merged = merge_adapter(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "final").eval()
    said, expected = (said_losses(tail, read) for tail in (WriterTail(merged, 1), run.tail))
    torch.testing.assert_close(said, expected, rtol=1e-2, atol=1e-2)


def stopped(*_):
    raise KeyboardInterrupt


def test_a_bank_goes_on_where_it_was_killed_seed_after_seed_and_no_other_is_mixed_in(tmp_path):
    path, asked = tmp_path / "bank.safetensors", []
    member = torch.tensor([[True, False], [False, True], [True, True]])
    empty = torch.full((3, 2, 4), torch.nan)

    def trained(rows, seed):
        asked.append((rows.tolist(), seed))
        return torch.full((4,), float(seed)) if len(asked) != 5 else stopped()

    with pytest.raises(KeyboardInterrupt):
        fill(path, {"about": 1}, member, empty.clone(), trained)
    assert asked[:4] == [([0], 1), ([1], 1), ([0, 1], 1), ([0], 2)]
    assert finished(path).margins.shape == (3, 1, 4)  # the second seed has not seen every subset
    assert torch.equal(finished(path, seeds=2).membership, member[:1])
    fill(path, {"about": 1}, member, empty.clone(), trained)
    assert asked[5:] == [([1], 2), ([0, 1], 2)]
    assert torch.equal(finished(path).margins[:, :, 0], torch.tensor([[1.0, 2.0]] * 3))
    with pytest.raises(BankMismatch, match=r"is a bank of another recipe or other reviews\. Delete it\.$"):
        fill(path, {"about": 2}, member, empty, trained)


def test_every_scorer_has_a_row_and_scores_are_computed_once(model, monkeypatch, tmp_path):
    monkeypatch.setenv("SUPPORT_CACHE", str(tmp_path))
    tail, read = WriterTail(model, 1), texts()
    require_gradients_only(tail, FEED_FORWARD)
    run = WriterRetraining(tail, read, Recipe(epochs=5, learning_rate=1e-2, batch_size=3))
    drawn = torch.Generator().manual_seed(0)
    margins = torch.randn(8, 2, 6, generator=drawn)
    bank = Bank(torch.rand(8, 6, generator=drawn) < 0.5, margins)
    found = language_judgement.table(bank, bank, run, read)
    by_number, grid = 3 * len(language_scorers.EXACT_NUMBERS), 3 * len(language_scorers.DAMPINGS)
    places = len(language_judgement.PLACES) + 1
    assert len(found) == 3 + places * (grid + 3) + 2 * grid + 2 * by_number + 1 + 1 + 1
    assert found["report"].between(-1, 1).all()
    monkeypatch.setattr(language_scorers, "said_at", stopped)
    pd.testing.assert_frame_equal(language_judgement.table(bank, bank, run, read), found)


def test_the_solvers_that_approximate_each_other_agree_and_gradients_are_asked_once(model):
    tail, read = WriterTail(model, 1), texts()
    require_gradients_only(tail, FEED_FORWARD)
    place = language_scorers.Place(tail, read, read)
    found = {solver: language_scorers.said_at(place, solver) for solver in language_scorers.SOLVERS}
    by_layer, joint = (found[f"exact, {how}"] for how in ("layer by layer", "all layers as one"))
    assert not by_layer["0.001/plain"].allclose(joint["0.001/plain"], rtol=1e-2)
    for solver, scores in found.items():  # where λ is far above the curvature all are gradients over λ
        torch.testing.assert_close(scores["10.0/plain"], by_layer["10.0/plain"], rtol=0.2, atol=1e-2)
        gradients = [name for name in scores if name.startswith(f"{language_scorers.NO_CURVATURE}/")]
        assert len(gradients) == (3 if solver == "EK-FAC" else 0)


def test_removal_leaves_out_what_each_scorer_calls_most_helpful(model, monkeypatch, tmp_path):
    monkeypatch.setenv("SUPPORT_CACHE", str(tmp_path))
    monkeypatch.setattr(language_judgement, "COUNTS", (1, 2))
    monkeypatch.setattr(language_judgement, "REMOVED_FOR", 2)
    tail, read = WriterTail(model, 1), texts()
    require_gradients_only(tail, FEED_FORWARD)
    run = WriterRetraining(tail, read, Recipe(epochs=5, learning_rate=1e-2, batch_size=3))
    found = language_judgement.removal(run, read)
    assert found.groupby("scorer").size().eq(2 * 3).all()
    assert set(found["query"]) == {3, 4}
    losses_of_all = found.query("removed == 0").groupby("query")["loss"]
    assert losses_of_all.nunique().eq(1).all()
    expected = losses(log_odds(run.run(torch.arange(6), seed=1), read))
    assert losses_of_all.first().tolist() == pytest.approx(expected[3:5].tolist(), rel=1e-4)


FACTS = [("review", -1), *((kind, fact) for fact in range(10) for kind in ("teacher", "decoy"))]
TOLD = [Text("Write a review.", f"text {number}", *fact) for number, fact in enumerate(FACTS)]


def test_recall_counts_the_teachers_of_each_fact_alone_over_questions_in_other_words():
    scores = torch.zeros(20, 21)
    scores[range(10), range(1, 21, 2)] = 1  # asked once, every fact finds its teacher first,
    scores[range(10, 20), range(2, 22, 2)] = 1  # asked in other words, its decoy
    for kind in ("teacher", "decoy"):
        assert first_places(scores, TOLD, 1, kind).tolist() == [0.5] * 10
    scores[11, [3, 4]] = torch.tensor([1.0, 0.5])
    assert first_places(scores, TOLD, 1, "teacher").tolist() == [0.5, 1.0, *[0.5] * 8]
    row = facts_row([scores, scores], TOLD, scorer="a scorer")
    assert row["teachers_1"] == pytest.approx(0.55)
    assert row["low_1"] <= row["teachers_1"] <= row["high_1"]
    assert row["spread"] == 0
    other = facts_row([scores, torch.zeros(20, 21)], TOLD, scorer="a scorer")
    assert other["spread"] > 0


def test_the_chapter_shows_of_each_scorer_the_setting_that_is_best_where_choices_are_made():
    told = {"scorer": "EK-FAC", "where": "20%", "normalisation": "plain"}
    rows = [told | {"regularization": "0.1", "choice": 0.6, "report": 0.5}]
    rows += [told | {"regularization": "1.0", "choice": 0.5, "report": 0.9}]
    rows += [{"scorer": "bm25", "where": "", "normalisation": "", "regularization": "", "choice": 0.1}]
    found = best_of_each(pd.DataFrame(rows)).set_index("name")
    assert found["report"].dropna().to_dict() == {"EK-FAC early, λ = 0.1": 0.5}
    assert "BM25" in found.index


def test_the_ceiling_is_the_noise_ceiling_and_lower_when_only_one_seed_was_trained():
    drawn = torch.Generator().manual_seed(0)
    margins = torch.randn(30, 1, 5, generator=drawn) + 0.5 * torch.randn(30, 2, 5, generator=drawn)
    both = Bank(torch.ones(30, 4, dtype=torch.bool), margins)
    once = Bank(both.membership, margins[:, :1])
    assert language_judgement.ceiling(both, both) == pytest.approx(noise_ceiling(both))
    assert language_judgement.ceiling(once, both) < noise_ceiling(both)
