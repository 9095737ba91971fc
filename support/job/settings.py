"""What can be set, where it is kept, and the options of the command line made from it.

The first command on a store fixes its `Subject`, the first `score` its `Question`, the first of `score` and
`self` its `Damping`. Later commands take them from the store: an option that says otherwise is refused.
"""

import argparse
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import TypeVar

from support.ekfac.curvature import DEFAULT_REGULARIZATION
from support.job.errors import BadSetting, StoreMismatch

PACKAGED = "packaged"
ROWS = "all, a number (so many, drawn with --seed), or rows and ranges with commas, like 3,5,100:200"
LEAST = {"max_tokens": 1, "block": 1, "seed": 0, "tell_seconds": 1, "save_seconds": 0}
LEAST |= {"query_block": 1, "count": 1, "query_rank": 0, "new_tokens": 1}

Settings = TypeVar("Settings", bound="Subject | Question | Damping")


def setting(default: str | int | bool, meaning: str) -> Field:
    """A field of a settings class, with what `--help` says about it."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Subject:
    """Model, training examples, and everything else that decides the curvature."""

    model: str = setting(
        PACKAGED, "a name on the Hugging Face hub, a local folder, or one with a LoRA adapter"
    )
    base: str = setting("", "model that the adapter was trained on; the one that it names if empty")
    task: str = setting("", "classifier or language-model; what the model's class says if empty")
    dataset: str = setting(PACKAGED, "a name on the hub, a local folder, or a csv, parquet or json file")
    training_split: str = setting("train", "split that holds the training examples")
    training_rows: str = setting("all", f"which of them count: {ROWS}")
    fit_rows: str = setting("all", "of these, the ones that the curvature is fitted on: as above")
    text_column: str = setting("text", "column of the texts")
    label_column: str = setting("label", "column of the labels: numbers, or the model's names")
    prompt_column: str = setting("", "column of prompts, whose completions a model that writes is asked for")
    completion_column: str = setting("", "column of these")
    conversation_column: str = setting("", "column of conversations; what the assistant says is asked for")
    layers: str = setting(
        "", "layers that get gradients, by parts of their names; if empty, the feed-forward ones and a "
        "classifier's head, or an adapter's own"
    )  # fmt: skip
    max_tokens: int = setting(512, "where texts are cut")
    pieces: bool = setting(False, "read long texts to their end, cut into pieces, whose scores add up")
    precision: str = setting("full", "full, or bfloat16: faster, good to about two digits")
    seed: int = setting(0, "of sampled rows and labels")
    block: int = setting(128, "training examples that are scored, and stored, at a time")


@dataclass(frozen=True)
class Question:
    """The queries, and what is kept of the influences on them."""

    queries: str = setting("", "data set of the queries; that of the training examples if empty")
    query_split: str = setting("test", "split that holds them")
    query_rows: str = setting("10", f"which of them are asked about: {ROWS}")
    new_tokens: int = setting(32, "how many the model writes at most after a query that is a prompt alone")
    query_rank: int = setting(0, "rank at which what is known of a query is kept; 0 keeps all of it")
    by_layer: bool = setting(False, "keep each layer's part of every score, too")


@dataclass(frozen=True)
class Damping:
    """How the curvature is inverted."""

    regularization: str = setting(
        f"{DEFAULT_REGULARIZATION}", "λ: a number ≥ 0, or auto (0.1 × mean eigenvalue)"
    )


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """An option for every field; what is not given is None, so that a store can be asked first."""
    group = parser.add_argument_group(settings.__doc__.rstrip("."))
    for one in fields(settings):
        meaning, how = one.metadata["help"], {"action": "store_const", "const": True}
        if one.type is not bool:
            meaning = f"{meaning} ({'see there' if one.default == '' else one.default})"
            how = {"type": one.type, "metavar": "…"}
        group.add_argument(option(one.name), default=None, help=meaning, **how)


def option(name: str) -> str:
    """A setting as one types it."""
    return f"--{name.replace('_', '-')}"


def settled(settings: type[Settings], given: Mapping, stored: Mapping | None) -> Settings:
    """The store's settings, or else those given, or the defaults. Raises `StoreMismatch` and `BadSetting`."""
    kinds = {one.name: one.type for one in fields(settings)}
    given = {name: given[name] for name in kinds if given.get(name) is not None}
    refuse_below(given)
    if "regularization" in given:  # one number has many spellings
        given["regularization"] = str(as_regularization(given["regularization"])).removesuffix(".0")
    if stored is not None:
        if {name: type(value) for name, value in stored.items()} != kinds:
            told = f"The store's {settings.__name__.lower()} has other settings than this version of the job"
            raise StoreMismatch(f"{told}. Name another --store.")
        for name, value in given.items():
            refuse_unless_equal(option(name), stored[name], value)
        return settings(**stored)
    return settings(**given)


def refuse_unless_equal(name: str, stored: object, here: object) -> None:
    """Raise `StoreMismatch` when the store has something else under this name, entry by entry."""
    if isinstance(stored, Mapping) and isinstance(here, Mapping):
        for key in sorted(stored.keys() | here.keys()):
            refuse_unless_equal(f"{name}: {key}", stored.get(key), here.get(key))
    elif stored != here:
        told = f"{name} is {here!r} here, but {stored!r} in the store"
        raise StoreMismatch(f"{told}. Go on with what the store was begun with, or name another --store.")


def as_regularization(text: str) -> float | str:
    """λ as the engine wants it. Raises `BadSetting`."""
    try:
        value = 0 if text == "auto" else float(text)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise BadSetting(f"--regularization {text}: use a number ≥ 0, or auto.")
    return text if text == "auto" else value


def refuse_below(given: Mapping[str, object], least: Mapping[str, int] = LEAST) -> None:
    """Raise `BadSetting`, by name, for a number below the least that means something, or too large."""
    for name, value in least.items():
        if given.get(name) is not None and not value <= given[name] < 1e18:
            told = "less than 1e18" if given[name] >= 1e18 else f"{value} or more"
            raise BadSetting(f"{option(name)} {given[name]}: use {told}.")
