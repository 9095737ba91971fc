"""What the measurement of jobs reads from what they say, and how it is told."""

import numpy as np
import zarr

from benchmarks import job
from support.job.team import told

SAID = """\
fit 1/2, covariances: 1,024 of 2,000 examples (51%), 9.3 a second, 0:01:45 left: until Tue 21:20
fit 1/2, covariances: 2,000 of 2,000 examples (100%), 110 s
fit 2/2, eigenvalues: 2,000 of 2,000 examples (100%), 90 s
Fitted on 2,000 examples.
score: 2,000 of 2,000 examples (100%), 80 s
self: 2,000 of 2,000 examples (100%), 70 s
"""
PLAN = """\
2,000 training examples, 580,000 tokens; 50 queries; 1 process
fit                                3 min
self                                85 s
score                              2.5 h
memory of a process               384 MB
"""


def test_a_stage_lasts_as_long_as_the_line_of_its_end_says():
    stages = job.seconds_of_stages(SAID)
    assert stages == {"fit 1/2, covariances": 110, "fit 2/2, eigenvalues": 90, "score": 80, "self": 70}
    assert job.steps(stages) == {"fit": 200, "score": 80}
    assert job.seconds_of_stages(told("score", 2000, 0, 2000, 80.4)) == {"score": 80}


def test_a_plan_is_read_in_seconds_and_in_millions_of_bytes():
    assert [job.planned(PLAN, step) for step in ("fit", "self", "score")] == [180, 85, 9000]
    assert job.planned(PLAN, "memory of a process") == 384


def stored(folder, scores):
    group = zarr.create_group(folder / "results.zarr")
    group.create_array("scores", data=scores)
    group.create_array("self_influences", data=np.array([1.0, 4.0]))
    return folder


def test_a_difference_is_the_largest_over_the_largest_number(tmp_path):
    one = stored(tmp_path / "one", np.array([[2.0, -8.0]]))
    other = stored(tmp_path / "other", np.array([[2.5, -8.0]]))
    assert job.difference(one, one) == 0
    assert job.difference(one, other) == 0.5 / 8


TRACES = {
    "locks/rank-0": "nothing yet",
    "tokens/abc.arrow": "tokens",
    "fit/basis-3.safetensors": "eigenbases",
    "fit/eigenvalues-1.safetensors": "eigenvalues",
    "results.zarr/scores/c/0/1": "scores",
}


def test_a_kill_had_reached_the_last_step_that_left_something(tmp_path):
    for trace, reached in TRACES.items():
        (tmp_path / trace).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / trace).touch()
        assert job.where(tmp_path) == reached
