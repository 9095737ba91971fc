"""One process answers as a team does, and what would set processes against each other is refused."""

import pytest
import torch

from support.job.team import assembled, device


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
