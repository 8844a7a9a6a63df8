"""What a run tells, and where."""

import json
import sys
import types

import numpy as np
import pytest
from rich.console import Console

from mlx_hjepa.run import Run
from mlx_hjepa.train import log
from mlx_hjepa.train.log import Log


@pytest.fixture
def run(tmp_path, tiny_config):
    return Run.create(tiny_config(), tmp_path)


def test_metrics_are_json_numbers_and_what_is_not_finite_is_null(run, tiny_config):
    with Log(run, tiny_config(), 0, 10) as out:
        out.record("train", 3, loss=np.float64(0.123456789), levels=[np.float64(1.0), float("nan")], bad=2)
    line = json.loads(run.metrics_file.read_text())
    assert line.pop("time") > 1e9
    assert line == {"kind": "train", "step": 3, "loss": 0.123457, "levels": [1.0, None], "bad": 2}


def writers(monkeypatch):
    """Stand-ins for both packages, which are extras; what they are told ends in the list returned."""
    told = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            told.append(("opened", purge_step))

        def add_scalar(self, name, value, step):
            told.append((name, value, step))

        def close(self):
            told.append("closed")

    class Online:
        def log(self, numbers, step):
            told.append((numbers, step))

        def finish(self):
            told.append("finished")

    def init(**settings):
        told.append(settings)
        return Online()

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return told


def test_tensorboard_gets_every_number_and_forgets_what_a_resume_repeats(run, tiny_config, monkeypatch):
    told = writers(monkeypatch)
    with Log(run, tiny_config(logging={"tensorboard": True}), 40, 100) as out:
        out.record("train", 50, loss=np.float64(0.5), levels=[np.float64(0.25)], note="no number", alarm=None)
    assert told == [("opened", 41), ("train/loss", 0.5, 50), ("train/levels_0", 0.25, 50), "closed"]


def test_wandb_gets_the_same_and_a_resumed_run_goes_on_in_its_place(run, tiny_config, monkeypatch):
    told, config = writers(monkeypatch), tiny_config(logging={"wandb": True})
    for start in (0, 50):
        with Log(run, config, start, 100) as out:
            out.record("knn", start + 20, last=0.5)
    first, _, _, second, _, _ = told
    assert first["id"] == second["id"] != ""
    assert second["resume"] == "allow"
    assert told[1] == ({"knn/last": 0.5}, 20)


@pytest.mark.parametrize("width", [80, 120])
def test_a_narrow_terminal_shows_the_whole_status(run, tiny_config, monkeypatch, width):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    words = " ".join(f"word{i:02d}" for i in range(22))
    with Log(run, tiny_config(), 0, 10) as out:
        out.status(5, words)
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(out.bar.get_renderable())
    shown = console.export_text()
    assert all(f"word{i:02d}" in shown for i in range(22)), shown


def test_missing_writers_are_named(run, tiny_config, monkeypatch):
    for module in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    for key in ("tensorboard", "wandb"):
        with pytest.raises(log.UserError, match=f"mlx-hjepa\\[{key}\\]"):
            Log(run, tiny_config(logging={key: True}), 0, 10)
