"""Learning rate, weight decay and EMA momentum against their closed forms, and that a step uses its own."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_hjepa.config import Training
from mlx_hjepa.model.hjepa import HJEPA, key_of
from mlx_hjepa.schedule import Schedule
from mlx_hjepa.train.step import Step

RECIPE = {"epochs": 10, "lr": 1e-3, "min_lr": 1e-6, "warmup_epochs": 2, "weight_decay": 0.05, "ema": (0.996, 1.0)}


def schedule(steps_per_epoch=100, **changes):
    return Schedule(Training(**{**RECIPE, **changes}), steps_per_epoch)


def test_counts():
    s = schedule(7, warmup_epochs=0.5)
    assert (s.total, s.warmup) == (70, 4)


def test_warm_up_is_linear_and_ends_at_lr():
    s = schedule()
    assert s.lr(0) == pytest.approx(1e-3 / 200)
    assert s.lr(0) > 0
    assert np.diff([s.lr(i) for i in range(200)]) == pytest.approx(np.full(199, 1e-3 / 200))
    assert s.lr(199) == s.lr(200) == 1e-3  # the last of the warm-up, the first of the cosine


def test_cosine_from_lr_to_min_lr_at_the_last_step():
    s = schedule(lr=2e-3, min_lr=1e-4)
    for step in range(200, 1000, 37):
        assert s.lr(step) == pytest.approx(1e-4 + 1.9e-3 * (1 + math.cos(math.pi * (step - 200) / 799)) / 2)
    assert s.lr(999) == pytest.approx(1e-4, rel=1e-12)
    assert max(s.lr(i) for i in range(1000)) == 2e-3


def test_without_warm_up_the_first_step_has_the_whole_lr():
    s = schedule(warmup_epochs=0)
    assert s.lr(0) == 1e-3
    assert s.lr(s.total - 1) == pytest.approx(1e-6)


@pytest.mark.parametrize(("epochs", "steps", "warmup"), [(1, 1, 0), (1, 2, 0.5), (2, 1, 1), (1, 1, 0.9)])
def test_the_shortest_runs_have_a_finite_positive_rate(epochs, steps, warmup):
    s = schedule(steps, epochs=epochs, warmup_epochs=warmup)
    for step in range(s.total):
        assert 0 < s.lr(step) <= 1e-3
        assert 0.996 <= s.momentum(step) <= 1
        assert s.weight_decay(step) == pytest.approx(0.05)


def test_momentum_rises_linearly_over_all_steps():
    s = schedule()
    assert s.momentum(0) == 0.996
    assert s.momentum(999) == pytest.approx(1.0, abs=1e-15)
    assert [s.momentum(i) for i in range(1000)] == pytest.approx(0.996 + 0.004 * np.arange(1000) / 999, abs=1e-12)


def test_weight_decay_is_constant_or_a_cosine_ramp():
    assert {schedule().weight_decay(i) for i in (0, 1, 500, 999)} == {0.05}
    ramp = schedule(101, epochs=1, warmup_epochs=0.1, weight_decay=0.04, weight_decay_end=0.4)
    assert [ramp.weight_decay(i) for i in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])
    assert ramp.weight_decay(25) == pytest.approx(0.4 - 0.36 * (1 + math.cos(math.pi / 4)) / 2)
    assert schedule(weight_decay_end=0.0).weight_decay(999) == pytest.approx(0, abs=1e-15)


def test_the_scalars_of_a_step_are_its_own(tiny_config):
    config = tiny_config(training={"ema": [0.9, 1.0], "weight_decay_end": 0.4, "betas": [0.9, 0.95]})
    s = Schedule(config.training, 10)
    step = Step(HJEPA(config, (0.5,) * 3, (0.25,) * 3), s, "fp32")
    for i in (0, 1, 7, 19, 63, 64, 7, 200):
        corrections = [s.lr(i) / (1 - 0.9 ** (i + 1)), (1 - 0.95 ** (i + 1)) ** -0.5]
        wanted = [s.lr(i), s.weight_decay(i), s.momentum(i), *corrections, 0.75, 0.25]
        np.testing.assert_allclose(np.array(step.scalars(i, [3.0, 1.0])), wanted, rtol=1e-6)
        assert np.array(step.scalars(i, [1.0, 1.0]))[5:].tolist() == [0.5, 0.5]


def test_an_update_moves_by_the_lr_decay_and_momentum_of_its_step(tiny_config):
    """Adam's first update is lr * g / (|g| + eps): what is not decayed moves by lr(0), and by no more."""
    config = tiny_config(training={"lr": 0.01, "warmup_epochs": 0.5, "ema": [0.9, 1.0], "weight_decay": 0.5})
    s = Schedule(config.training, 10)
    step = Step(HJEPA(config, (0.5,) * 3, (0.25,) * 3), s, "fp32")
    before = step.initial_state()
    images = mx.array(np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))
    after, _ = step(before, images, key_of(0, 0), step.scalars(0, [1.0, 1.0]))
    p0, p1 = np.array(before.parameters, np.float64), np.array(after.parameters, np.float64)
    t0, t1 = np.array(before.target, np.float64), np.array(after.target, np.float64)
    decayed = step.layout.decayed().astype(bool)
    assert s.lr(0) == pytest.approx(0.002)
    moved = np.abs(p1 - p0)[~decayed]
    assert moved.max() == pytest.approx(0.002, rel=1e-3)
    assert np.median(moved) > 0.0018  # all but the biases of keys, which have no gradient
    moved = np.abs(p1 - p0 * (1 - 0.002 * 0.5))[decayed]
    assert moved.max() == pytest.approx(0.002, rel=1e-3)
    np.testing.assert_allclose(t1, 0.9 * t0 + 0.1 * p1[: len(t0)], atol=1e-7)
    assert np.abs(t1 - t0).max() > 1e-5
