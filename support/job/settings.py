"""What can be set, where it is kept, and the options of the command line made from it.

The first command on a store fixes its `Subject`, the first `score` of each question its `Question`, the first
of `score` and `self` its `Damping`. Later commands take them from the store: an option that says otherwise is
refused.
"""

import argparse
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import TypeVar

from support.ekfac.curvature import DEFAULT_REGULARIZATION
from support.job.errors import BadSetting, JobError, StoreMismatch, refuse_all
from support.model import TRACKED_LAYERS

PACKAGED = "packaged"
ROWS = "all, a number (so many, drawn with --seed), or rows and ranges with commas, like 3,5,100:200"
LEAST = {"max_tokens": 1, "block": 1, "seed": 0, "tell_seconds": 1, "save_seconds": 0}
LEAST |= {"query_block": 1, "count": 1, "query_rank": 0, "new_tokens": 1, "fisher_samples": 1}
ASKED = ("question", "queries", "damping")
"""Facts of a store that each question has of its own."""

TASKS = ("classifier", "language-model")

Settings = TypeVar("Settings", bound="Subject | Question | Damping")


def setting(default: str | int | bool, meaning: str, choices: tuple[str, ...] = ()) -> Field:
    """A field of a settings class, with what `--help` says about it, and what it may be if not anything."""
    return field(default=default, metadata={"help": meaning, "choices": choices})


@dataclass(frozen=True)
class Subject:
    """Model, training examples, and everything else that decides the curvature."""

    model: str = setting(
        PACKAGED, "a name on the Hugging Face hub, a local folder, or one with a LoRA adapter"
    )
    base: str = setting("", "model that the adapter was trained on; the one that it names if empty")
    task: str = setting("", "classifier or language-model; what the model's class says if empty", TASKS)
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
        "", "layers that get gradients, by parts of their names; if empty, all linear ones of a classifier, "
        "the feed-forward ones of a model that writes, an adapter's own"
    )  # fmt: skip
    max_tokens: int = setting(512, "where texts are cut; no later than where the model stops to read")
    pieces: bool = setting(False, "read long texts to their end, cut into pieces, whose scores add up")
    precision: str = setting(
        "full", "full, or bfloat16: faster, good to about two digits", ("full", "bfloat16")
    )
    fisher_samples: int = setting(1, "texts of labels drawn for each example, where the Fisher is sampled")
    seed: int = setting(0, "of sampled rows and labels")
    block: int = setting(128, "training examples that are scored, and stored, at a time")


@dataclass(frozen=True)
class Question:
    """The queries, and what is kept of the influences on them."""

    queries: str = setting("", "data set of the queries; that of the training examples if empty")
    query_split: str = setting("test", "split that holds them")
    query_rows: str = setting(
        "10", f"which of them are asked about: {ROWS}; of a classifier also wrong:20, those it is most "
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


def settled(settings: type[Settings], given: Mapping, stored: Mapping | None) -> Settings:
    """The store's settings, or else those given, or the defaults. Raises what `refused` tells."""
    refuse_all(refused(settings, given, stored).values())
    if stored is not None:
        return settings(**stored)
    own = _own(settings, given)
    if settings is Subject and {own.get(name, PACKAGED) for name in ("model", "task")} <= {
        PACKAGED,
        "classifier",
    }:
        own.setdefault("layers", ",".join(TRACKED_LAYERS))
    return settings(**own)


def refused(settings: type[Settings], given: Mapping, stored: Mapping | None) -> dict[str, JobError]:
    """What is wrong with the given settings, by their names: `BadSetting`, and one `StoreMismatch` for all
    that contradict the store. Raises `StoreMismatch` for the store of another version."""
    own = _own(settings, given)
    found: dict[str, JobError] = {**below(own)}
    for one in fields(settings):
        value, choices = own.get(one.name), one.metadata["choices"]
        if value and choices and value not in choices:
            found[one.name] = BadSetting(f"{option(one.name)} {value}: use {' or '.join(choices)}.")
    if "regularization" in own and as_regularization(own["regularization"]) is None:
        told = f"--regularization {own['regularization']}: use a number ≥ 0, or auto."
        found["regularization"] = BadSetting(told)
    if stored is None:
        return found
    if {name: type(value) for name, value in stored.items()} != {
        one.name: one.type for one in fields(settings)
    }:
        told = f"The store's {settings.__name__.lower()} has other settings than this version of the job"
        raise StoreMismatch(f"{told}. Name another --store.")
    others = [name for name in own if name not in found and own[name] != stored[name]]
    if others:
        pairs = ({option(name): values[name] for name in others} for values in (stored, own))
        found |= dict.fromkeys(others, mismatch(*pairs))
    return found


def _own(settings: type[Settings], given: Mapping) -> dict:
    """What is given of these settings; one number has many spellings."""
    own = {one.name: given[one.name] for one in fields(settings) if given.get(one.name) is not None}
    value = as_regularization(own.get("regularization", ""))
    return own if value is None else own | {"regularization": str(value).removesuffix(".0")}


def refuse_unless_equal(stored: Mapping, here: Mapping) -> None:
    """Raise `StoreMismatch` where the store has something else under a name that is here, too."""
    if error := mismatch(stored, here):
        raise error


def mismatch(stored: Mapping, here: Mapping) -> StoreMismatch | None:
    """An error that names all that differs, entry by entry, and says what to do; None if nothing does."""
    told = {name: differences(name, stored[name], here[name]) for name in here if name in stored}
    names = {name for name, different in told.items() if different}
    asked = {*ASKED, "--query-block"} | {option(one.name) for one in (*fields(Question), *fields(Damping))}
    cure = "Go on with what the store was begun with, or name another --store."
    if names <= asked:
        cure = "Go on with what was asked, or ask this as a question of its own: --question NAME."
    each = [one for different in told.values() for one in different]
    return StoreMismatch(f"{'; '.join(each)}. {cure}") if each else None


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


def below(given: Mapping[str, object], least: Mapping[str, int] = LEAST) -> dict[str, BadSetting]:
    """By name, what is wrong with numbers below the least that means something, or too large."""
    found = {}
    for name, value in least.items():
        if given.get(name) is not None and not value <= given[name] < 1e18:
            told = "less than 1e18" if given[name] >= 1e18 else f"{value} or more"
            found[name] = BadSetting(f"{option(name)} {given[name]}: use {told}.")
    return found
