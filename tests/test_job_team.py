"""One process answers as a team does, what would set processes against each other is refused, and they say
how far they are."""

import re
import time

import pytest
import torch

from support.job.team import assembled, device, progress, told


def test_one_process_is_a_team():
    for _ in range(2):  # a team that has parted leaves room for the next
        with assembled() as team:
            tensor = torch.arange(3.0)
            team.add_up(tensor)
            team.wait()
            assert (team.rank, team.size, team.neighbours) == (0, 1, 1)
            assert team.on_first(lambda: 7) == 7
            assert tensor.tolist() == [0, 1, 2]


def test_what_is_shared_goes_to_one_and_tallies_grow_each_by_its_name(alone):
    team = alone()
    one, other = team.shared("a", "xyz"), team.shared("a", "xyz")
    assert [next(one), next(other), next(one)] == ["x", "y", "z"]
    assert list(one) == list(other) == []
    assert list(team.shared("b", "xy")) == ["x", "y"]
    tallies = [team.tally("a", 2), team.tally("b", 5), team.tally("a", 3), team.tally("a")]
    assert tallies == [2, 5, 5, 5]


def test_what_goes_wrong_in_the_first_is_raised_there_as_it_is(alone):
    team = alone()
    with pytest.raises(KeyError, match="lost"):
        team.on_first(lambda: {}["lost"])
    assert team.on_first(lambda: 1) == 1


def test_work_of_the_first_can_t_ask_for_work_of_the_first(alone):
    team = alone()
    with pytest.raises(RuntimeError, match="on_first within on_first"):
        team.on_first(lambda: team.on_first(lambda: 1))
    assert team.on_first(lambda: 1) == 1


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(device()) == "cuda:1"


# How far they are


def test_a_line_says_how_many_how_fast_and_until_when():
    line = told("score", done=50, before=0, total=200, seconds=10)
    assert re.fullmatch(
        r"score: 50 of 200 examples \(25%\), 5\.0 a second, 0:00:30 left: until \w+ \d\d:\d\d", line
    )
    # What an earlier run did makes this one no faster.
    line = told("score", done=150, before=100, total=200, seconds=10)
    assert "150 of 200 examples (75%), 5.0 a second, 0:00:10 left" in line


@pytest.mark.parametrize(
    ("done", "total", "said"),
    [(0, 200, "0 of 200 examples (0%)"), (0, 0, "0 of 0 examples (0%)"), (9, 9, "9 of 9 examples (100%)")],
)
def test_no_end_is_foretold_before_anything_is_done(done, total, said):
    assert told("score", done, 0, total, 3) == f"score: {said}, 3 s"


@pytest.mark.parametrize(
    ("seconds", "ends"), [(60, ["2,000"]), (0, ["500", "1,000", "1,500", "2,000"])], ids=["end", "blocks"]
)
def test_lines_are_written_when_it_is_time_and_at_the_end_where_there_is_no_terminal(
    capsys, alone, seconds, ends
):
    with progress(alone(), "score", 2_000, seconds=seconds) as count:
        for _ in range(4):
            count(500)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" of ")[0] for line in lines] == [f"score: {end}" for end in ends]
    assert lines[-1] == "score: 2,000 of 2,000 examples (100%), 0 s"


def test_in_a_terminal_there_is_one_line_that_changes(capsys, alone, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress(alone(), "score", 10) as count:
        count(4)
        time.sleep(0.3)
        count(4)
        count(2)
    _, changing, last = capsys.readouterr().err.split("\r\033[K")
    assert changing.startswith("score: 8 of 10 examples (80%), ")
    assert last == "score: 10 of 10 examples (100%), 0 s\n"


def test_only_the_first_process_tells_and_all_are_counted(capsys, alone):
    team = alone()
    with progress(team, "score", 10, before=5) as count:
        team.rank = 1
        with progress(team, "score", 10, before=5) as other:
            other(2)
        team.rank = 0
        assert capsys.readouterr().err == "score: goes on at 5 of 10 examples\n"
        count(3)
    assert capsys.readouterr().err == "score: 10 of 10 examples (100%), 0 s\n"
