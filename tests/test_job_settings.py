"""What holds is what the store says, or else what was given, or else a default that has a reason."""

from dataclasses import asdict

import pytest

from support.job.errors import BadSetting, StoreMismatch, refuse_all
from support.job.settings import Damping, Question, Subject, as_regularization, refused, settled

ALL = (Subject, Question, Damping)


def held(settings, given, stored):
    """The settings, unless anything is wrong with them."""
    found, wrong = settled(settings, given, stored)
    refuse_all(wrong)
    return found


@pytest.mark.parametrize("settings", ALL)
def test_without_a_word_the_defaults_hold(settings):
    given = {"model": "mine"} if settings is Subject else {}
    assert held(settings, given, None) == settings(**given)


def test_what_is_given_wins_over_a_default_none_means_not_given_and_other_settings_are_passed_over():
    given = {"block": 7, "precision": None, "seed": 0, "store": "here", "model": "mine"}
    assert held(Subject, given, None) == Subject(model="mine", block=7)
    assert held(Damping, given, None) == Damping("0.01")


def test_what_is_stored_wins_over_every_default_and_may_be_repeated():
    stored = asdict(Subject(model="mine", block=7, seed=3))
    for given in ({}, {"block": 7, "seed": None}):
        assert held(Subject, given, stored) == Subject(**stored)


@pytest.mark.parametrize(
    ("settings", "stored", "given", "message"),
    [
        (Subject, Subject(block=7), {"block": 8}, r"^--block is 8 here, but 7 in the store\. .* --store\.$"),
        (Question, Question(), {"query_rows": "3"}, r"^--query-rows is '3' here, but '10' in"),
        (Question, Question(), {"by_layer": True}, r"^--by-layer is True here, but False in"),
        (Damping, Damping("0.5"), {"regularization": "1"}, r"'1' here, but '0\.5'.* --question NAME\.$"),
    ],
)
def test_a_contradiction_is_refused_by_the_options_name_and_both_values(settings, stored, given, message):
    with pytest.raises(StoreMismatch, match=message):
        held(settings, given, asdict(stored))


@pytest.mark.parametrize("change", [{"block": "7"}, {"colour": "red"}, {"seed": None}])
def test_settings_of_another_kind_than_this_version_s_are_refused(change):
    with pytest.raises(StoreMismatch, match=r"^The store's subject has other settings than this version"):
        held(Subject, {}, asdict(Subject()) | change)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0, "use 1 or more"),
        (-1, "use 1 or more"),
        (float("nan"), "use 1 or more"),
        (float("inf"), "use less than 1e18"),
        (10**400, "use less than 1e18"),
    ],
)
def test_a_number_that_means_nothing_is_refused_by_its_option(value, told):
    with pytest.raises(BadSetting, match=rf"^--tell-seconds .*: {told}\.$"):
        refuse_all(refused({"tell_seconds": value}).values())
    with pytest.raises(BadSetting, match=rf"^--max-tokens .*: {told}\.$"):
        held(Subject, {"max_tokens": value}, None)


def test_regularization_is_a_number_or_auto():
    assert [as_regularization(text) for text in ("auto", "0", "1e-3")] == ["auto", 0.0, 0.001]
    for text in ("-1", "nan", "inf", "", "0,1", "Auto"):
        assert as_regularization(text) is None
        with pytest.raises(BadSetting, match=rf"^--regularization {text}: use a number ≥ 0, or auto\.$"):
            held(Damping, {"regularization": text}, None)


def test_all_that_is_wrong_is_refused_at_once():
    with pytest.raises(BadSetting) as told:
        held(Subject, {"task": "sing", "precision": "half", "block": 0, "seed": 8}, asdict(Subject(seed=7)))
    assert str(told.value).splitlines() == [
        "--task sing: use classifier or language-model.",
        "--precision half: use full or float32 or bfloat16.",
        "--block 0: use 1 or more.",
        "--seed is 8 here, but 7 in the store. Go on with what the store was begun with, or name another "
        "--store.",
    ]


def test_what_is_wrong_counts_for_nothing_beside_the_rest():
    found, wrong = settled(Subject, {"model": "mine", "block": 0, "seed": 8}, None)
    assert (found, len(wrong)) == (Subject(model="mine", seed=8), 1)
    assert settled(Question, {"query_rows": "3"}, asdict(Question()))[0] == Question()


def test_what_differs_from_the_question_is_named_in_one_sentence():
    told = (
        "^--query-rows is '3' here, but '10' in the store; --by-layer is True here, but False in the store. G"
    )
    with pytest.raises(StoreMismatch, match=told):
        held(Question, {"query_rows": "3", "by_layer": True, "query_rank": 0}, asdict(Question()))
