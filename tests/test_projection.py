"""`mlx-hjepa project`: budgets, other chips, and times scaled from what was measured."""

import json

import pytest
from click.testing import CliRunner

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


def measured(config, seconds_a_picture):
    key = timing.key(config)
    rows = [{**key, "batch": b, "it_s": 1 / (0.01 + seconds_a_picture * b), "spread": 0.01} for b in (32, 64, 128, 256)]
    fit = timing.fit(rows)
    timing.throughput_file().write_text(json.dumps(
        {"rows": rows, "fits": [{**key, "a": fit.a, "b": fit.b, "costs": None}]}))


def test_a_measured_machine_tells_the_time_of_a_run_and_of_other_models():
    config = load(PRESET)
    assert projection.here(config) is None
    assert projection.times_here() is None
    measured(config, 1e-3)
    result = projection.project(config, None, None, lambda *_: pytest.fail("measured again"))
    assert result["parts"]["training"] == pytest.approx(3900 * (0.01 + 0.256), rel=1e-3)
    assert result["low"] < result["mid"] < result["high"]
    other = load("configs/vit_small_100ep.yaml")
    low, mid, high = projection.times_here()(other, 100)
    ratio = timing.key(other)["gflop"] / timing.key(config)["gflop"]
    assert mid > 19500 * 0.256 * ratio
    assert high / mid == pytest.approx(1.3)
    assert low / mid == pytest.approx(0.7)


def test_the_command_projects_another_chip_and_says_that_it_is_one():
    result = CliRunner().invoke(main, ["project", PRESET, "--chip", "M1 Max"])
    assert result.exit_code == 0, result.output
    assert "projection for M1 Max" in result.output
    as_json = CliRunner().invoke(main, ["project", PRESET, "--chip", "M1 Max", "--json"])
    assert json.loads(as_json.stdout)["steps"] == 3900
    unknown = CliRunner().invoke(main, ["project", PRESET, "--chip", "M7"])
    assert unknown.exit_code == 2
    assert "Did you mean" in unknown.stderr


def test_a_budget_is_filled_with_presets_for_the_same_pictures():
    result = CliRunner().invoke(main, ["project", PRESET, "--chip", "M1 Max", "--budget", "2h30m"])
    assert result.exit_code == 0, result.output
    assert "digits" not in result.output
    commands = [line.split("mlx-hjepa train ")[1] for line in result.output.splitlines() if "mlx-hjepa train" in line]
    assert len(commands) == len({c.split()[0] for c in commands}) >= 3
    assert CliRunner().invoke(main, ["project", PRESET, "--chip", "M1 Max", "--budget", "3s"]).exit_code == 2
