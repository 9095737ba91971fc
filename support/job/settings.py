"""What can be set, where it is kept, and the options of the command line made from it.

The first command on a store fixes its `Subject`, the first `score` of each question its `Question`, the first
of `score` and `self` its `Damping`. Later commands take them from the store: an option that says otherwise is
refused.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import TypeVar

from support.ekfac.curvature import DEFAULT_REGULARIZATION
from support.job.errors import BadSetting, JobError, StoreMismatch

PACKAGED = "packaged"
ROWS = "all, a number (so many, drawn with --seed), or rows and ranges with commas, like 3,5,100:200"
LEAST = {"max_tokens": 1, "block": 1, "seed": 0, "tell_seconds": 1, "save_seconds": 0}
LEAST |= {
    "query_block": 1,
    "count": 1,
    "exact": 1,
    "numbers": 1,
    "query_rank": 0,
    "new_tokens": 1,
    "fisher_samples": 1,
}
LEAST |= {"examples": 1, "tokens": 1, "queries": 1, "fit_examples": 1, "devices": 1}
LEAST |= {"teraflops": 1e-3, "memory": 1e-3}
CHOICES = {"task": ("classifier", "language-model"), "precision": ("full", "float32", "bfloat16")}
ASKED = ("question", "queries", "damping")
"""Facts of a store that each question has of its own."""

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
    labels: str = setting("", "the names of the classes, in the model's order, like bad,so-so,good")
    prompt_column: str = setting("", "column of prompts, whose completions a model that writes is asked for")
    completion_column: str = setting("", "column of these")
    conversation_column: str = setting("", "column of conversations; what the assistant says is asked for")
    layers: str = setting(
        "", "layers that get gradients, by parts of their names; if empty, the feed-forward ones and a "
        "classifier's head, or an adapter's own"
    )  # fmt: skip
    max_tokens: int = setting(512, "where texts are cut; no later than where the model stops to read")
    pieces: bool = setting(False, "read long texts to their end, cut into pieces, whose scores add up")
    precision: str = setting(
        "full", "full; float32 for eigenproblems alone; or bfloat16, faster with instructions for it"
    )  # fmt: skip
    fisher_samples: int = setting(1, "texts of labels drawn for each example, where the Fisher is sampled")
    seed: int = setting(0, "of sampled rows and labels")
    block: int = setting(128, "training examples that are scored, and stored, at a time")


@dataclass(frozen=True)
class Question:
    """The queries, and what is kept of the influences on them."""

    queries: str = setting("", "data set of the queries; that of the training examples if empty")
    query_split: str = setting("test", "split that holds them")
    query_rows: str = setting(
        "10", f"which of them are asked about: {ROWS}; of a classifier also wrong:20, at most 20 it is most "
        "wrong about, wrong, all of these, and uncertain:20, those it is least sure of"
    )  # fmt: skip
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


def settled(
    settings: type[Settings], given: Mapping, stored: Mapping | None
) -> tuple[Settings, list[JobError]]:
    """The store's settings, or else those given, or the defaults; and what is wrong with those given, which
    then count for nothing. Raises `StoreMismatch` for the store of another version."""
    kinds = {one.name: one.type for one in fields(settings)}
    wrong = refused({name: given.get(name) for name in kinds})
    own = {name: given[name] for name in kinds if name not in wrong and given.get(name) is not None}
    if "regularization" in own:  # one number has many spellings
        own["regularization"] = str(as_regularization(own["regularization"])).removesuffix(".0")
    if stored is not None:
        if {name: type(value) for name, value in stored.items()} != kinds:
            told = f"The store's {settings.__name__.lower()} has other settings than this version of the job"
            raise StoreMismatch(f"{told}. Name another --store.")
        sides = ({option(name): side[name] for name in own} for side in (stored, own))
        return settings(**stored), [*wrong.values(), *mismatch(*sides)]
    return settings(**own), [*wrong.values()]


def refused(given: Mapping) -> dict[str, BadSetting]:
    """By name, what is wrong with values that mean nothing, as far as one sees by themselves."""
    found = {}
    for name, value in given.items():
        least, choices, cure = LEAST.get(name), CHOICES.get(name), ""
        if least is not None and isinstance(value, int | float) and not least <= value < 1e18:
            cure = "less than 1e18" if value >= 1e18 else f"{least} or more"
        elif choices and value and value not in choices:
            cure = " or ".join(choices)
        elif name == "regularization" and value is not None and as_regularization(value) is None:
            cure = "a number ≥ 0, or auto"
        elif name == "question" and not re.fullmatch(r"(\w[\w.-]{0,63})?", value):
            cure = "letters, digits, -, _ and ., a letter or digit first, 64 at most"
        if cure:
            found[name] = BadSetting(f"{option(name)} {value}: use {cure}.")
    return found


def mismatch(stored: Mapping, here: Mapping) -> list[StoreMismatch]:
    """One error that names all that differs under the names that both have, entry by entry, or none."""
    told = {name: differences(name, stored[name], here[name]) for name in here if name in stored}
    told = {name: each for name, each in told.items() if each}
    asked = {*ASKED, "--query-block"} | {option(one.name) for one in (*fields(Question), *fields(Damping))}
    cure = "Go on with what the store was begun with, or name another --store."
    if told.keys() <= asked:
        cure = "Go on with what was asked, or ask this as a question of its own: --question NAME."
    each = "; ".join(one for different in told.values() for one in different)
    return [StoreMismatch(f"{each}. {cure}")] if told else []


def differences(name: str, stored: object, here: object) -> list[str]:
    """What the store has otherwise under this name, entry by entry."""
    if isinstance(stored, Mapping) and isinstance(here, Mapping):
        keys = sorted(stored.keys() | here.keys())
        return [one for key in keys for one in differences(f"{name}: {key}", stored.get(key), here.get(key))]
    return [] if stored == here else [f"{name} is {here!r} here, but {stored!r} in the store"]


def as_regularization(text: str) -> float | str | None:
    """λ as the engine wants it, None for what is none."""
    try:
        value = text if text == "auto" else float(text)
    except ValueError:
        return None
    return value if value == "auto" or 0 <= value < float("inf") else None
