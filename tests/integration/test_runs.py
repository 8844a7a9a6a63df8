"""Whole runs on the digits: interruption and resume, collapse and health, what a run leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest

from mlx_hjepa import backend
from mlx_hjepa.run import Run, UserError
from mlx_hjepa.train import trainer
from mlx_hjepa.train.log import truncate
from mlx_hjepa.train.trainer import Trainer, train

STEPS = 44  # 2 epochs of floor(1437 / 64)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(tiny_config):
    def build(**changes):
        values = {
            "training": {"batch": 64, "epochs": 2, "lr": 1e-3, "ema": [0.9, 0.99]},
            "logging": {"every_steps": 10, "health_every": 0.5, "knn_every": 1},
            "checkpoints": {"every_minutes": 60, "every_epochs": 1, "keep": 2}}
        for section, keys in changes.items():
            values[section] = {**values.get(section, {}), **keys} if isinstance(keys, dict) else keys
        return tiny_config(**{"model": {"level_weights": "balanced"}, "augment": {"flip": False}, **values})
    return build


def final(run):
    """Every array of a finished run's last checkpoint, by file and name."""
    folder = run.checkpoint("latest")
    assert json.loads((folder / "state.json").read_text())["step"] == STEPS
    return {(file.name, name): np.array(array) for file in sorted(folder.glob("*.safetensors"))
            for name, array in mx.load(str(file)).items()}


def equal(a, b):
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def lines(run, kind):
    found = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def interrupt_at(monkeypatch, moments, number=signal.SIGINT):
    """Let the process get a signal while the batch of each of these steps is being read."""
    real = trainer.batches

    def batches(pictures, source, seed, batch, start, stop, threads, rows):
        for step, images in enumerate(real(pictures, source, seed, batch, start, stop, threads, rows), start):
            if step in moments:
                moments.remove(step)
                signal.raise_signal(number)
            yield images

    monkeypatch.setattr(trainer, "batches", batches)


def test_interrupted_three_times_a_run_ends_bit_for_bit_as_if_it_had_not_been(config, monkeypatch):
    settings = config()
    whole = Run.create(settings)
    assert train(settings, whole)
    broken = Run.create(settings)
    moments = set(np.random.default_rng(int(time.time())).choice(np.arange(1, STEPS - 1), 3, replace=False).tolist())
    told = sorted(moments)
    interrupt_at(monkeypatch, moments, signal.SIGTERM)
    assert not train(settings, broken)
    for _ in told[1:]:
        assert not train(settings, broken, resume=True)
    assert train(settings, broken, resume=True)
    assert equal(final(whole), final(broken)), f"interrupted at {told}"
    for kind in ("health", "knn"):
        strip = [{k: v for k, v in line.items() if k != "time"} for line in lines(whole, kind)]
        assert strip == [{k: v for k, v in line.items() if k != "time"} for line in lines(broken, kind)]
    steps = [line["step"] for line in lines(broken, "train")]
    assert steps == sorted(set(steps)), "no step is logged twice"


def test_killed_without_warning_a_run_goes_on_from_its_checkpoint(config):
    settings = config(data={"source": "stream"})
    whole = Run.create(settings)
    train(settings, whole)
    command = [sys.executable, "-m", "mlx_hjepa.cli", "train", str(whole.config_file)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    killed = Run("results/tiny-2")
    deadline = time.monotonic() + 120
    while not (killed.checkpoints / "latest").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(killed.metrics_file, "a") as file:
        file.write('{"kind": "train", "ste')  # a line cut by the kill
    assert subprocess.run([*command[:-1], str(killed.folder), "--resume"], stdout=subprocess.DEVNULL).returncode == 0
    assert equal(final(whole), final(killed))


def test_every_step_of_a_killed_and_resumed_run_is_logged_once(config, monkeypatch):
    settings = config(model={"dim": 16, "depth": 1, "levels": [1]}, training={"batch": 256},
                      logging={"every_steps": 1, "health_every": 0.4})
    run, real = Run.create(settings), trainer.batches

    def killed(*arguments):
        """Nothing is saved between the checkpoint at step 5 and the end at step 8."""
        for step, images in enumerate(real(*arguments)):
            if step == 8:
                raise MemoryError
            yield images

    monkeypatch.setattr(trainer, "batches", killed)
    with pytest.raises(MemoryError):
        train(settings, run)
    assert [line["step"] for line in lines(run, "train")] == list(range(1, 9))
    monkeypatch.setattr(trainer, "batches", real)
    assert train(settings, run, resume=True)
    assert [line["step"] for line in lines(run, "resume")] == [5]
    assert [line["step"] for line in lines(run, "train")] == list(range(1, 11))
    assert [line["step"] for line in lines(run, "health")] == list(range(0, 11, 2))
    assert [line["step"] for line in lines(run, "knn")] == [5, 10]


def test_stream_and_resident_train_to_the_same_weights(config):
    runs = []
    for source in ("stream", "resident"):
        settings = config(data={"source": source})
        runs.append(Run.create(settings))
        train(settings, runs[-1])
    assert equal(*map(final, runs))


def test_a_run_leaves_everything_needed_to_understand_it(config):
    settings = config()
    run = Run.create(settings)
    assert train(settings, run)
    assert run.config == settings
    environment = run.environment
    assert environment["versions"]["mlx"]
    assert len(environment["dataset"]["fingerprint"]) == 64
    assert [line["step"] for line in lines(run, "health")] == [0, 11, 22, 33, 44]
    assert [line["step"] for line in lines(run, "knn")] == [22, 44]
    log = lines(run, "train")[-1]
    wanted = {"loss", "loss_ratio", "lr", "it_s", "img_s", "peak_gb", "grad_norm", "bad", "first_step_seconds"}
    assert wanted <= log.keys()
    best = json.loads((run.checkpoint("best") / "state.json").read_text())["best"]
    assert best["knn"] == pytest.approx(max(line["levels"] for line in lines(run, "knn")), abs=1e-6)
    rates = [line["it_s"] for line in lines(run, "train")]
    assert max(rates) < 20 * min(rates), "checks and checkpoints are taken out of the rates, and nothing else"
    assert lines(run, "end")[-1]["finished"]
    assert not list(run.folder.rglob("*.tmp")), "nothing half-written is left"


def test_the_alarm_goes_when_a_run_collapses_and_not_when_it_is_healthy(config):
    broken = config(training={"lr": 0.05, "ema": [0.0, 0.0], "warmup_epochs": 0.1, "epochs": 3, "clip": 100.0})
    run = Run.create(broken)
    train(broken, run)
    alarms = [line["alarm"] for line in lines(run, "health")]
    assert alarms[0] is None, "a fresh encoder raises none"
    assert any(alarms), [line["std"] for line in lines(run, "health")]
    assert "COLLAPSE" in run.log_file.read_text()
    settings = config(training={"epochs": 3})
    healthy = Run.create(settings)
    train(settings, healthy)
    assert not any(line["alarm"] for line in lines(healthy, "health"))


def test_the_alarm_goes_on_counting_after_a_resume(config, monkeypatch):
    settings = config()
    run = Run.create(settings)
    interrupt_at(monkeypatch, {5, 12})
    first = Trainer(settings, run, resume=False)
    first.alarm.reference = {"std": 1e6, "effective_rank": 1e6}  # as if it had begun far better than it is
    assert not first.fit()
    assert first.alarm.strikes == 1
    again = Trainer(settings, run, resume=True)
    assert again.alarm == first.alarm
    assert not again.fit()
    assert [(line["step"], bool(line["alarm"])) for line in lines(run, "health")] == [(0, False), (11, True)]


def test_the_guard_of_the_steps_goes_on_after_a_resume(config):
    settings = config(training={"precision": "fp16"})
    first = Trainer(settings, Run.create(settings), resume=False)
    guard = [3.0, 7.0, 512.0, 1234.0]  # bad in a row, bad in all, loss scale, good since it was changed
    assert np.array(first.state.guard).tolist() != guard
    first.state.guard = mx.array(guard)
    first._save()
    assert np.array(Trainer(settings, first.run, resume=True).state.guard).tolist() == guard


@pytest.mark.parametrize("held", [("batches",), ("keys_of",), ("batches", "keys_of")])
def test_the_seed_orders_the_pictures_and_draws_what_is_random_in_a_step(config, monkeypatch, held):
    """Two seeds from the same weights: with one use of the seed held at 0, the other makes it another step."""
    batches, keys_of = trainer.batches, trainer.keys_of
    if "batches" in held:
        monkeypatch.setattr(trainer, "batches", lambda pictures, source, seed, *rest: batches(
            pictures, source, 0, *rest))
    if "keys_of" in held:
        monkeypatch.setattr(trainer, "keys_of", lambda seed: keys_of(0))
    moments: set[int] = set()
    interrupt_at(monkeypatch, moments)
    runs = []
    for seed in (0, 1):
        settings = config(seed=seed, model={"level_weights": "equal"})
        runs.append(Trainer(settings, Run.create(settings), resume=False))
        runs[-1].state = runs[0].step.initial_state()
        moments.add(0)
        assert not runs[-1].fit()
        assert runs[-1].progress["step"] == 1
    one, two = (np.array(at.state.parameters) for at in runs)
    assert (one == two).all() == (len(held) == 2)


def test_after_its_first_step_a_process_keeps_no_more_freed_memory_than_a_step_needs(config, monkeypatch):
    calls, real = [], backend.set_cache_limit

    def watched(gb=None):
        calls.append((at.progress["step"], gb / backend.peak_memory_gb()))
        return real(gb)

    monkeypatch.setattr(backend, "set_cache_limit", watched)
    interrupt_at(monkeypatch, {3, 6})
    settings = config()
    run = Run.create(settings)
    for resume in (False, True):
        at = Trainer(settings, run, resume)
        assert not at.fit()
    assert calls == [(0, pytest.approx(1.2, rel=0.02)), (4, pytest.approx(1.2, rel=0.02))]


def test_gradients_that_stay_infinite_stop_the_run_with_what_to_try(config):
    settings = config(training={"lr": 1e30, "max_bad_steps": 5, "clip": 1e30, "warmup_epochs": 0.0})
    with pytest.raises(UserError, match=r"without a finite gradient[\s\S]*training\.lr"):
        train(settings, Run.create(settings))


def test_resuming_on_other_pictures_is_refused(config):
    settings = config()
    run = Run.create(settings)
    train(settings, run)
    state = run.checkpoint("latest") / "state.json"
    state.write_text(state.read_text().replace(run.environment["dataset"]["fingerprint"], "0" * 64))
    with pytest.raises(UserError, match="fingerprint"):
        train(settings, run, resume=True)


def test_a_second_ctrl_c_exits_at_once(monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with trainer._signals() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGINT)
        assert asked()
        with pytest.raises(SystemExit) as stop:
            signal.raise_signal(signal.SIGINT)
    assert stop.value.code == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_truncate_keeps_what_came_before_the_checkpoint(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"kind": "train", "step": 10}\n{"kind": "train", "step": 20}\n{"kind": "knn", "st')
    truncate(file, 10)
    assert file.read_text() == '{"kind": "train", "step": 10}\n'


def test_ctrl_c_ends_the_command_with_status_0_and_the_way_on(config):
    run = Run.create(config(training={"epochs": 500}))
    command = [sys.executable, "-m", "mlx_hjepa.cli", "train", str(run.config_file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch"):
            process.send_signal(signal.SIGINT)
            break
    said, asked = process.communicate()
    assert "mlx-hjepa train results/tiny-2 --resume" in said
    assert "finishing what runs, then saving" in asked
    assert process.returncode == 0
