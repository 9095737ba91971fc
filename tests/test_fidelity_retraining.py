"""What the judge does: the tail of the classifier, its retrainings, banks of them, and removal."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from support.fidelity.bank import (
    BankDamaged,
    BankMismatch,
    Design,
    load_bank,
    make_bank,
)
from support.fidelity.removal import losses_without, most_helpful, removal_curve
from support.fidelity.retraining import Recipe, Retraining, losses, margins, segment_weights
from support.fidelity.tail import ClassifierTail, Reviews, read_reviews, untrained_tail
from support.imdb import ImdbDataset
from support.model import ModelLogitsWrapper, packaged_encoder
from tests.made_up import reviews


@pytest.fixture(scope="module")
def retraining():
    return Retraining(reviews(24), Recipe(epochs=2, learning_rate=1e-3, batch_size=8))


def state(tail):
    return {name: tensor.clone() for name, tensor in tail.state_dict().items()}


def test_the_tail_of_the_classifier_says_what_the_classifier_says(
    imdb, tokenizer, monkeypatch, tmp_path
):
    monkeypatch.setenv("SUPPORT_CACHE", str(tmp_path))
    texts = [text[:90] for text in imdb["train"].select([0, 24, 14_000])["text"]]
    short = (
        imdb["train"]
        .select([0, 24, 14_000])
        .map(lambda _, n: {"text": texts[n]}, with_indices=True)
    )
    dataset = ImdbDataset(short, tokenizer)
    classifier = packaged_encoder().eval()
    with torch.no_grad():
        expected = ModelLogitsWrapper(classifier)(dataset.batch([0, 1, 2])[0])
        found = ClassifierTail(classifier)(read_reviews(dataset).vectors)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_vectors_are_read_once(imdb, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("SUPPORT_CACHE", str(tmp_path))
    dataset = ImdbDataset(imdb["train"].select([24]), tokenizer, max_tokens=20)
    first = read_reviews(dataset)
    monkeypatch.setattr("support.fidelity.tail.packaged_encoder", None)
    torch.testing.assert_close(read_reviews(dataset).vectors, first.vectors, rtol=0, atol=0)


def test_the_tail_asks_gradients_of_its_linear_layers_alone():
    wanted = {n for n, p in untrained_tail().named_parameters() if p.requires_grad}
    layers = ["ffn.lin1", "ffn.lin2", "pre_classifier", "classifier"]
    assert wanted == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def test_a_retraining_is_decided_by_its_rows_and_its_seed(retraining):
    rows = torch.arange(12)
    first = state(retraining.run(rows, seed=3))
    other = state(retraining.run(rows, seed=4))
    again = state(retraining.run(rows, seed=3))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_rows_left_out_have_no_part_in_a_retraining():
    whole = reviews(24)
    poisoned = Reviews(whole.vectors.clone(), whole.labels, whole.texts)
    poisoned.vectors[12:] = torch.nan
    recipe = Recipe(epochs=1, batch_size=8)
    first, second = (
        state(Retraining(side, recipe).run(torch.arange(12), seed=1)) for side in (whole, poisoned)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_lowers_the_loss(retraining):
    rows = torch.arange(24)
    before = losses(margins(retraining.path(rows, 0, (0.0,))[0].model(), retraining.reviews))
    after = losses(margins(retraining.run(rows, seed=0), retraining.reviews))
    assert after.mean() < 0.5 * before.mean()


def test_the_last_checkpoint_of_a_path_is_the_trained_tail(retraining):
    rows = torch.arange(24)
    path = retraining.path(rows, seed=2, shares=(0.0, 0.4, 1.0))
    assert [c.name for c in path] == ["step 0 of 6", "step 2 of 6", "step 6 of 6"]
    trained, last = state(retraining.run(rows, seed=2)), state(path[-1].model())
    start = state(path[0].model())
    assert all(torch.equal(trained[name], last[name]) for name in trained)
    assert all(torch.equal(retraining.start[name], start[name]) for name in start)


def test_a_recipe_may_begin_at_trained_weights():
    data, rows = reviews(24), torch.arange(24)
    plain = Recipe(epochs=2, batch_size=8)
    trained = state(Retraining(data, plain).run(rows, seed=0))
    further = Retraining(data, Recipe(epochs=1, batch_size=8, trained_for=2))
    assert all(torch.equal(trained[name], further.start[name]) for name in trained)


def test_no_rows_are_refused(retraining):
    with pytest.raises(ValueError, match="no rows"):
        retraining.run(torch.tensor([], dtype=torch.long), seed=0)


def test_segment_weights_are_the_learning_rates_of_the_nearest_steps():
    assert segment_weights([0, 4], [1.0, 1.0, 1.0, 1.0]) == pytest.approx([0.75, 0.25])
    assert segment_weights([2], [3.0, 1.0, 4.0]) == pytest.approx([1.0])
    rates = torch.rand(17, generator=torch.Generator().manual_seed(0)).tolist()
    assert sum(segment_weights([0, 3, 9, 17], rates)) == pytest.approx(1.0)


def test_losses_are_the_cross_entropy_of_the_margins(retraining):
    tail, data = retraining.tail, retraining.reviews
    with torch.no_grad():
        expected = cross_entropy(tail(data.vectors), data.labels, reduction="none")
    torch.testing.assert_close(losses(margins(tail, data)), expected)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_subsets_hold_their_share_of_the_reviews(share):
    labels = reviews(30).labels
    member = Design(subsets=7, share=share).membership(labels)
    assert member.shape == (7, 30)
    assert (member.sum(dim=1) == round(share * 30)).all()
    assert len({tuple(row.tolist()) for row in member}) == 7


def test_balanced_subsets_hold_the_share_of_either_label():
    labels = torch.tensor([0] * 12 + [1] * 20)
    member = Design(subsets=5, balanced=True).membership(labels)
    assert (member[:, labels == 0].sum(dim=1) == 6).all()
    assert (member[:, labels == 1].sum(dim=1) == 10).all()


def test_another_draw_makes_other_subsets():
    labels = reviews(30).labels
    one, other = (Design(subsets=3, draw=draw).membership(labels) for draw in (0, 1))
    assert not torch.equal(one, other)


DESIGN = Design(subsets=7, seeds=2)


def test_a_bank_holds_what_retraining_says(retraining, tmp_path):
    queries = reviews(5, seed=1)
    bank = make_bank(retraining, queries, DESIGN, tmp_path / "bank.safetensors")
    rows = bank.membership[3].nonzero()[:, 0]
    expected = margins(retraining.run(rows, seed=2), queries)
    torch.testing.assert_close(bank.margins[3, 1], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bank.outcomes[3], losses(bank.margins[3]).mean(dim=0))


def test_a_bank_that_was_cut_short_goes_on_to_the_same_numbers(retraining, tmp_path, monkeypatch):
    queries = reviews(5, seed=1)
    whole = make_bank(retraining, queries, DESIGN, tmp_path / "whole.safetensors")
    trained = []
    run = Retraining.run

    def killed(self, rows, seed):
        if len(trained) == 13:
            raise KeyboardInterrupt
        trained.append(seed)
        return run(self, rows, seed)

    monkeypatch.setattr(Retraining, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        make_bank(retraining, queries, DESIGN, tmp_path / "cut.safetensors")
    monkeypatch.setattr(Retraining, "run", lambda *a: trained.append(a) or run(*a))
    resumed = make_bank(retraining, queries, DESIGN, tmp_path / "cut.safetensors")
    assert torch.equal(resumed.margins, whole.margins)
    assert len(trained) == 13 + 2  # only the last subset was trained on again
    assert [path.name for path in tmp_path.glob("cut*")] == ["cut.safetensors"]


def test_a_finished_bank_is_loaded(retraining, tmp_path, monkeypatch):
    queries, path = reviews(5, seed=1), tmp_path / "bank.safetensors"
    made = make_bank(retraining, queries, DESIGN, path)
    monkeypatch.setattr(Retraining, "run", None)
    again = make_bank(retraining, queries, DESIGN, path)
    for bank in (again, load_bank(path)):
        assert torch.equal(bank.margins.half(), made.margins.half())
        assert torch.equal(bank.membership, made.membership)


def test_another_bank_in_the_file_is_refused_by_name(retraining, tmp_path):
    queries, path = reviews(5, seed=1), tmp_path / "bank.safetensors"
    make_bank(retraining, queries, DESIGN, path)
    with pytest.raises(BankMismatch, match="its seeds is 2, this one's is 3"):
        make_bank(retraining, queries, Design(subsets=7, seeds=3), path)
    with pytest.raises(BankMismatch, match="its queries is"):
        make_bank(retraining, reviews(5, seed=2), DESIGN, path)


def test_a_damaged_bank_is_told(tmp_path):
    path = tmp_path / "bank.safetensors"
    path.write_bytes(b"not a bank")
    with pytest.raises(BankDamaged, match="Delete it"):
        load_bank(path)


def test_the_most_helpful_have_the_largest_scores():
    assert most_helpful(torch.tensor([0.0, 5.0, -1.0, 3.0]), 2).tolist() == [1, 3]


def test_removal_trains_without_the_most_helpful_reviews(retraining):
    queries = reviews(5, seed=1)
    scores = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))
    curve = removal_curve(retraining, queries, scores, asked=[1, 4], counts=[3, 20], seeds=[1, 2])
    assert curve[["query", "removed"]].to_numpy().tolist() == [
        [1, 0], [4, 0], [1, 3], [1, 20], [4, 3], [4, 20],
    ]  # fmt: skip
    left = torch.ones(24, dtype=torch.bool)
    left[most_helpful(scores[4], 3)] = False
    rows = left.nonzero()[:, 0]
    after = [losses(margins(retraining.run(rows, seed), queries))[4].item() for seed in (1, 2)]
    assert curve["loss"][4] == pytest.approx(np.mean(after), rel=1e-5)
    assert losses_without(retraining, queries, most_helpful(scores[4], 3), [1, 2])[
        4
    ].item() == pytest.approx(np.mean(after), rel=1e-5)
