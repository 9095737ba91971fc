"""Where a job's texts come from: the package index, the Hugging Face hub, or the disk."""

import glob
import hashlib
from collections.abc import Mapping
from pathlib import Path

import datasets
from datasets import Dataset, load_dataset, load_from_disk

from support.assets import sha256
from support.imdb import load_imdb
from support.job.errors import DatasetNotUsable, cause
from support.job.settings import PACKAGED

READERS = {".csv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}
FORMS = {
    "csv": "A csv file is UTF-8, names its columns in the first line, has a line for each text, commas "
    "or ; or tabs between the fields and double quotes around a text with these",
    "parquet": "A parquet file ends with what describes it, so half a file is none: write or copy it again",
    "json": "A json file is UTF-8 and holds an object for each text, one a line, all with the same fields",
    None: f"Name a file ({', '.join(READERS)}), a folder with files called train.csv or the like, all of one "
    f"kind and with the same columns, a name on the hub, or {PACKAGED!r}",
}
"""What has to be there, by the kind of a file that can't be read."""


def load_split(name: str, split: str) -> Dataset:
    """All rows and columns of a split. Raises `DatasetNotUsable`."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is told here
    found = _read(name, split)
    if isinstance(found, dict) and split not in found:
        raise DatasetNotUsable(f"{name!r} has no split {split!r}. There are: {', '.join(found)}.")
    return found[split] if isinstance(found, dict) else found


def with_columns(found: Dataset, columns: Mapping[str, str], name: str, cure: str) -> Dataset:
    """These columns alone, under the names that a task knows them by. Raises `DatasetNotUsable`."""
    there = ", ".join(found.column_names)
    if missing := ", ".join(repr(one) for one in columns.values() if one not in found.column_names):
        raise DatasetNotUsable(f"{name!r} has no column {missing}. There are: {there}. {cure}.")
    if "__index_level_0__" in there and found.info.builder_name == "csv":
        raise DatasetNotUsable(f"{name!r} has more fields than names of columns. {FORMS['csv']}.")
    found = found.select_columns(list(columns.values()))
    return found.rename_columns({column: own for own, column in columns.items() if own != column})


def refuse_single_split(name: str) -> None:
    """Raise `DatasetNotUsable` when all splits that one asks for would be the same rows."""
    path = Path(name)
    is_one = (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists()
    if path.is_file() or is_one:
        raise DatasetNotUsable(
            f"{name!r} has one split: its rows would be training examples and queries at once. Name the "
            "queries' file or folder with --queries, or say --query-split train if you mean that."
        )


def _separator(file: Path) -> str:
    """What stands between the fields of a csv file: spreadsheets of many countries write no commas."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        names = lines.readline()
    return max(",;\t", key=names.count)


def _read(name: str, split: str) -> Dataset | dict:
    path = Path(name)
    if name == PACKAGED:
        return load_imdb()
    all_files = sorted(file for file in (path, *path.rglob("*")) if file.is_file())
    files = {file: READERS[file.suffix.lower()] for file in all_files if file.suffix.lower() in READERS}
    if path.is_file() and not files:
        raise DatasetNotUsable(f"{path.name} is neither of {', '.join(READERS)}, which can be read.")
    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return load_from_disk(name)
        # The library would know a file again by name, time and size.
        contents = "".join(f"{file} {sha256(file)}" for file in all_files).encode(errors="surrogateescape")
        cache = f"{datasets.config.HF_DATASETS_CACHE}/by-contents/{hashlib.sha256(contents).hexdigest()}"
        how = {"cache_dir": cache} if all_files else {}
        if {*files.values()} == {"csv"}:  # nothing but an empty field is a missing one: NA may be a class
            how |= {"keep_default_na": False, "na_values": [""], "sep": _separator(next(iter(files)))}
        if not path.is_file():
            found = load_dataset(name, **how)
            copies = [Path(file["filename"]) for one in found.values() for file in one.cache_files]
            if not path.exists() and any(len(copy.parent.name) < 40 for copy in copies):  # no commit
                raise ValueError("the hub can't be reached, and what is kept here was a folder of that name")
            return found
        if not path.stat().st_size:
            raise ValueError("it is empty")
        return load_dataset(files[path], data_files=glob.escape(name), split="train", **how)
    except Exception as error:  # the readers' and the hub's errors share no narrower class
        for file in files if path.is_dir() else ():  # one that can't be read alone is told by its name
            _read(str(file), split)
        raise DatasetNotUsable(
            f"{name!r} can't be read ({cause(error)}). {FORMS[files.get(path)]}."
        ) from error
