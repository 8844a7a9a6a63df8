"""The loop's parts, each seen to do what it says on tiny runs of the digits."""

import json
import os
import shutil
import signal
import time

import mlx.core as mx
import numpy as np
import pytest

from mlx_hjepa import backend
from mlx_hjepa.analyze import timing
from mlx_hjepa.config import Config, Data, Level, Model, Section
from mlx_hjepa.data.dataset import validation_split
from mlx_hjepa.run import Run, UserError
from mlx_hjepa.train import checkpoint, trainer
from mlx_hjepa.train.step import Step
from mlx_hjepa.train.trainer import Trainer, train

STEPS = 44


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(tiny_config):
    def build(**changes):
        values = {"training": {"batch": 64, "epochs": 2}, "augment": {"flip": False},
                  "logging": {"every_steps": 10, "health_every": 0.5, "knn_every": 1},
                  "checkpoints": {"every_minutes": 60, "every_epochs": 1, "keep": 3}}
        for section, keys in changes.items():
            values[section] = {**values.get(section, {}), **keys} if isinstance(keys, dict) else keys
        return tiny_config(**values)
    return build


def lines(run, kind):
    return [line for line in map(json.loads, run.metrics_file.read_text().splitlines()) if line["kind"] == kind]


def finished(settings):
    run = Run.create(settings)
    assert train(settings, run)
    return run


def test_the_step_is_traced_once_in_a_whole_run_and_after_a_resume(config):
    settings = config(model={"level_weights": "balanced"})
    run = finished(settings)
    shutil.rmtree(run.checkpoints / "step-000000044")  # as if killed at the end of the first epoch
    again = Trainer(settings, run, resume=True)
    assert again.progress["step"] == 22
    assert again.fit()
    assert again.step.traces == {"step": 1, "part": 0, "update": 0, "health": 1}


def test_training_and_its_timing_take_both_cores(config, two_cores, monkeypatch):
    gradient, streams, settings = Step._gradient, [], config()
    monkeypatch.setattr(Step, "_gradient", lambda *a: streams.append(len(backend.streams())) or gradient(*a))
    finished(settings)
    beat = timing.pulses(settings, Step)
    next(beat)
    beat.close()
    assert streams == [2, 2]
    assert len(backend.streams()) == 1


def test_the_device_is_read_only_for_log_lines(config, monkeypatch):
    read, array = [], np.array

    def counted(x, *rest, **more):
        if isinstance(x, mx.array) and x.ndim == 2 and x.shape[1] == 7:  # rows of statistics
            read.append(len(x))
        return array(x, *rest, **more)

    monkeypatch.setattr(trainer.np, "array", counted)
    run = finished(config(logging={"every_steps": 20, "knn_every": 0}, checkpoints={"every_epochs": 0}))
    assert read == [20, 20, 4]
    assert [line["steps"] for line in lines(run, "train")] == [20, 20, 4]


def test_log_lines_are_means_and_the_ratio_is_over_the_baseline(config):
    settings = config(logging={"every_steps": 1})
    each = [line["loss"] for line in lines(finished(settings), "train")]
    mean = lines(finished(config()), "train")[0]
    assert mean["loss"] == pytest.approx(np.mean(each[:10]), rel=1e-4)
    start = lines(finished(config()), "health")[0]
    assert mean["loss_ratio"] == pytest.approx(mean["loss"] / np.mean(start["baseline"]), rel=1e-4)
    assert 0 <= mean["wait_s"] < 1
    across = lines(finished(config(logging={"every_steps": 22})), "train")[0]  # a check at step 11 renews the baseline
    guess = [np.mean(line["baseline"]) for line in lines(finished(config()), "health")[:2]]
    assert across["loss_ratio"] == pytest.approx(across["loss"] / np.mean(guess), rel=1e-4)


def test_balanced_levels_weigh_one_over_their_baseline(config):
    at = Trainer(config(model={"level_weights": "balanced"}), Run.create(config()), False)
    assert at._level_weights([0.5, 0.25]) == [2.0, 4.0]
    assert at._level_weights(None) == [1.0, 1.0]


def test_probe_and_health_look_at_the_target_encoder_and_at_the_pictures_held_out(config, monkeypatch):
    settings, seen = config(), []
    at = Trainer(settings, Run.create(settings), False)
    held = validation_split(len(at.data.train), settings.data.split_seed)[1]
    monkeypatch.setattr(at, "_features", lambda indices: seen.append(indices) or np.random.default_rng(0).normal(
        size=(len(indices), 2, 32)).astype(np.float32))
    at.log = type("Silent", (), {"record": lambda *a, **k: None, "line": lambda *a: None})()
    at._check_health(0)
    assert (seen[0] == held).all()
    at._probe(0)
    assert not set(seen[1]) & set(held)
    assert (seen[2] == held).all()
    at.state.target = at.state.target + 1
    weights = at._weights()["blocks.0.attn.qkv.bias"]
    assert float(weights[0]) == 1.0, "not the context encoder's, which begin at 0"


@pytest.mark.parametrize("source", ["stream", "resident"])
def test_pictures_held_out_are_never_trained_on_and_all_others_are(config, monkeypatch, capsys, source):
    settings, seen, advance = config(data={"hold_out": True, "source": source}), set(), Trainer._advance
    monkeypatch.setattr(Trainer, "_advance", lambda self, step, images: seen.update(
        picture.tobytes() for picture in np.array(images)) or advance(self, step, images))
    at = Trainer(settings, Run.create(settings), False)
    held = validation_split(len(at.data.train), 0)[1]
    assert at.fit()
    assert lines(at.run, "end")[0]["step"] == 2 * ((1437 - 143) // 64)
    printed = {place: picture.tobytes() for place, picture in enumerate(at.data.train.images)}
    twice = {picture for picture in printed.values() if list(printed.values()).count(picture) > 1}
    assert not {printed[place] for place in held} - twice & seen
    left_out = [place for place in at.rows if printed[place] not in seen]
    assert len(left_out) < 64  # the tails of the two epochs have few in common
    assert len(at.rows) == 1437 - 143
    assert "1,294 pictures of" in (said := capsys.readouterr().out)
    assert "on 143 pictures held out" in said


def test_checkpoints_by_the_minute_hold_the_configuration_and_only_the_last_are_kept(config):
    settings = config(checkpoints={"every_minutes": 1e-9, "every_epochs": 0, "keep": 2}, logging={"knn_every": 0})
    run = finished(settings)
    kept = sorted(folder.name for folder in run.checkpoints.glob("step-*"))
    assert kept == ["step-000000043", "step-000000044"]
    state = json.loads((run.checkpoints / kept[1] / "state.json").read_text())
    assert state["config"] == settings.model_dump(mode="json")


def test_a_resume_takes_the_newest_sound_checkpoint_and_says_what_it_passes_over(config, capsys):
    settings = config()
    run = finished(settings)
    (run.checkpoints / "latest").unlink()
    damaged = run.checkpoints / "step-000000044" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    assert train(settings, run, resume=True)
    out = capsys.readouterr().out
    assert f"passed over: {damaged}: damaged" in out
    assert "resumed at step 22 of 44" in out
    assert "nothing left to do" not in out
    assert train(settings, run, resume=True)
    assert ", nothing left to do. Score it" in capsys.readouterr().out
    assert [line["step"] for line in lines(run, "train")][-1] == STEPS


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(config):
    settings = config()
    run = finished(settings)
    before = run.metrics_file.read_text()
    for folder in run.checkpoints.glob("step-*"):
        shutil.rmtree(folder)
    with pytest.raises(UserError, match="its checkpoints were removed"):
        train(settings, run, resume=True)
    assert run.metrics_file.read_text() == before


def test_a_run_killed_before_its_first_checkpoint_starts_again_and_says_so(config):
    said = []
    assert checkpoint.newest(Run.create(config()), said.append) is None
    assert "starts at step 0" in said[0]


def test_a_class_the_bank_lacks_costs_the_probe_and_not_the_run(config, monkeypatch):
    def no_class(*_, **__):
        raise UserError("class 'x' has no picture in the bank")
    monkeypatch.setattr(trainer, "knn_accuracy", no_class)
    run = finished(config())
    assert lines(run, "knn") == []
    assert run.log_file.read_text().count("no online k-NN in this run: class 'x'") == 1


def test_features_that_are_no_longer_finite_stop_the_run_and_its_log_says_so(config):
    settings = config(training={"lr": 1e30, "clip": 1e30, "warmup_epochs": 0.0, "max_bad_steps": 1000})
    run = Run.create(settings)
    with pytest.raises(UserError, match=r"no longer finite: training stopped at step 11, no checkpoint yet"):
        train(settings, run)
    end = lines(run, "end")[-1]
    assert not end["finished"]
    assert "no longer finite" in end["failed"]
    assert "no longer finite" in run.log_file.read_text()


def test_too_few_pictures_are_refused(config, monkeypatch):
    monkeypatch.setattr(trainer, "FEWEST_PICTURES", 2000)
    with pytest.raises(UserError, match="1437 training pictures are too few"):
        Trainer(config(), Run.create(config()), False)


def test_what_slows_a_run_is_said_at_its_start_or_when_it_happens(config, monkeypatch):
    monkeypatch.setattr(backend, "on_battery", lambda: True)
    monkeypatch.setattr(backend, "slow_heads", lambda width: f"model.head_dim {width} is slow")
    monkeypatch.setattr(trainer.Pace, "slowed", lambda self, rate: True)
    monkeypatch.setattr(trainer.Pace, "usual", 1e6)
    text = finished(config()).log_file.read_text()
    assert "running on battery" in text
    assert "model.head_dim 16 is slow" in text
    assert "slower than at the start" in text
    assert text.count("before the first step: features of 143 held-out pictures ...") == 1


def test_an_epoch_of_few_steps_is_said_at_the_start(config, monkeypatch):
    for few, said in ((1000, True), (1, False)):
        monkeypatch.setattr(trainer, "FEW_STEPS", few)
        assert ("a smaller training.batch suits so few" in finished(config()).log_file.read_text()) is said


def test_an_interrupted_run_prints_the_command_that_goes_on(config, monkeypatch, capsys):
    settings = config()
    run = Run.create(settings)
    monkeypatch.setattr(trainer, "_signals", lambda: trainer.contextmanager(lambda: iter([lambda: True]))())
    assert not train(settings, run)
    assert f"Go on with: mlx-hjepa train {run.folder} --resume" in capsys.readouterr().out


def test_every_key_is_read_by_a_run(config, monkeypatch):
    read, get = set(), Section.__getattribute__

    def recorded(self, name):
        if name in type(self).model_fields:
            read.add((type(self), name))
        return get(self, name)

    runs = [config(training={"epochs": 1}),
            config(training={"epochs": 1, "accumulation": 2}, augment={"crop": "pad"}, masking={"select": "blocks"})]
    monkeypatch.setattr(Section, "__getattribute__", recorded)
    for settings in runs:
        finished(settings)
    sections = [field.annotation for field in Config.model_fields.values()
                if isinstance(field.annotation, type) and issubclass(field.annotation, Section)]
    keys = {(section, key) for section in [Config, Level, *sections] for key in section.model_fields}
    assert len(keys) > 60
    of_other_data, resolved_by_config = {(Data, "root"), (Data, "on_corrupt")}, {(Model, "size")}
    assert {f"{section.__name__}.{key}" for section, key in keys - read - of_other_data - resolved_by_config} == set()


def test_bad_steps_between_log_lines_are_shown_and_a_run_of_them_stops_the_run(config, monkeypatch, capsys):
    scalars = trainer.Step.scalars
    monkeypatch.setattr(trainer.Step, "scalars", lambda self, step, weights: scalars(
        self, step, [float("nan")] * len(weights) if 3 <= step < 10 else weights))
    run = finished(config(logging={"every_steps": 22}))
    assert [(line["bad"], line["bad_in_a_row"]) for line in lines(run, "train")] == [(7, 7), (7, 0)]
    assert "  7 skipped  " in capsys.readouterr().out
    settings = config(logging={"every_steps": 22}, training={"max_bad_steps": 5})
    with pytest.raises(UserError, match="7 steps in a row without a finite gradient"):
        train(settings, Run.create(settings))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_data_are_read_ends_quietly(config, monkeypatch, capsys, number):
    def slow(*_, **__):
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError

    monkeypatch.setattr(trainer, "load_dataset", slow)
    before = signal.getsignal(signal.SIGTERM)
    settings = config()
    assert not train(settings, Run.create(settings))
    assert "stopped before the first step" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_resumed_run_still_knows_its_health(config):
    settings = config()
    run = finished(settings)
    shutil.rmtree(run.checkpoints / "step-000000044")
    last = [line for line in lines(run, "health") if line["step"] <= 22][-1]
    words = Trainer(settings, run, resume=True)._health_words()
    assert words == f"rank {last['effective_rank'][-1]:.0f} std {last['std'][-1]:.2f}"


def test_a_machine_that_is_unplugged_on_the_way_says_so_once(config, monkeypatch, capsys):
    states = iter([False, False, True, True])
    monkeypatch.setattr(backend, "on_battery", lambda: next(states, True))
    finished(config())
    assert capsys.readouterr().out.count("warning: running on battery") == 1
