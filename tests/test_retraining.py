"""Reviews as vectors, and a small part of a model trained on them again and again."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from support import retraining as rooms
from support.imdb import ImdbDataset
from support.model import ModelLogitsWrapper, load_model, packaged_encoder
from support.retraining import Recipe, Retraining, Reviews, accuracy, losses, margins, untrained_tail
from tests.made_up import WIDTH, reviews


@pytest.fixture(scope="module")
def retraining():
    return Retraining(untrained_tail(), reviews(24), Recipe(epochs=2, learning_rate=1e-3, batch_size=8))


def state(tail):
    return {name: tensor.clone() for name, tensor in tail.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_tail_of_the_classifier_says_what_the_classifier_says(imdb, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("SUPPORT_CACHE", str(tmp_path))
    texts = [text[:90] for text in imdb["train"].select([0, 24, 14_000])["text"]]
    short = imdb["train"].select([0, 24, 14_000]).map(lambda _, n: {"text": texts[n]}, with_indices=True)
    dataset = ImdbDataset(short, tokenizer)
    classifier = packaged_encoder().eval()
    with torch.no_grad():
        expected = ModelLogitsWrapper(classifier)(dataset.batch([0, 1, 2])[0])
        read = rooms.read_for_the_tail(dataset)
        found = rooms.ClassifierTail(classifier)(read.vectors)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(rooms, "packaged_encoder", None)  # from here on they are read from the cache
    torch.testing.assert_close(rooms.read_for_the_tail(dataset).vectors, read.vectors, rtol=0, atol=0)


def test_the_tail_asks_gradients_of_its_linear_layers_alone():
    wanted = {n for n, p in untrained_tail().named_parameters() if p.requires_grad}
    layers = ["ffn.lin1", "ffn.lin2", "pre_classifier", "classifier"]
    assert wanted == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def test_a_retraining_is_decided_by_its_rows_and_its_seed(retraining):
    rows = torch.arange(12)
    first, again, other = (state(retraining.run(rows, seed)) for seed in (3, 3, 4))
    assert same(first, again)
    assert not same(first, other)


def test_rows_left_out_have_no_part_in_a_retraining():
    whole = reviews(24)
    poisoned = Reviews(whole.vectors.clone(), whole.labels, whole.texts)
    poisoned.vectors[12:] = torch.nan
    recipe = Recipe(epochs=1, batch_size=8)
    first, second = (
        state(Retraining(untrained_tail(), side, recipe).run(torch.arange(12), seed=1))
        for side in (whole, poisoned)
    )
    assert same(first, second)


def test_a_path_leads_from_the_start_to_the_trained_tail_and_lowers_the_loss(retraining):
    rows = torch.arange(24)
    path = retraining.path(rows, seed=2, shares=(0.0, 0.4, 1.0))
    assert [c.name for c in path] == ["step 0 of 6", "step 2 of 6", "step 6 of 6"]
    assert same(retraining.start, state(path[0].model()))
    before, _, after = (losses(margins(c.model(), retraining.reviews)).mean() for c in path)
    assert after < 0.5 * before
    assert same(state(retraining.run(rows, seed=2)), state(path[-1].model()))
    with pytest.raises(ValueError, match="no rows"):
        retraining.run(rows[:0], seed=0)


def test_losses_are_the_cross_entropy_of_the_margins(retraining):
    tail, data = retraining.part, retraining.reviews
    with torch.no_grad():
        expected = cross_entropy(tail(data.vectors), data.labels, reduction="none")
    torch.testing.assert_close(losses(margins(tail, data)), expected)


def test_the_head_is_read_exactly_what_the_model_gives_it(imdb, tokenizer):
    model = load_model()
    dataset = ImdbDataset(imdb["test"].select([0, 4999, 7]), tokenizer, max_tokens=32)
    read = rooms.read_vectors(ModelLogitsWrapper(model), dataset, model.pre_classifier)
    with torch.inference_mode():
        logits = model.classifier(model.pre_classifier(read.vectors).relu())
        expected = ModelLogitsWrapper(model)(dataset.batch([0, 1, 2])[0])
    assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert read.texts == dataset.texts


def test_a_head_is_drawn_from_its_seed_alone():
    first, same, other = (rooms.untrained_head(8, seed).classifier.weight for seed in (0, 0, 1))
    assert_close(first, same)
    assert not torch.equal(first, other)


def test_accuracy_turns_round_with_the_labels():
    data = reviews(40)
    head = Retraining(rooms.untrained_head(WIDTH), data, Recipe(10, 1e-3)).run_on_all(seed=0)
    turned = replace(data, labels=1 - data.labels)
    assert accuracy(head, data) > 0.9
    assert accuracy(head, data) + accuracy(head, turned) == pytest.approx(1)


@pytest.mark.parametrize("rows", [torch.tensor([7, 2]), torch.arange(10) % 4 == 1], ids=["rows", "mask"])
def test_selected_reviews_come_in_the_order_asked_for_and_parts_are_the_whole(rows):
    data = reviews(10)
    expected = [1, 5, 9] if rows.dtype == torch.bool else [7, 2]
    chosen = rooms.select(data, rows)
    assert chosen.texts == [data.texts[row] for row in expected]
    assert_close(chosen.labels, data.labels[expected])
    assert_close(chosen.vectors, data.vectors[expected])
    parts = rooms.in_parts(data, [3, 7])
    assert [part.texts for part in parts] == [data.texts[:3], data.texts[3:]]
    assert_close(torch.cat([part.vectors for part in parts]), data.vectors)
