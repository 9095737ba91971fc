"""Examples are tokenised once, known by their contents, and padded no further than they must be."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from support.job.errors import BadSetting, DatasetNotUsable
from support.job.examples import chosen_rows, tokenised

TEXTS = ["great", "a dull film of the plot", "", "warm and bad", "x" * 40]
LABELS = [1, 0, 1, 1, 0]
CPU = torch.device("cpu")


def silence(tokenizer, monkeypatch):
    """From here on it cuts no text."""

    def refuse(*_, **__):
        raise AssertionError("Asked again.")

    monkeypatch.setattr(type(tokenizer), "__call__", refuse)


def examples(folder, tokenizer, texts=TEXTS, labels=LABELS, rows=range(5), max_tokens=512):
    data = Dataset.from_dict({"text": list(texts), "label": list(labels)})
    return tokenised(data, np.array(rows), tokenizer, max_tokens, folder)


@pytest.fixture
def five(tmp_path, tokenizer):
    return examples(tmp_path, tokenizer)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [1, 3]])
def test_an_example_is_the_text_of_its_row_as_the_tokenizer_reads_it(tmp_path, tokenizer, rows):
    chosen = examples(tmp_path, tokenizer, rows=rows)
    assert (len(chosen), chosen.rows.tolist()) == (len(rows), rows)
    assert chosen.texts["text"][:] == [TEXTS[row] for row in rows]
    for number, row in enumerate(rows):
        ids, labels = chosen.batch([number], CPU)
        assert ids.tolist() == [tokenizer(TEXTS[row])["input_ids"]]
        assert labels.tolist() == [LABELS[row]]


def test_a_batch_is_padded_to_its_longest_example_and_no_further(five, tokenizer):
    ids, labels = five.batch([3, 0, 1], CPU)
    assert ids.shape == (3, max(five.lengths[[3, 0, 1]]))
    assert labels.tolist() == [1, 1, 0]
    for padded, number in zip(ids.tolist(), [3, 0, 1], strict=True):
        length = five.lengths[number]
        assert padded[:length] == tokenizer(TEXTS[number])["input_ids"]
        assert set(padded[length:]) <= {tokenizer.pad_token_id}


def test_a_long_text_is_cut_at_max_tokens_and_keeps_its_separator(tmp_path, tokenizer):
    ids, _ = examples(tmp_path, tokenizer, max_tokens=4).batch([1], CPU)
    assert ids.tolist() == [[*tokenizer(TEXTS[1])["input_ids"][:3], tokenizer.sep_token_id]]


def test_tokens_come_from_the_file_the_second_time_and_those_of_others_lie_beside_it(
    tmp_path, tokenizer, monkeypatch
):
    first = examples(tmp_path, tokenizer)
    examples(tmp_path, tokenizer, rows=[0, 1])
    assert len(list(tmp_path.glob("*.arrow"))) == 2
    silence(tokenizer, monkeypatch)
    again = examples(tmp_path, tokenizer)
    assert again.digest == first.digest
    assert again.tokens["input_ids"][:] == first.tokens["input_ids"][:]
    with pytest.raises(AssertionError, match="Asked again"):
        examples(tmp_path, tokenizer, rows=[0, 2])


def a_bit_of_a_token(path, ids):
    content = bytearray(path.read_bytes())
    content[content.index(np.array(ids, "<i4").tobytes()) + 4] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file, kept, ids: a_bit_of_a_token(file, ids),
        lambda file, kept, ids: file.write_bytes(file.read_bytes()[:99]),
        lambda file, kept, ids: file.unlink(),
        lambda file, kept, ids: kept.unlink(),
        lambda file, kept, ids: kept.write_bytes(b"\xff"),
    ],
    ids=["a bit", "truncated", "gone", "no seal", "another seal"],
)
def test_tokens_that_are_not_as_they_were_written_are_made_anew(tmp_path, tokenizer, damage):
    before = examples(tmp_path, tokenizer).tokens["input_ids"][:]
    file = next(tmp_path.glob("*.arrow"))
    damage(file, file.with_suffix(".arrow.seal"), before[1])
    assert examples(tmp_path, tokenizer).tokens["input_ids"][:] == before


@pytest.mark.parametrize(
    "change",
    [
        {"texts": ["Great", *TEXTS[1:]]},
        {"labels": [0, *LABELS[1:]]},
        {"rows": [0, 1, 2, 3]},
        {"rows": [0, 1, 2, 4, 3]},
        {"texts": ["great a", *TEXTS[1:]]},
        {"max_tokens": 511},
    ],
    ids=["text", "label", "fewer rows", "order", "more of a text", "max_tokens"],
)
def test_the_digest_changes_with_each_part_of_the_contents(tmp_path, tokenizer, five, change):
    assert examples(tmp_path, tokenizer, **change).digest != five.digest


def test_the_digest_changes_with_the_tokenizer_but_not_with_what_it_read_before(tmp_path, tokenizer, five):
    tokenizer(TEXTS, truncation=True, max_length=3, padding="max_length")
    assert examples(tmp_path, tokenizer).digest == five.digest
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    extended = type(tokenizer).from_pretrained(tmp_path / "tokenizer")
    extended.add_tokens(["plot"])
    assert examples(tmp_path, extended).digest != five.digest


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ("all", [*range(8)]),
        ("2:5", [2, 3, 4]),
        ("5,0,2,5", [0, 2, 5]),
        ("4,", [4]),
        ("5,0:3,2,6,", [0, 1, 2, 5, 6]),
    ],
)
def test_rows_are_what_they_say_ascending_and_once(rows, chosen):
    assert chosen_rows(rows, 8, 0, "rows").tolist() == chosen


def test_a_sample_ascends_repeats_nothing_and_depends_on_its_seed_alone():
    sample, again, other = (chosen_rows("20", 100, seed, "rows") for seed in (0, 0, 1))
    assert len(sample) == 20
    assert (np.diff(sample) > 0).all()
    assert sample.tolist() == again.tolist() != other.tolist()
    assert chosen_rows("100", 100, 3, "rows").tolist() == list(range(100))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("8", r"^--query-rows 8: use all, a number of rows like 50 .from 1 to 7."),
        ("0", r"from 1 to 7"),
        ("5:8", r"from 0 to 6"),
        ("-1:3", r"from 0 to 6"),
        ("3:3", r"at least one"),
        ("2,7", r"from 0 to 6"),
        (",", r"from 0 to 6, at least one in each"),
        ("some", r"^--query-rows some: use all, a number of rows like 50"),
        ("1:2:3", r"or rows and ranges like"),
        ("1.5", r"use all, a number of rows"),
        ("", r"use all, a number of rows"),
    ],
)
def test_rows_that_mean_nothing_or_are_not_there_are_refused(rows, message):
    with pytest.raises(BadSetting, match=message):
        chosen_rows(rows, 7, 0, "query-rows")


def test_a_text_with_the_padding_token_in_it_is_refused_by_its_row(tmp_path, tokenizer):
    texts = Dataset.from_dict({"text": ["fine", "a [PAD] film"], "label": [0, 1]})
    with pytest.raises(DatasetNotUsable, match=r"Row 1 has a text with the padding token '\[PAD\]'"):
        tokenised(texts, np.arange(2), tokenizer, 16, tmp_path)
