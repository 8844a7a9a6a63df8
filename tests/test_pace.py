"""Rates, the warning, and the time left, on a clock of the test's own."""

import mlx.core as mx
import pytest

from mlx_hjepa.train import pace
from mlx_hjepa.train.pace import Pace


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pace.time, "time", lambda: 0.0)
    monkeypatch.setattr(pace.time, "localtime", pace.time.gmtime)

    def pass_by(seconds):
        now[0] += seconds
    return pass_by


def test_the_first_step_and_checks_are_no_part_of_the_rate(clock):
    p = Pace(total=100, start=0)
    clock(7)
    p.first(mx.array(0))
    assert p.first_step == 7
    clock(4)
    with p.aside():
        clock(50)
    clock(1)
    assert p.lap(11) == pytest.approx(2.0)  # ten steps in five seconds
    clock(5)
    assert p.lap(10) == pytest.approx(2.0)


def test_the_end_is_told_from_the_whole_pace(clock):
    p = Pace(total=150, start=50)
    clock(3600)
    assert p.left(step=100) == "1 h 00 min left, ends Thu 01:00"


def test_the_first_check_and_the_first_step_do_not_delay_the_end(clock):
    p = Pace(total=101, start=0)
    with p.aside():
        clock(3600)
    clock(100)
    p.first(mx.array(0))
    clock(40)
    with p.aside():
        clock(10)  # later checks recur
    assert p.left(step=11) == "8 min left, ends Thu 00:07"


def test_after_the_first_step_alone_the_end_is_told_from_that(clock):
    p = Pace(total=101, start=0)
    clock(36)
    p.first(mx.array(0))
    assert p.left(step=1) == "1 h 00 min left, ends Thu 01:00"


def test_three_slow_laps_are_told_once_until_it_recovers(clock):
    p = Pace(total=1000, start=0)
    p.first(mx.array(0))

    def lap(seconds):
        clock(seconds)
        return p.slowed(p.lap(10))

    assert not any(lap(5) for _ in range(15))
    assert [lap(5.6) for _ in range(5)] == [False, False, True, False, False]
    assert not lap(5)
    assert [lap(6) for _ in range(3)] == [False, False, True]
