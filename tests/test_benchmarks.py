"""The benchmarks and tools/mac_check.sh as one runs them, on tiny models."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import mlx_hjepa
from mlx_hjepa.analyze import timing
from mlx_hjepa.cli import main as cli

ROOT = Path(mlx_hjepa.__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import ablate  # noqa: E402
import kernels  # noqa: E402
import loader  # noqa: E402
import throughput  # noqa: E402
import versus_torch  # noqa: E402

TINY = ["--models", "32x2:1,2", "--batches", "2,4"]


def run(program, folder, *more):
    """The program's output, and the file that it wrote."""
    result = CliRunner().invoke(program.main, [*more, "--out", str(folder)])
    assert result.exit_code == 0, result.output + repr(result.exception)
    (file,) = folder.glob("*.json")
    return result.output, json.loads(file.read_text())


# ---------------------------------------------------------------- throughput


@pytest.fixture
def _small(monkeypatch):
    """A small matrix product, and evaluation of few pictures."""
    monkeypatch.setitem(throughput.MATRIX, "cpu", (64, 1))
    monkeypatch.setattr(timing, "VALIDATION", 100)
    monkeypatch.setattr(timing, "HEALTH_PICTURES", 32)


@pytest.fixture
def _brief(monkeypatch, _small):
    """Measuring, without the seconds: what it takes is in tests/test_timing.py."""
    measure = timing.measure
    monkeypatch.setattr(timing, "measure", lambda c, step, **_: measure(c, step, 2, 0.0, 1))
    monkeypatch.setattr(throughput, "picture", lambda *_: None)


@pytest.mark.usefixtures("_small")
def test_a_quick_run_writes_rows_fit_picture_and_the_settled_rate(tmp_path, monkeypatch):
    heat = iter(["cold", "warm", "hot"])
    monkeypatch.setattr(throughput, "thermal", lambda: next(heat))
    out, found = run(throughput, tmp_path, *TINY, "--quick", "--sustained", "0.002")
    assert [(r["batch"], r["quick"], r["device"]) for r in found["rows"]] == [
        (n, True, found["device"]["name"]) for n in (2, 4)]
    assert all(r["steps"] >= 5 for r in found["rows"])
    assert [f["launches"] for f in found["fits"]] == [None]  # no CUDA
    assert set(found["fits"][0]["costs"]) == set(timing.Costs._fields)
    settled = found["sustained"]
    assert (found["device"]["thermal"], settled["thermal"], settled["batch"]) == ("cold", "warm", 4)
    assert settled["it_s_cold"] > 0 < settled["it_s_settled"]
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "quick" in out


@pytest.mark.usefixtures("_brief")
def test_added_rows_keep_the_others_origin_and_the_settled_rate(tmp_path):
    _, first = run(throughput, tmp_path, *TINY, "--quick", "--sustained", "0.001")
    _, both = run(throughput, tmp_path, "--models", "32x2:1,2 16x2:2", "--batches", "4,8", "--add")
    assert [(r["model"], r["batch"], r["quick"]) for r in both["rows"]] == [
        ("16x2", 4, False), ("16x2", 8, False), ("32x2", 2, True), ("32x2", 4, False), ("32x2", 8, False)]
    assert both["sustained"] == first["sustained"]
    assert len(both["fits"]) == 2
    _, alone = run(throughput, tmp_path, *TINY)
    assert (len(alone["rows"]), alone["sustained"]) == (2, None)


@pytest.mark.usefixtures("_brief")
def test_a_sweep_goes_up_and_down_again_unless_it_is_quick(tmp_path, monkeypatch):
    measure, seen = timing.measure, []
    monkeypatch.setattr(timing, "measure", lambda c, step, **_: seen.append(c.training.batch) or measure(c, step))
    _, found = run(throughput, tmp_path, "--models", "32x2:1,2", "--batches", "2,4,8")
    assert seen == [2, 4, 8, 8, 4, 2]
    assert [r["batch"] for r in found["rows"]] == [2, 4, 8]
    run(throughput, tmp_path, "--models", "32x2:1,2", "--batches", "2,4", "--quick")
    assert seen[6:] == [2, 4]


@pytest.mark.usefixtures("_brief")
def test_ctrl_c_keeps_what_is_done(tmp_path, monkeypatch):
    measure = timing.measure

    def interrupted(c, step, **effort):
        if c.model.dim == 16:
            raise KeyboardInterrupt
        return measure(c, step, **effort)

    monkeypatch.setattr(timing, "measure", interrupted)
    out, found = run(throughput, tmp_path, "--models", "32x2:1,2 16x2:2", "--batches", "2,4", "--quick")
    assert "stopped; what was done is kept" in out
    assert [r["model"] for r in found["rows"]] == ["32x2", "32x2"]
    assert len(found["fits"]) == 1


@pytest.mark.usefixtures("_brief")
def test_a_configuration_is_measured_so_that_it_can_be_projected(tmp_path, monkeypatch):
    monkeypatch.setattr(timing.throughput_file, "__defaults__", (tmp_path,))
    file = str(ROOT / "configs/digits_demo.yaml")
    _, found = run(throughput, tmp_path, "--configs", file)
    assert [r["batch"] for r in found["rows"]] == [8, 16, 32]
    result = CliRunner().invoke(cli, ["project", file])
    assert result.exit_code == 0
    assert "the fit of benchmarks/throughput.py" in result.stdout
    assert "estimated" not in result.stdout
    assert "not counted" not in result.stdout
    assert result.stderr == ""  # nothing was measured


def test_launches_are_counted_where_cuda_writes_its_graphs(monkeypatch):
    c, done = throughput.model_config("32x2:1,2"), []

    def child(*_, **options):
        done.append(options["env"]["MLX_SAVE_CUDA_GRAPHS_DOT_FILE"])
        if len(done) > 2:
            raise subprocess.TimeoutExpired("python", options["timeout"])
        return subprocess.CompletedProcess("python", 0, stdout=("cache\n412.5\n", "0.0\n")[len(done) - 1])

    monkeypatch.setattr(kernels.subprocess, "run", child)
    assert kernels.launches(c) is None
    assert done == []
    monkeypatch.setattr(kernels.backend, "kind", lambda: "cuda")
    assert [kernels.launches(c) for _ in range(3)] == [412.5, None, None]


# ---------------------------------------------------------------- loader


def test_ratios_have_two_digits():
    assert [loader.ratio(x) for x in (0.0432, 0.4, 1, 12.6, 1234, 1.26e6)] == [
        "0.043", "0.4", "1", "13", "1,200", "1,300,000"]


def test_every_source_is_held_against_what_training_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "FILES", 8)
    monkeypatch.setattr(loader, "PICTURES", 64)
    need = tmp_path / "need.json"
    need.write_text(json.dumps({"rows": [{"model": "192x12", "image_size": 32, "img_s": n} for n in (1e7, 5e6)]}))
    out, found = run(loader, tmp_path / "out", "--batch", "4", "--seconds", "0.01", "--throughput", str(need))
    assert found["needs"] == {"192x12, 32 px": 1e7}
    sources = [name for name in found["img_s"] if not name.startswith("augmentation")]
    assert sources == [f"{what}, {source}" for what in (
        "CIFAR", "digits", "folder, JPEG of 64 px as 32 px", "folder, JPEG of 256 px as 224 px")
        for source in ("stream", "resident")]
    assert loader.ratio(found["img_s"]["CIFAR, stream"] / 1e7) in out  # far below 1, and not 0


# ---------------------------------------------------------------- versus_torch


TORCH = """#!{python}
import json, sys
if sys.argv[1] == "-c":
    sys.exit({broken})
asked = json.loads(sys.stdin.readline())
if asked["mode"] == "reduce-overhead":
    print("a warning", file=sys.stderr)
    print(json.dumps({{"error": "no graphs here"}}), flush=True)
    sys.exit(1)
print(json.dumps({{"first_step_s": 1.5, "version": "fake"}}), flush=True)
for line in sys.stdin:
    seconds = int(line) * {{"eager": 0.002, "default": 0.001}}[asked["mode"]]
    print(json.dumps({{"seconds": seconds, "peak_gb": 0.25}}), flush=True)
"""


@pytest.fixture
def torch(tmp_path):
    """A Python that has PyTorch, as far as the benchmark can tell."""
    file = tmp_path / "python"
    file.write_text(TORCH.format(python=sys.executable, broken=0))
    file.chmod(0o755)
    return str(file)


class Fast:
    """A side whose step takes so many seconds."""

    first_step_s = 2.0

    def __init__(self, second=0.01):
        self.second, self.asked = second, []
        self.ready = {"first_step_s": 1.0, "version": "fake"}

    def run(self, steps):
        self.asked.append(steps)
        return steps * self.second

    def ask(self, line):
        return {"seconds": self.run(int(line)), "peak_gb": 0.5}

    def close(self):
        pass


def test_both_sides_take_turns_of_about_equal_length():
    mlx, other = Fast(0.01), Fast(0.04)
    ours, theirs, peak = versus_torch.turns(mlx, other, rounds=3, seconds=0.4)
    assert (mlx.asked, other.asked) == ([2, 40, 40, 40], [2, 10, 10, 10])
    assert ours == pytest.approx([100] * 3)
    assert theirs == pytest.approx([25] * 3)
    assert peak == 0.5


def test_a_row_for_each_mode_with_the_median_and_spread(monkeypatch):
    rates = {"eager": 0.04, "default": 0.02}
    monkeypatch.setattr(versus_torch, "MlxSide", lambda _: Fast(0.01))
    monkeypatch.setattr(versus_torch, "TorchSide", lambda _python, _c, mode: Fast(rates[mode]))
    rows = list(versus_torch.compare(throughput.model_config("32x2:1,2"), list(rates), "python", 3, 0.1))
    assert [(r["torch_mode"], r["ratio"]) for r in rows] == [("eager", pytest.approx(4)), ("default", pytest.approx(2))]
    assert rows[0]["mlx_spread"] == pytest.approx(0)
    assert (rows[0]["mlx_first_step_s"], rows[0]["torch_first_step_s"]) == (2.0, 1.0)
    assert versus_torch.best(rows) == rows[1:]
    slower = [{**rows[0], "batch": 1}, *rows]
    assert [r["torch_mode"] for r in versus_torch.best(slower)] == ["eager", "default"]


def test_a_cpu_is_compared_with_torch_compile_too():
    assert versus_torch.MODES["cpu"].split(",") == ["eager", "default"]


def test_a_comparison_is_written_and_added_to(tmp_path, torch):
    brief = ("--python", torch, "--models", "32x2:1,2", "--rounds", "2", "--seconds", "0.01")
    out, first = run(versus_torch, tmp_path / "out", *brief, "--batches", "2", "--modes", "default,reduce-overhead")
    assert [(r["batch"], r["torch_mode"], r["torch_it_s"]) for r in first["rows"]] == [(2, "default", 1000)]
    assert first["failed"] == [{"row": "32x2:1,2 fp32 32 px, batch 2", "why": "no graphs here"}]
    assert "no graphs here" in out
    _, more = run(versus_torch, tmp_path / "out", *brief, "--batches", "2,4", "--modes", "eager", "--add")
    assert [(r["batch"], r["torch_mode"]) for r in more["rows"]] == [(2, "default"), (2, "eager"), (4, "eager")]
    assert more["rows"][0] == first["rows"][0]
    assert more["geometric_mean"] == pytest.approx(
        statistics.geometric_mean(more["rows"][i]["ratio"] for i in (0, 2)), rel=1e-3)
    _, again = run(versus_torch, tmp_path / "out", *brief, "--batches", "4", "--modes", "eager", "--add")
    assert len(again["rows"]) == 3


def test_a_python_without_torch_is_told(tmp_path):
    file = tmp_path / "python"
    file.write_text(TORCH.format(python=sys.executable, broken='"ModuleNotFoundError: no torch"'))
    file.chmod(0o755)
    result = CliRunner().invoke(versus_torch.main, ["--python", str(file), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "no torch" in result.stderr
    assert "--python" in result.stderr


# ---------------------------------------------------------------- mac_check


def mac_check(folder, **environment):
    start = time.monotonic()
    done = subprocess.run([ROOT / "tools/mac_check.sh"], text=True, capture_output=True,
                          env={**os.environ, "MAC_CHECK_DRY": str(folder), **environment})
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "mac_check.json").read_text()), time.monotonic() - start


@pytest.mark.slow
def test_mac_check_writes_one_file_of_this_run_alone(tmp_path):
    stale = tmp_path / "mac_check" / "older.status"
    stale.parent.mkdir()
    stale.write_text("{}")
    parts, _ = mac_check(tmp_path)
    assert {"doctor", "tests", "resume", "throughput", "loader"} <= set(parts) <= {
        "doctor", "tests", "resume", "throughput", "loader", "versus_torch"}
    assert {name: part["log"] for name, part in parts.items() if part["status"]} == {}
    assert [r["model"] for r in parts["throughput"]["result"]["rows"]] == ["32x2", "32x2"]
    assert parts["loader"]["result"]["img_s"]["digits, resident"] > 0
    assert "passed" in parts["tests"]["log"]


def test_mac_check_ends_at_its_deadline(tmp_path):
    parts, took = mac_check(tmp_path, MAC_CHECK_SECONDS="1")
    assert parts["throughput"]["status"] == 124  # the longest; what ends within a second may
    limits = [parts[name]["limit"] for name in ("doctor", "tests", "resume", "throughput", "loader")]
    assert max(limits) <= 1, "whole seconds of the shell's clock: the first part may find the one gone"
    assert took < 20


# ---------------------------------------------------------------- ablate


def test_a_ladder_is_trained_scored_and_not_run_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ladder.yaml").write_text("base: []\nslow: [training.lr=1e-4]\nbroken: [training.lr=1e4]\n")
    sizes = ("model.dim=32", "model.depth=2", "model.levels=[1,2]", "predictor.dim=32", "predictor.depth=1",
             "training.epochs=1", "training.warmup_epochs=0", "training.max_bad_steps=1")
    command = [str(ROOT / "configs" / "digits_demo.yaml"), "ladder.yaml", "--jobs", "2"]
    command += [word for s in sizes for word in ("--set", s)]
    for _ in range(2):
        result = CliRunner().invoke(ablate.main, command)
        assert result.exit_code == 0, result.output
        rows = json.loads(Path("results/ablations/ladder.json").read_text())["rows"]
        assert [r["name"] for r in rows] == ["base", "slow", "broken"]
        assert all(0.2 < r[f"{p}_{level}"] <= 1 for r in rows[:2] for p, level in ablate.COLUMNS)
        assert "no longer finite" in rows[2]["failed"] or "without a finite gradient" in rows[2]["failed"]
    written = Path("results/ladder-base-s0/metrics.jsonl").read_text()
    assert written.count('"kind": "start"') == 1
    assert json.loads(written.splitlines()[-1])["step"] == (1437 - 143) // 32
    Path("ladder.yaml").write_text("base: [training.lr=3e-3]\n")
    result = CliRunner().invoke(ablate.main, command)
    assert result.exit_code == 2
    assert "ladder-base-s0 was started with another training.lr" in result.output
