"""The collapse alarm, rule by rule."""

import numpy as np
import pytest

from mlx_hjepa.train.health import Alarm, statistics


def check(std=0.4, rank=20.0, baseline=0.1):
    return {"std": [9.0, std], "effective_rank": [1.0, rank], "baseline": [baseline, 0.2]}


@pytest.mark.parametrize(("bad", "reason"), [
    ({"std": 0.19}, "std 0.19, at step 0 0.4"), ({"rank": 9.9}, "effective rank 9.9, at step 0 20"),
    ({"baseline": 9e-4}, "a constant predicts the targets")])
def test_two_checks_running_raise_it_and_one_does_not(bad, reason):
    alarm = Alarm()
    for found in (check(), check(**bad), check(), check(**bad)):
        assert alarm.check(found) is None
    assert reason in alarm.check(check(**bad))
    assert alarm.check(check()) is None


def test_a_std_near_zero_is_a_collapse_whatever_it_was_at_first():
    alarm = Alarm()
    assert alarm.check(check(std=9e-4)) is None
    assert "std 0.0009" in alarm.check(check(std=9e-4))


def test_strikes_and_reference_outlive_a_resume():
    alarm = Alarm()
    alarm.check(check())
    alarm.check(check(std=0.1))
    assert Alarm(**alarm.dump()).check(check(std=0.1)) is not None


def test_statistics_are_those_of_each_depth():
    x = np.random.default_rng(0).normal(size=(200, 2, 8)).astype(np.float32)
    x[:, 1] = x[:1, 1]
    found = statistics(x)
    assert found["std"][0] > 0.9 > 1e-3 > found["std"][1]
    assert found["effective_rank"][0] > 7
