"""What made the committed banks and tables: banks that survive a kill, scorers, removal."""

import numpy as np
import pytest
import torch

from experiments import bank_making, scorers
from experiments.bank_making import BankMismatch, Experiment, make_or_load
from experiments.judgement import segment_weights
from experiments.removal import most_helpful, removal_curve, single_removals
from support.assets import AssetDamaged
from support.ekfac import EkfacInfluence
from support.judge import Design, load_bank
from support.retraining import Recipe, Retraining, batches, losses, margins, untrained_tail
from tests.made_up import reviews

DESIGN = Design(subsets=7, seeds=2)


@pytest.fixture(scope="module")
def retraining():
    return Retraining(untrained_tail(), reviews(24), Recipe(epochs=2, learning_rate=1e-3, batch_size=8))


@pytest.fixture
def question(retraining):
    path = retraining.path(torch.arange(24), seed=0, shares=(0.5, 1.0))
    return scorers.Question(path, retraining.reviews, reviews(5, seed=1))


def test_every_similarity_has_a_row_per_query_and_a_column_per_review(question):
    for scorer in scorers.SIMILARITIES.values():
        scores = scorer(question)
        assert scores.shape == (5, 24)
        assert scores.isfinite().all()


def test_label_signs_are_positive_where_labels_agree(question):
    agree = question.queries.labels[:, None] == question.train.labels[None]
    assert torch.equal(scorers.same_label(question) > 0, agree)
    signed = scorers.with_label_sign(lambda _: torch.ones(5, 24))(question)
    assert torch.equal(signed, scorers.same_label(question))


@pytest.mark.parametrize("scorer", [scorers.tf_idf, scorers.bm25], ids=["TF-IDF", "BM25"])
def test_texts_are_nearest_to_themselves(question, scorer):
    mirror = scorers.Question(question.path, question.train, question.train)
    scores = scorer(mirror)
    assert (scores.diagonal() >= scores.amax(dim=1) - 1e-6).all()


def test_ekfac_scores_at_the_end_are_the_engine_s(question):
    engine = EkfacInfluence(question.trained(), hessian_regularization=0.01)
    train, queries = question.train, question.queries
    engine.fit(batches(train))
    ((_, found),) = scorers.ekfac_at(question.path[-1], question, (0.01,))
    for name in ("plain", "relative"):
        expected = engine.score(batches(queries), batches(train), name)
        torch.testing.assert_close(found.all()[name], expected, rtol=1e-3, atol=1e-5)


def test_unit_residual_scores_forget_how_wrong_the_model_is_about_a_review(question):
    ((_, found),) = scorers.ekfac_at(question.path[-1], question, (0.01,))
    with torch.no_grad():
        p = question.trained()(question.train.vectors).softmax(dim=1)
    wrong = (p - torch.nn.functional.one_hot(question.train.labels, 2)).norm(dim=1)
    torch.testing.assert_close(found.all()["unit residual"] * wrong, found.influences)


@pytest.mark.parametrize("joint", [True, False])
def test_exact_scores_approach_gradient_products_as_damping_grows(question, joint):
    ((_, found),) = scorers.exact_at(question.path[-1], question, (1e9,), joint=joint)
    products = scorers.gradient_products(question.path[-1], question)["gradient dot product"]
    torch.testing.assert_close(found.influences * 1e9, products, rtol=1e-4, atol=1e-9)


def test_a_review_with_nothing_to_divide_by_has_no_say_instead_of_an_infinite_one():
    scores, sizes = torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([4.0, 0.0])
    found = scorers.Normalised(scores, sizes, sizes).all()
    assert found["relative"].tolist() == [[1.0, 0.0], [0.5, 0.0]]
    assert found["unit residual"].tolist() == [[0.5, 0.0], [0.25, 0.0]]


def test_a_bank_that_was_cut_short_goes_on_to_the_same_numbers(retraining, tmp_path, monkeypatch):
    queries = reviews(5, seed=1)
    whole = make_or_load(retraining, queries, DESIGN, tmp_path / "whole.safetensors")
    trained = []
    run = Retraining.run

    def killed(self, rows, seed):
        if len(trained) == 13:
            raise KeyboardInterrupt
        trained.append(seed)
        return run(self, rows, seed)

    monkeypatch.setattr(Retraining, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        make_or_load(retraining, queries, DESIGN, tmp_path / "cut.safetensors")
    monkeypatch.setattr(Retraining, "run", lambda *a: trained.append(a) or run(*a))
    resumed = make_or_load(retraining, queries, DESIGN, tmp_path / "cut.safetensors")
    assert torch.equal(resumed.margins, whole.margins)
    assert len(trained) == 13 + 2  # only the last subset was trained on again
    assert [path.name for path in tmp_path.glob("cut*")] == ["cut.safetensors"]


def test_a_recipe_may_begin_at_trained_weights(monkeypatch):
    monkeypatch.setattr(bank_making, "training_reviews", lambda *_: reviews(24))
    plain, further = Recipe(epochs=2, batch_size=8), Recipe(epochs=1, batch_size=8, trained_for=2)
    trained = bank_making.retraining(Experiment("", plain)).run_on_all(seed=0).state_dict()
    start = bank_making.retraining(Experiment("", further)).start
    assert all(torch.equal(trained[name], start[name]) for name in trained)


def test_a_finished_bank_is_loaded_and_another_one_in_its_file_refused_by_name(
    retraining, tmp_path, monkeypatch
):
    queries, path = reviews(5, seed=1), tmp_path / "bank.safetensors"
    made = make_or_load(retraining, queries, DESIGN, path)
    monkeypatch.setattr(Retraining, "run", None)
    for bank in (make_or_load(retraining, queries, DESIGN, path), load_bank(path)):
        assert torch.equal(bank.margins.half(), made.margins.half())
        assert torch.equal(bank.membership, made.membership)
    with pytest.raises(BankMismatch, match="its seeds is 2, this one's is 3"):
        make_or_load(retraining, queries, Design(subsets=7, seeds=3), path)
    with pytest.raises(BankMismatch, match="its queries is"):
        make_or_load(retraining, reviews(5, seed=2), DESIGN, path)
    path.write_bytes(b"not a bank")
    with pytest.raises(AssetDamaged, match="Delete it"):
        make_or_load(retraining, queries, DESIGN, path)
    with pytest.raises(AssetDamaged, match="cannot be read .* make it again"):
        load_bank(path)


def test_segment_weights_are_the_learning_rates_of_the_nearest_steps():
    assert segment_weights([0, 4], [1.0, 1.0, 1.0, 1.0]) == pytest.approx([0.75, 0.25])
    assert segment_weights([2], [3.0, 1.0, 4.0]) == pytest.approx([1.0])
    rates = torch.rand(17, generator=torch.Generator().manual_seed(0)).tolist()
    assert sum(segment_weights([0, 3, 9, 17], rates)) == pytest.approx(1.0)


def test_removal_trains_without_the_most_helpful_reviews(retraining):
    queries = reviews(5, seed=1)
    scores = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))
    curve = removal_curve(retraining, queries, scores, asked=[1, 4], counts=[3, 20], seeds=[1, 2])
    assert curve[["query", "removed"]].to_numpy().tolist() == [
        [1, 0], [4, 0], [1, 3], [1, 20], [4, 3], [4, 20],
    ]  # fmt: skip
    helpful = scores[4].argsort(descending=True)[:3]
    assert set(most_helpful(scores[4], 3).tolist()) == set(helpful.tolist())
    rows = torch.tensor([row for row in range(24) if row not in helpful])
    after = [losses(margins(retraining.run(rows, seed), queries))[4].item() for seed in (1, 2)]
    assert curve["loss"][4] == pytest.approx(np.mean(after), rel=1e-5)


def test_a_review_left_out_alone_leaves_all_others_in_their_batches():
    queries, train = reviews(3, seed=1), reviews(6)
    in_one_batch = Retraining(untrained_tail(), train, Recipe(epochs=2, learning_rate=1e-2, batch_size=6))
    changes = single_removals(in_one_batch, queries, [4], [1, 2])[0]
    for seed, change in zip((1, 2), changes, strict=True):
        whole, without = (
            losses(margins(in_one_batch.run(torch.tensor(rows), seed), queries))
            for rows in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 5])
        )
        torch.testing.assert_close(change, without - whole, rtol=1e-3, atol=1e-5)


def test_a_batch_of_nothing_but_the_review_left_out_is_no_step():
    one_by_one = Retraining(untrained_tail(), reviews(6), Recipe(epochs=1, batch_size=1))
    for without, steps in ((-1, 6), (4, 5)):
        one_by_one.run(torch.arange(6), 1, without)
        assert len(one_by_one.rates) == steps
