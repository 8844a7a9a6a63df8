"""Shared by all tests. Importing the package first lets it load OpenBLAS before MLX is imported."""

import copy
import os
import sys

import pytest

from mlx_hjepa import backend, config

TINY = {
    "name": "tiny",
    "data": {"dataset": "digits", "source": "resident", "image_size": 16},
    "model": {"dim": 32, "depth": 2, "head_dim": 16, "patch": 4, "levels": [1, 2]},
    "predictor": {"dim": 32, "depth": 1, "head_dim": 16},
    "masking": {"target_tokens": 4, "context_tokens": 6, "target_blocks": 2},
    "training": {"epochs": 2, "batch": 4, "warmup_epochs": 0.5, "precision": "fp32"},
}


@pytest.fixture
def tiny_config():
    """A function of overrides: tiny_config(seed=1, model={"levels": [2]}) is the tiny run with those keys changed."""
    def build(**overrides):
        values = copy.deepcopy(TINY)
        for key, value in overrides.items():
            if isinstance(value, dict):
                values[key] = {**values.get(key, {}), **value}
            else:
                values[key] = value
        return config.build(values)
    return build


@pytest.fixture
def two_cores(monkeypatch):
    """As on a machine with two cores, where `backend.both_cores` gives two streams."""
    if sys.platform != "linux" or backend.kind() != "cpu":
        pytest.skip("only Linux's CPU back-end has two streams")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
