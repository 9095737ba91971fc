"""What holds is what the store says, or else what was given, or else a default that has a reason."""

import argparse
from dataclasses import asdict, fields

import pytest

from support.job.errors import BadSetting, StoreMismatch
from support.job.settings import (
    FOR_PACKAGED_MODEL,
    Damping,
    Question,
    Subject,
    add_options,
    as_regularization,
    settled,
)

ALL = (Subject, Question, Damping)


def options(*settings):
    parser = argparse.ArgumentParser()
    for one in settings:
        add_options(parser, one)
    return parser


@pytest.mark.parametrize("settings", ALL)
def test_without_a_word_the_defaults_hold(settings):
    assert settled(settings, {}, None, False) == settings()


def test_what_is_given_wins_over_a_default_and_none_means_not_given():
    subject = settled(Subject, {"block": 7, "model": None, "seed": 0}, None, False)
    assert subject == Subject(block=7)


def test_what_belongs_to_other_settings_is_passed_over():
    assert settled(Damping, {"block": 7, "store": "here"}, None, False) == Damping()


def test_what_is_stored_wins_over_every_default():
    stored = asdict(Subject(model="mine", block=7, seed=3))
    assert settled(Subject, {}, stored, True) == Subject(**stored)


def test_what_is_given_may_repeat_what_is_stored():
    stored = asdict(Question(query_rows="3,5", by_layer=True))
    given = {"query_rows": "3,5", "by_layer": None}
    assert settled(Question, given, stored, False) == Question(**stored)


def test_the_packaged_model_has_layers_and_damping_of_its_own():
    assert settled(Subject, {}, None, True).layers == FOR_PACKAGED_MODEL["layers"]
    assert settled(Damping, {}, None, True).regularization == FOR_PACKAGED_MODEL["regularization"]
    assert settled(Question, {}, None, True) == Question()


def test_what_is_given_wins_over_the_packaged_models_own():
    assert settled(Damping, {"regularization": "auto"}, None, True) == Damping("auto")


@pytest.mark.parametrize(
    ("settings", "stored", "given", "message"),
    [
        (Subject, Subject(block=7), {"block": 8}, r"^--block is 8 here, but 7 in the store\."),
        (Question, Question(), {"query_rows": "3"}, r"^--query-rows is '3' here, but '10' in"),
        (Question, Question(), {"by_layer": True}, r"^--by-layer is True here, but False in"),
        (Damping, Damping("0.5"), {"regularization": "1"}, r"'1' here, but '0\.5'.* --store\.$"),
    ],
)
def test_a_contradiction_is_refused_by_the_options_name_and_both_values(
    settings, stored, given, message
):
    with pytest.raises(StoreMismatch, match=message):
        settled(settings, given, asdict(stored), False)


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        (Subject, {"block": 0}, r"^--block 0: use 1 or more\."),
        (Subject, {"max_tokens": -1}, r"^--max-tokens -1: use 1 or more\."),
        (Subject, {"precision": "half"}, r"^--precision half: use full or bfloat16\."),
        (Damping, {"regularization": "much"}, r"^--regularization much: use a number ≥ 0, or auto"),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_name(settings, given, message):
    with pytest.raises(BadSetting, match=message):
        settled(settings, given, None, False)


def test_regularization_is_a_number_or_auto():
    assert as_regularization("auto") == "auto"
    assert as_regularization("0") == 0.0
    assert as_regularization("1e-3") == 0.001


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "", "0,1", "Auto"])
def test_every_other_regularization_is_refused(text):
    with pytest.raises(BadSetting, match=r"use a number ≥ 0, or auto\.$"):
        as_regularization(text)


@pytest.mark.parametrize("settings", ALL)
def test_every_setting_says_what_it_means_and_is_an_option(settings):
    said = " ".join(options(settings).format_help().split())
    for one in fields(settings):
        assert f"--{one.name.replace('_', '-')}" in said
        assert one.metadata["help"] in said


def test_an_option_that_is_not_given_is_none():
    given = vars(options(*ALL).parse_args([]))
    assert set(given) == {one.name for settings in ALL for one in fields(settings)}
    assert set(given.values()) == {None}


def test_an_option_has_the_type_of_its_setting():
    given = vars(options(*ALL).parse_args(["--block", "7", "--by-layer", "--query-rows", "50"]))
    chosen = {name: value for name, value in given.items() if value is not None}
    assert chosen == {"block": 7, "by_layer": True, "query_rows": "50"}


def test_no_two_settings_share_a_name():
    names = [one.name for settings in ALL for one in fields(settings)]
    assert len(names) == len(set(names))
