"""A long job says how far it is, and when it will be done."""

import re

import pytest

from support.job.progress import Progress, told
from support.job.team import Alone


def test_a_line_says_how_many_how_fast_and_until_when():
    line = told("score", done=50, before=0, total=200, seconds=10)
    assert re.fullmatch(
        r"score: 50 of 200 examples \(25%\), 5\.0 a second, 0:00:30 left: until \w+ \d\d:\d\d", line
    )


def test_what_an_earlier_run_did_makes_this_one_no_faster():
    line = told("score", done=150, before=100, total=200, seconds=10)
    assert "150 of 200 examples (75%), 5.0 a second, 0:00:10 left" in line


@pytest.mark.parametrize(
    ("done", "total", "said"), [(0, 200, "0 of 200 examples (0%)"), (0, 0, "0 of 0 examples (0%)")]
)
def test_no_end_is_foretold_before_anything_is_done(done, total, said):
    assert told("score", done, 0, total, 3) == f"score: {said}, 3 s"


def test_at_the_end_the_time_it_took_is_told():
    assert told("score", 200, 0, 200, 41.7) == "score: 200 of 200 examples (100%), 42 s"


def test_lines_are_written_where_there_is_no_terminal(capsys):
    with Progress(Alone(), "score", 2_000) as progress:
        progress.add(500)
        progress.add(1_500)
    assert capsys.readouterr().err == "score: 2,000 of 2,000 examples (100%), 0 s\n"


def test_a_job_taken_up_again_says_where(capsys):
    with Progress(Alone(), "score", 2_000, before=1_600) as progress:
        progress.add(400)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "score: goes on at 1,600 of 2,000 examples"
    assert last == "score: 2,000 of 2,000 examples (100%), 0 s"


@pytest.mark.parametrize("before", [0, 10])
def test_what_is_new_or_done_goes_on_nowhere(capsys, before):
    with Progress(Alone(), "score", 10, before) as progress:
        progress.add(10 - before)
    assert capsys.readouterr().err == "score: 10 of 10 examples (100%), 0 s\n"


def test_only_the_first_process_tells(capsys):
    class Second(Alone):
        rank = 1

    with Progress(Second(), "score", 10, before=5) as progress:
        progress.add(5)
    assert capsys.readouterr().err == ""
    assert progress.done() == 10
