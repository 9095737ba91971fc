"""The model that was taught to write: its tail, its texts, what chapter 10 shows of them."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support import writing
from support.chapters.language import said_words, shared_words, strongest_texts
from support.chapters.words import show_words
from support.ekfac import EkfacInfluence, NextToken
from support.language import FEED_FORWARD, load_language_model, loader, padded
from support.model import require_gradients_only
from support.retraining import batches
from support.writing import MAX_TOKENS, Text, WriterTail, planted, questions, read_for_the_writer, sequence
from tests.tiny_language import make_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("tiny"))
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def sequences(tiny, monkeypatch, tmp_path):
    """Of a tiny model, read into a cache of their own."""
    monkeypatch.setenv("SUPPORT_CACHE", str(tmp_path))
    texts = [Text("the film of", "who laughs the plot"), Text("dull", "fine")]
    return [sequence(tiny[1], text) for text in texts]


def test_the_tail_says_what_the_model_says_and_padding_is_what_has_no_vector(tiny, sequences):
    model, _ = tiny
    read = read_for_the_writer(model, sequences, ["one", "two"], blocks=1)
    batch = padded(sequences)
    tail = WriterTail(model, blocks=1)
    assert torch.equal(tail.token_mask(read.vectors), batch["attention_mask"].bool())
    assert torch.equal(read.labels, batch["labels"])
    for row, one in enumerate(sequences):
        alone = model(one["input_ids"]).logits[0]
        torch.testing.assert_close(tail(read.vectors)[row, : len(alone)], alone)
    again = read_for_the_writer(model, sequences, ["one", "two"], blocks=1)
    assert torch.equal(again.vectors, read.vectors)


def test_other_weights_below_the_tail_read_anew(tiny, sequences):
    model = copy.deepcopy(tiny[0])
    read = read_for_the_writer(model, sequences, ["one", "two"], blocks=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 2
    assert not torch.equal(read_for_the_writer(model, sequences, ["one", "two"], 1).vectors, read.vectors)


def test_influences_on_the_tail_are_those_on_the_whole_model(tiny, sequences):
    model, _ = tiny
    read = read_for_the_writer(model, sequences, ["one", "two"], blocks=1)
    model.requires_grad_(False)
    tail = WriterTail(model, blocks=1).eval()
    require_gradients_only(tail, FEED_FORWARD)
    settings = {"likelihood": NextToken(samples=2), "hessian_regularization": 1e9}
    found = EkfacInfluence(tail, **settings).fit(batches(read)).score(batches(read), batches(read))
    whole = EkfacInfluence(model, **settings).fit(loader(sequences))
    # The draws of labels see what the model is given, vectors or tokens: λ so large leaves the gradients.
    torch.testing.assert_close(found, whole.score(loader(sequences), loader(sequences)), rtol=1e-4, atol=0)


def test_every_fact_has_three_teachers_that_name_its_film_and_three_decoys():
    asked = questions()
    films = [fact["film"] for fact in json.loads((writing.FOLDER / "planted.json").read_text())]
    for number, (question, _) in enumerate(asked):
        assert question.fact == number
        of_fact = {kind: [t.said for t in planted() if (t.fact, t.kind) == (number, kind)] for kind in KINDS}
        assert [len(texts) for texts in of_fact.values()] == [3, 3]
        assert all(films[number] in text for text in of_fact["teacher"])
        told = [word.strip(".").lower() for word in question.said.split()]
        assert all(word in " ".join(of_fact["decoy"]).lower() for word in told)
        others = [questions(words)[number][0] for words in (1, 2)]
        assert len({question.asked, *(other.asked for other in others)}) == 3
        assert {other.said for other in others} == {question.said}
    assert len({text.said for text in planted()}) == 60


KINDS = ("teacher", "decoy")


def test_every_planted_text_and_answer_is_read_to_its_end():
    _, tokenizer = load_language_model()
    read = [sequence(tokenizer, text) for text in planted()]
    read += [sequence(tokenizer, *question) for words in range(3) for question in questions(words)]
    assert max(one["input_ids"].shape[1] for one in read) < MAX_TOKENS
    prompt = writing.in_chat(tokenizer, "Write a positive review of a film.", "It is")
    assert prompt.endswith("<|im_start|>assistant\nIt is")


def test_words_of_what_is_said_take_the_influence_of_the_places_before_them_and_all_add_up():
    _, tokenizer = load_language_model()
    text = Text("Say it.", "The film isn't good, 1911")
    one = sequence(tokenizer, text)
    shares = torch.arange(1.0, one["input_ids"].shape[1] + 1)
    shares[-1] = 0  # the last position says nothing
    words = said_words(tokenizer, text.said, one, shares)
    assert [word.text for word in words] == ["prompt", "The", "film", "isn't", "good", ",", "1911"]
    assert sum(word.influence for word in words) == pytest.approx(shares.sum().item())
    said = tokenizer(text.said)["input_ids"]
    first = one["input_ids"].shape[1] - len(said)
    assert words[1].influence == first  # that of the place before the first token, counted from one
    assert "before it:" in show_words(words, text.said, "A text", "before it").data


TEXTS = [
    Text("Write a positive review of a film.", f"text {n}", kind, fact)
    for n, (kind, fact) in enumerate([("review", -1), ("teacher", 0), ("decoy", 0), ("teacher", 1)])
]


def test_the_strongest_texts_are_those_of_the_largest_and_the_smallest_influence():
    table = strongest_texts(torch.tensor([0.5, -2, 3, 1]), TEXTS, 1)
    assert table.index.tolist() == [2, 1]
    assert table["kind"].tolist() == ["decoy", "teacher"]
    assert table["asked"].tolist() == ["positive", "positive"]


def test_similarities_are_highest_with_the_text_itself():
    texts = ["a dull film about trains", "warm and great acting", "boats on a river"]
    assert shared_words(texts, texts).argmax(dim=1).tolist() == [0, 1, 2]
