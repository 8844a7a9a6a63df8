"""`mlx-hjepa project`: budgets, other chips, and times scaled from what was measured."""

import json
import re
import shlex

import pytest
from click.testing import CliRunner

from mlx_hjepa import backend
from mlx_hjepa.analyze import projection, timing
from mlx_hjepa.cli import main
from mlx_hjepa.config import load
from mlx_hjepa.run import UserError

PRESET = "configs/vit_wide_20ep.yaml"


@pytest.fixture(autouse=True)
def _results(tmp_path, monkeypatch):
    monkeypatch.setattr(timing.throughput_file, "__defaults__", (tmp_path,))


@pytest.mark.parametrize(("text", "seconds"), [("3h", 10800), ("45m", 2700), ("2h30m", 9000), ("90s", 90),
                                               ("1.5h", 5400)])
def test_budgets_are_read(text, seconds):
    assert projection.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "three hours", "3", "h", "-2h"])
def test_other_words_for_a_time_are_refused(text):
    with pytest.raises(UserError, match="2h30m"):
        projection.seconds_of(text)


def measured(config, seconds_a_picture, batches=(32, 64, 128, 256), quick=False):
    rows = [{**timing.key(config), "batch": b, "it_s": 1 / (0.01 + seconds_a_picture * b), "spread": 0.01,
             "first_step_s": 7.0, "device": "a chip", "commit": "0123456", "quick": quick} for b in batches]
    timing.write(timing.throughput_file(), {
        **timing.document(backend.device()), "rows": rows, "fits": [timing.fitted(rows, timing.UNKNOWN)]})
    return rows


def test_a_measured_machine_tells_the_time_of_a_run_and_of_other_models():
    config = load(PRESET)
    assert projection.here(config) is None
    assert projection.times_here() is None
    measured(config, 1e-3)
    result = projection.project(config, None, None, lambda *_: pytest.fail("measured again"))
    assert result["parts"]["training"] == pytest.approx(7800 * (0.01 + 0.128), rel=1e-3)
    fewer = projection.project(load(PRESET, ["data.hold_out=true"]), None, None, lambda *_: None)
    assert (result["steps"], fewer["steps"]) == (20 * (50_000 // 128), 20 * (45_000 // 128))
    assert result["low"] < result["mid"] < result["high"]
    assert result["basis"] == "the fit of benchmarks/throughput.py on a chip, batch 32, 64, 128, 256"
    parts, basis = projection.describe(result)[1:]
    assert "health" in parts
    assert " s (estimated), knn" in parts
    assert parts.endswith("not counted: first step, feature statistics, knn search")
    assert "first step 0 s" not in parts
    assert basis.strip() == result["basis"]
    other = load("configs/vit_small_100ep.yaml")
    low, mid, high = projection.times_here()(other, 100)
    ratio = timing.key(other)["gflop"] / timing.key(config)["gflop"]
    assert mid > 39_000 * 0.128 * ratio
    assert high / mid == pytest.approx(1.3)
    assert low / mid == pytest.approx(0.7)


def test_what_was_measured_in_another_precision_is_left_out():
    measured(load(PRESET, ["training.precision=bf16"]), 1e-3)
    assert projection.times_here()(load(PRESET, ["training.precision=fp32"]), 20) is None


def test_a_run_tells_the_times_of_other_models():
    own, other = load(PRESET), load("configs/vit_small_100ep.yaml")
    low, mid, high = projection.times_from(own, 0.2)(other, 100)
    ratio = timing.key(other)["gflop"] / timing.key(own)["gflop"]
    training = 39_000 * 0.2 * ratio
    assert training < mid < 1.1 * training
    assert (low / mid, high / mid) == (pytest.approx(0.7), pytest.approx(1.3))


def test_a_guess_is_kept_so_that_nothing_is_measured_twice(monkeypatch):
    config = load(PRESET, ["training.precision=fp32"])
    rows = measured(config, 1e-3, (8, 32), quick=True)
    timing.throughput_file().unlink()
    measured(load("configs/vit_tiny_20ep.yaml"), 5e-3)
    monkeypatch.setattr(timing, "measure_here", lambda *_: rows)
    said = []
    first = projection.project(config, None, None, lambda *_: None, say=said.append)
    assert ["about 20 s" in line for line in said] == [True]
    assert first["basis"] == "a guess from a few seconds of steps on a chip, batch 8, 32"
    assert first["parts"]["first_step"] == 7.0
    assert first["not_counted"] == ["feature_statistics", "knn_search"]
    document = json.loads(timing.throughput_file().read_text())
    assert sorted((row["model"], row["quick"]) for row in document["rows"]) == [
        *[("192x12", False)] * 4, *[("384x6", True)] * 2]
    monkeypatch.setattr(timing, "measure_here", lambda *_: pytest.fail("measured again"))
    assert projection.project(config, None, None, lambda *_: None, say=said.append) == first
    assert len(said) == 1


def test_the_command_projects_another_chip_and_says_that_it_is_one():
    result = CliRunner().invoke(main, ["project", PRESET, "--chip", "M1 Max"])
    assert result.exit_code == 0, result.output
    assert "projection for M1 Max" in result.output
    as_json = CliRunner().invoke(main, ["project", PRESET, "--chip", "M1 Max", "--json"])
    assert json.loads(as_json.stdout)["steps"] == 7800
    unknown = CliRunner().invoke(main, ["project", PRESET, "--chip", "M7"])
    assert unknown.exit_code == 2
    assert "Did you mean" in unknown.stderr


def budget(*more):
    return CliRunner().invoke(main, ["project", PRESET, "--chip", "M1 Max", "--budget", *more])


def test_a_budget_is_filled_with_presets_for_the_same_pictures():
    result = budget("2h30m")
    assert result.exit_code == 0, result.output
    assert "digits" not in result.output
    assert "projection for M1 Max (32 GPU cores) in fp32" in result.output
    commands = [line.split("mlx-hjepa train ")[1] for line in result.output.splitlines() if "mlx-hjepa train" in line]
    assert len(commands) == len({c.split()[0] for c in commands}) >= 3
    assert budget("3s").exit_code == 2


def test_a_budget_keeps_what_was_set():
    plain, as_json = budget("2h30m"), budget("2h30m", "--json", "--set", "training.precision=bf16",
                                             "--set", "data.root=a b", "--set", "training.batch=64")
    options = json.loads(as_json.stdout)
    assert {o["batch"] for o in options} == {64}
    for option in options:
        assert option["high"] <= 9_000
        assert "in bf16" in option["basis"]
        words = shlex.split(option["command"])
        assert words[:3] == ["mlx-hjepa", "train", option["preset"]]
        sets = [word for word in words[3:] if word != "--set"]
        assert sets == ["training.precision=bf16", "data.root=a b", "training.batch=64",
                        f"training.epochs={option['epochs']}"]
        assert load(option["preset"], sets).training.epochs == option["epochs"]
    fewer = json.loads(budget("2h30m", "--json", "--pictures", "10000").stdout)
    assert fewer[0]["epochs"] > int(re.search(r"epochs=(\d+)", plain.output)[1])


@pytest.mark.parametrize("more", [("--epochs", "3"), ("--set", "training.epochs=3")])
def test_a_budget_and_epochs_exclude_each_other(more):
    result = budget("2h30m", *more)
    assert result.exit_code == 2
    assert "--budget finds the number of epochs" in result.stderr
