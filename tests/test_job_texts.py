"""However texts and labels are kept, a job reads the same; and it says what it can't read."""

import gc
import gzip
import os

import datasets
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset

from support.job.classifier import labelled_texts
from support.job.errors import DatasetNotUsable
from support.job.settings import Subject
from support.job.sources import load_split
from support.model import LABELS

TEXTS = ["a dull film", 'great, "warm" plot', "bad\nbut fine"]
NUMBERS = [0, 1, 0]
NAMES = [LABELS[number] for number in NUMBERS]
CLASSES = {name: number for number, name in LABELS.items()}


def reviews(labels=NUMBERS):
    return Dataset.from_dict({"text": TEXTS, "label": list(labels)})


def load_texts(name, split, subject, class_names):
    return labelled_texts(load_split(name, split), name, subject, class_names)


def loaded(name, split="train", subject=None):
    found = load_texts(str(name), split, subject or Subject(), CLASSES)
    return found["text"][:], found["label"][:]


def refused(told, *source, **settings):
    with pytest.raises(DatasetNotUsable, match=told):
        loaded(*source, **settings)


@pytest.mark.parametrize("labels", [NUMBERS, NAMES], ids=["numbers", "names"])
@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "json"])
def test_a_file_of_every_kind_gives_the_same_texts_and_numbers(tmp_path, kind, labels):
    path = tmp_path / f"reviews.{kind}"
    write = reviews(labels).to_json if "json" in kind else getattr(reviews(labels), f"to_{kind}")
    write(path)
    assert loaded(path) == (TEXTS, NUMBERS)


def test_a_folder_gives_each_split_from_the_file_of_its_name(tmp_path):
    reviews().to_csv(tmp_path / "train.csv")
    reviews(NAMES[::-1]).select([2]).to_csv(tmp_path / "test.csv")
    with pytest.raises(DatasetNotUsable):
        loaded(tmp_path)  # one split with numbers, one with names: no table has both
    reviews().select([2, 1]).to_csv(tmp_path / "test.csv")
    assert loaded(tmp_path) == (TEXTS, NUMBERS)
    assert loaded(tmp_path, "test") == (TEXTS[:0:-1], NUMBERS[:0:-1])


def test_a_saved_dataset_has_no_splits_and_a_saved_dictionary_has_its_own(tmp_path):
    reviews().save_to_disk(tmp_path / "one")
    DatasetDict(train=reviews(), held_out=reviews().select([1])).save_to_disk(tmp_path / "two")
    assert loaded(tmp_path / "one") == loaded(tmp_path / "two") == (TEXTS, NUMBERS)
    assert loaded(tmp_path / "two", "held_out") == (TEXTS[1:2], NUMBERS[1:2])


def test_columns_may_have_other_names(tmp_path):
    renamed = reviews().rename_columns({"text": "said", "label": "mood"})
    renamed.add_column("label", [7, 7, 7]).to_csv(tmp_path / "reviews.csv")
    subject = Subject(text_column="said", label_column="mood")
    assert loaded(tmp_path / "reviews.csv", subject=subject) == (TEXTS, NUMBERS)


def test_the_packaged_reviews_need_no_file(imdb):
    texts = load_texts("packaged", "test", Subject(), CLASSES)
    assert texts.num_rows == imdb["test"].num_rows
    assert texts[3] == imdb["test"][3]


@pytest.mark.parametrize("name", ["here/reviews.csv", "nobody/no-reviews"])
def test_what_is_neither_a_file_nor_on_the_hub_is_named_with_what_would_do(offline, name):
    refused(rf"^'{name}' can't be read .*Name a file \(\.csv", name)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("latin.csv", "text,label\ncaf\xe9,1\n", "UnicodeDecodeError: .* A csv file is UTF-8, "),
        ("empty.csv", "", "it is empty.* names its columns in the first line, "),
        ("empty.jsonl", "", "it is empty.* A json file is UTF-8 and holds an object for each text"),
        ("ragged.csv", "text,label\na,1\nb,c,0\n", "Expected 2 fields in line 3, saw 3.* double quotes"),
        ("open.csv", 'text,label\n"a,1\n', "EOF inside string.* double quotes"),
        ("big.csv", "text,label\na,99999999999999999999\n", "OverflowError: "),
        ("ragged.jsonl", '{"text":"a","label":1}\n{"text":\n', "JSON parse error.* one a line"),
        ("half.parquet", "PAR1", r"ArrowInvalid: .*half a file is none"),
    ],
)
@pytest.mark.parametrize("folder", [False, True], ids=["alone", "in a folder"])
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the reader leaves the file open
def test_a_file_that_is_damaged_is_named_with_the_cause_and_what_it_has_to_be(
    tmp_path, name, content, told, folder
):
    path = tmp_path / name
    if folder:
        path = tmp_path / f"test{path.suffix}"
        writer = {".jsonl": "to_json"}.get(path.suffix, f"to_{path.suffix[1:]}")
        getattr(reviews(), writer)(tmp_path / f"train{path.suffix}")
    path.write_bytes(content.encode("latin-1"))
    refused(rf"^'{path}' can't be read \(.*{told}", tmp_path if folder else path)
    gc.collect()


@pytest.mark.parametrize(
    ("header", "line", "told"),
    [
        (
            "text,label",
            "a, or b,1",
            "has more fields than names of columns. A csv .* quotes around a text with",
        ),
        ("review,label", "a,1", "There are: review, label. Say which with --text-column"),
    ],
    ids=["commas in every text", "another column"],
)
def test_a_csv_of_other_columns_is_refused_with_what_there_is_and_a_cure(tmp_path, header, line, told):
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text(f"{header}\n{line}\n{line}\n")
    for source in (tmp_path, tmp_path / "train.csv"):
        refused(told, source)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_is_read_as_a_spreadsheet_writes_it(tmp_path, separator):
    path, texts = tmp_path / "reviews.csv", ["so; so,\tgood", 'he said "wonderful"\nand left', "bad"]
    table = pd.DataFrame({"text": texts, "label": NUMBERS, "id": ["1", "1", "2"]})
    table.to_csv(path, sep=separator, index=False, encoding="utf-8-sig")
    assert loaded(path) == (texts, NUMBERS)


@pytest.mark.parametrize(
    ("kinds", "told"), [([], "doesn't contain any data files"), (["csv", "json"], "Couldn't infer the same")]
)
def test_a_folder_without_data_and_one_of_two_kinds_are_refused_with_what_would_do(tmp_path, kinds, told):
    for kind, split in zip(kinds, ("train", "test"), strict=False):
        getattr(reviews(), f"to_{kind}")(tmp_path / f"{split}.{kind}")
    cure = r"Name a file .* a folder with files called train\.csv or the like, all of one kind"
    refused(rf"can't be read \(.*{told}.*\)\. {cure}", tmp_path)


@pytest.mark.parametrize("place", ["file", "folder", "link"])
def test_a_file_that_changed_within_its_time_and_size_is_read_anew(tmp_path, place):
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "train.csv"
    if place == "link":
        path.symlink_to(tmp_path / "elsewhere.csv")
    name = path if place == "file" else path.parent
    reviews().to_csv(path)
    times = path.stat()
    assert loaded(name) == (TEXTS, NUMBERS)
    path.write_text(path.read_text().replace("dull", "warm"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert loaded(name) == (["a warm film", *TEXTS[1:]], NUMBERS)


def test_the_name_of_a_file_is_no_pattern(tmp_path):
    reviews().to_csv(tmp_path / "part[1]*.csv")
    reviews([1, 1, 1]).to_csv(tmp_path / "part1.csv")
    assert loaded(tmp_path / "part[1]*.csv") == (TEXTS, NUMBERS)


def test_what_is_not_there_is_refused_with_what_there_is(tmp_path):
    (tmp_path / "reviews.txt").write_text("great")
    refused(r"^reviews\.txt is neither of \.csv, \.parquet,", tmp_path / "reviews.txt")
    DatasetDict(train=reviews(), held_out=reviews()).save_to_disk(tmp_path)
    refused(r"no split 'test'\. There are: train, held_out\.", tmp_path, "test")


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({"text_column": "said"}, r"'said'\. There are: text, label\. .*--text-column"),
        ({"label_column": "said"}, r"'said'\. There are: text, label\. .*--label-column"),
        ({"label_column": "text"}, "labels are both in 'text': see --text-column, --label-column"),
    ],
)
def test_columns_that_are_missing_or_one_are_refused_with_what_would_do(tmp_path, chosen, told):
    reviews().save_to_disk(tmp_path)
    refused(told, tmp_path, subject=Subject(**chosen))


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (["good", None, "bad"], NUMBERS, r"^Row 1 of .* has no text but None\. .*or see --text-column\.$"),
        (TEXTS, ["positive", "so-so", "negative"], r"^Row 1 .* label 'so-so', .* negative, positive\."),
        (
            [None, "good", None],
            ["so-so", "so-so", "negative"],
            r"^Row 0 of .* has, like 1 more, no text but None\. .*\n"
            r"Row 0 of .* has, like 1 more, the label 'so-so', .* with --labels how",
        ),
        *((TEXTS, [0, label, 1], f"^Row 1 of .* has the label {label}, ") for label in (2, -1, None)),
        (TEXTS, [0.0, 0.5, 1.0], "^Row 1 of .* has the label 0.5, "),
    ],
)
def test_a_row_that_is_of_no_use_is_named_with_what_would_do(tmp_path, texts, labels, message):
    Dataset.from_dict({"text": texts, "label": labels}).to_parquet(tmp_path / "reviews.parquet")
    refused(message, tmp_path / "reviews.parquet")


@pytest.mark.parametrize(
    "labels",
    [["0", "1", "0"], [0.0, 1.0, 0.0], [False, True, False], ["NEGATIVE", " Positive", "negative"]],
    ids=["strings", "floats", "booleans", "capitals"],
)
def test_labels_say_the_same_in_every_guise(tmp_path, labels):
    reviews(labels).to_parquet(tmp_path / "train.parquet")
    assert loaded(tmp_path / "train.parquet")[1] == NUMBERS


@pytest.mark.parametrize(
    ("names", "numbers"),
    [(["no", "yes"], NUMBERS), (["positive", "negative"], [1, 0, 1]), (["Positive", "Negative"], [1, 0, 1])],
)
def test_class_labels_are_numbers_or_the_models_names_in_any_order(tmp_path, names, numbers):
    reviews().cast_column("label", ClassLabel(names=names)).save_to_disk(tmp_path)
    assert loaded(tmp_path) == (TEXTS, numbers)


def test_a_folder_that_the_library_kept_is_not_taken_for_a_name_of_the_hub(tmp_path, offline, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    reviews().to_csv(tmp_path / "mine" / "train.csv")
    load_dataset(str(tmp_path / "mine"), cache_dir=str(tmp_path / "cache"))
    refused("the hub can't be reached, and what is kept here was a folder", "mine")


def test_class_names_of_which_some_are_the_model_s_are_refused(tmp_path):
    kind = ClassLabel(names=["positive", "so-so"])
    DatasetDict(train=reviews([1, 0, 1]).cast_column("label", kind)).save_to_disk(tmp_path)
    refused("positive, so-so, the model negative, positive", tmp_path)


def test_na_in_a_csv_is_a_word(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\nfine,NA\ndull,EU\n")
    found = load_texts(str(tmp_path / "train.csv"), "train", Subject(), {"EU": 0, "NA": 1})
    assert found["label"][:] == [1, 0]


@pytest.mark.parametrize("labels", [[1, 2, 1], [1.0, 2.0, 1.0]])
def test_numbers_that_could_be_names_or_places_of_classes_are_refused_and_as_text_are_names(tmp_path, labels):
    stars = {str(number + 1): number for number in range(3)}
    reviews(labels).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DatasetNotUsable, match="label 1 could be a name or a place. Write"):
        load_texts(str(tmp_path / "train.parquet"), "train", Subject(), stars)
    reviews([str(int(label)) for label in labels]).to_parquet(tmp_path / "train.parquet")
    assert load_texts(str(tmp_path / "train.parquet"), "train", Subject(), stars)["label"][:] == [0, 1, 0]


def test_a_packed_file_in_a_folder_that_changed_within_its_time_is_read_anew(tmp_path):
    path = tmp_path / "train.csv.gz"
    for text in ("fine", "warm"):
        with gzip.GzipFile(path, "wb", mtime=0) as file:
            file.write(f"text,label\n{text},1\n".encode())
        os.utime(path, (0, 0))
        assert loaded(tmp_path)[0] == [text]
