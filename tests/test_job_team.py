"""One process answers as a team does, and what would set processes against each other is refused."""

import itertools

import pytest

from support.job.errors import BadSetting
from support.job.team import Alone, Team, device


def test_one_process_is_a_team():
    team = Alone()
    assert isinstance(team, Team)
    assert (team.rank, team.size, team.neighbours) == (0, 1, 1)
    assert team.on_first(lambda: 7) == 7
    assert list(itertools.islice(team.numbers("blocks"), 3)) == [0, 1, 2]


def test_tallies_grow_and_don_t_mix():
    team = Alone()
    assert [team.tally("a", 2), team.tally("b", 5), team.tally("a", 3), team.tally("a")] == [
        2,
        5,
        5,
        5,
    ]


def test_work_of_the_first_can_t_ask_for_work_of_the_first():
    team = Alone()
    with pytest.raises(RuntimeError, match="on_first within on_first"):
        team.on_first(lambda: team.on_first(lambda: 1))
    assert team.on_first(lambda: 1) == 1


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(device()) == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(BadSetting, match="has 2 GPUs: use --nproc-per-node=2 at most"):
        device()
