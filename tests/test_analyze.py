"""The analysis: each made fault is named and no other, healthy runs have none, and what is written can be used."""

import io
import json
import math
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mlx_hjepa.analyze import watch as live
from mlx_hjepa.analyze.faults import faults
from mlx_hjepa.analyze.history import read
from mlx_hjepa.analyze.measures import criteria, schedule, seconds_a_step, time_left, times_of, verdict
from mlx_hjepa.analyze.recommend import NEXT, preset_file, presets, recommend, remedy
from mlx_hjepa.analyze.report import analyze, summary
from mlx_hjepa.config import load
from mlx_hjepa.run import Run, UserError
from mlx_hjepa.schedule import Schedule

DATA = Path(__file__).parent / "data"
PRESET = preset_file("vit_tiny_20ep")
START, EPOCH, TOTAL, EVERY = 1.7e9, 195, 3900, 50


def made(folder, steps=TOTAL, end=True, preset=PRESET, knn=True, ratio=None, rate=None, lr=None, peak=None, bad=None,
         probe=None, rank=None, alarm=None, base=lambda step: 0.2, wobble=0.01):
    """A run's folder with a healthy course of 20 epochs, or with some of it replaced by functions of the step."""
    folder.mkdir(parents=True, exist_ok=True)
    config = load(preset)
    (folder / "config.yaml").write_text(config.dump())
    plan, random, clock, lines = Schedule(config.training, EPOCH), np.random.default_rng(0), START, []

    def line(kind, step, **values):
        lines.append(json.dumps({"kind": kind, "step": step, "time": clock, **values}))

    def healthy(step):
        return 0.45 + 1.5 * math.exp(-step / 150)

    line("start", 0, total=TOTAL, epoch_steps=EPOCH, batch=256, precision="fp32", device="made")
    for step in range(0, steps + 1):
        if step % EPOCH == 0:
            line("health", step, epoch=step / EPOCH, loss=[0.1], baseline=[0.2, 0.2], cosine=[0.5, 0.9], std=[0.4, 0.4],
                 effective_rank=[20, (rank or (lambda s: 15 + s / 40))(step)], alarm=alarm(step) if alarm else None)
        if knn and step and step % (5 * EPOCH) == 0:
            score = (probe or (lambda s: 0.3 + 0.2 * s / TOTAL))(step)
            line("knn", step, epoch=step / EPOCH, last=score, levels=score)
        if step and step % EVERY == 0:
            it_s = (rate or (lambda s: 10.0))(step) * (1 + wobble * random.standard_normal())
            clock += EVERY / it_s
            value = (ratio or healthy)(step) * (1 + wobble * random.standard_normal())
            latest = base((step - 1) // EPOCH * EPOCH)
            line("train", step, epoch=step / EPOCH, steps=EVERY, loss=base(step) * value,
                 loss_ratio=base(step) * value / latest,
                 lr=(lr or plan.lr)(step - 1), momentum=plan.momentum(step - 1), it_s=it_s,
                 img_s=256 * it_s, peak_gb=(peak or (lambda s: 5.0))(step), seconds=clock - START,
                 bad=bad(step)[0] if bad else 0, bad_in_a_row=bad(step)[1] if bad else 0)
    if end:
        line("end", steps, finished=steps == TOTAL, seconds=clock - START)
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def names(path):
    return [fault.name for fault in faults(read(path))]


def late(value, otherwise, start=1500):
    """value(step) from `start` on, otherwise(step) before."""
    return lambda step: value(step) if step >= start else otherwise(step)


def falls(step):
    return 0.45 + 1.5 * math.exp(-step / 150)


FAULTS = {
    "divergence": {"ratio": late(lambda s: 0.45 * math.exp((s - 1500) / 1200), falls),
                   "probe": lambda s: 0.4 - 0.1 * (s > 1500)},
    "divergence by k-NN": {"probe": lambda s: 0.5 - 0.1 * (s // 975)},
    "plateau": {"ratio": lambda s: max(0.95, falls(s)), "probe": lambda s: 0.3, "rank": lambda s: 15.0},
    "plateau without labels": {"ratio": lambda s: max(0.95, falls(s)), "knn": False, "rank": lambda s: 15.0},
    "collapse": {"alarm": lambda s: "std 0.0005" if s > 1000 else None, "rank": lambda s: 15.0 if s <= 1000 else 3.0,
                 "ratio": late(lambda s: 2.0, falls), "probe": lambda s: 0.3 - s / 20_000},
    "throttling": {"rate": lambda s: 10.0 - 3.5 * min(1.0, max(0.0, (s - 1000) / 800))},
    "throttling at once": {"rate": lambda s: 10.0 if s < 2000 else 7.0},
    "unstable lr": {"ratio": lambda s: falls(s) * (1.9 if s % 300 == 0 else 1.0)},
    "unstable lr, started anew": {"lr": lambda s: 1e-3 * min(1.0, (s % 2000 + 1) / 400) * (1 - s % 2000 / 2500)},
    "non-finite": {"bad": lambda s: (max(0, s - 2000), max(0, s - 2000))},
    "memory growth": {"peak": lambda s: 5.0 + s / 500},
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_made_fault_is_named_and_no_other(tmp_path, name):
    assert names(made(tmp_path / "run", **FAULTS[name])) == [name.split(",")[0].split(" by")[0].split(" without")[0]
                                                             .split(" at")[0]]


def test_a_made_healthy_run_has_none(tmp_path):
    assert names(made(tmp_path / "run")) == []


@pytest.mark.parametrize("name", ["healthy", "healthy_digits"])
def test_a_real_healthy_run_has_none_at_any_time(tmp_path, name):
    lines = (DATA / f"{name}.jsonl").read_text().splitlines()
    for count in range(1, len(lines) + 1):
        file = tmp_path / "metrics.jsonl"
        file.write_text("\n".join(lines[:count]))
        assert names(file) == [], f"after {count} lines"
    assert verdict([], criteria(read(file))) == "passed"


@pytest.mark.parametrize(("name", "fault"), [("broken_lr_x30", "collapse"), ("broken_ema_0", "collapse"),
                                             ("broken_ema_1", "plateau")])
def test_a_real_broken_run_names_its_fault(name, fault):
    assert names(DATA / f"{name}.jsonl") == [fault]


def test_alarms_on_falling_std_are_no_collapse_while_the_rank_grows(tmp_path):
    assert names(made(tmp_path / "run", alarm=lambda s: "std 0.2, at step 0 0.5" if s > 1000 else None)) == []


def test_the_jump_of_a_new_baseline_is_no_fault(tmp_path):
    folder = made(tmp_path / "run", base=lambda s: 0.2 * math.exp(-min(s, 1500) / 400))
    assert (np.diff(np.log(read(folder).loss_ratio)) > np.log(1.3)).sum() >= 3
    assert names(folder) == []


def test_a_ratio_that_creeps_up_by_a_third_is_no_fault(tmp_path):
    assert names(made(tmp_path / "run", ratio=lambda s: falls(s) + 0.15 * s / TOTAL, knn=False)) == []


def test_a_slow_start_of_frequent_probes_is_no_plateau(tmp_path):
    folder = made(tmp_path / "run", knn=False)
    with open(folder / "metrics.jsonl", "a") as file:
        for step in range(100, 600, 100):
            file.write(json.dumps({"kind": "knn", "step": step, "time": START, "last": 0.3, "levels": 0.3}) + "\n")
    assert names(folder) == []


def test_a_speed_that_comes_and_goes_is_no_throttling(tmp_path):
    folder = made(tmp_path / "run", rate=lambda s: 10.0 if s < 1000 else 6.5 - 2 * math.sin(s / 100))
    assert names(folder) == []


def test_noise_on_the_speed_is_no_throttling(tmp_path):
    folder = made(tmp_path / "run", rate=lambda s: 10.0 if s % 150 else 5.0)
    found = criteria(read(folder))[3]
    assert names(folder) == []
    assert found.passed is False
    assert verdict([], criteria(read(folder))) == "failed: steady speed"


# ---------------------------------------------------------------- unfinished


@pytest.mark.parametrize("lines", [1, 2, 3])
def test_the_first_lines_suffice(tmp_path, lines):
    folder = made(tmp_path / "run", end=False)
    kept = (folder / "metrics.jsonl").read_text().splitlines()[:lines]
    (folder / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    result = analyze(Run(folder), now=START + 10)
    assert result["verdict"] == "too early"
    assert result["state"] == "running"
    assert result["faults"] == []


def test_a_line_cut_by_a_crash_is_left_out(tmp_path):
    folder = made(tmp_path / "run", steps=1000, end=False)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-40])
    assert read(folder).step[-1] == 950
    assert analyze(Run(folder))["recommendation"]["command"] == f"mlx-hjepa train {folder} --resume"


def test_states(tmp_path):
    going = made(tmp_path / "going", steps=1000, end=False)
    stopped = made(tmp_path / "stopped", steps=1000)
    h = read(going)
    assert [h.state(h.written + 500), h.state(h.written + 700)] == ["running", "silent"]
    assert read(stopped).state() == "stopped"
    assert read(made(tmp_path / "done")).state() == "finished"
    with open(stopped / "metrics.jsonl", "a") as file:  # resumed
        file.write(json.dumps({"kind": "resume", "step": 1000, "time": h.written + 60, "total": TOTAL}) + "\n")
    assert read(stopped).state(h.written + 70) == "running"


def test_a_running_run_is_left_alone_and_a_broken_one_is_not(tmp_path):
    going = made(tmp_path / "going", steps=2000, end=False)
    now = read(going).written
    assert analyze(Run(going), now=now)["recommendation"]["command"] == f"mlx-hjepa watch {going}"
    broken = made(tmp_path / "broken", steps=2000, end=False, **FAULTS["collapse"])
    advice = analyze(Run(broken), now=now)["recommendation"]
    assert advice["command"] == f"mlx-hjepa train {broken}/config.yaml --set training.lr=0.0005"
    assert "stop this run" in advice["why"][0]


def test_nothing_to_read(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "other.log").write_text("Starting training...\n")
    for path in (tmp_path / "run", tmp_path / "none.log", tmp_path / "other.log"):
        with pytest.raises(UserError, match=r"no metrics yet|neither|no training lines"):
            read(path)


# ---------------------------------------------------------------- numbers


def test_times_are_those_of_the_runs_own_clock(tmp_path):
    folder = made(tmp_path / "run", steps=1950, end=False, wobble=0)
    h = read(folder)
    assert seconds_a_step(h) == pytest.approx((0.1, 0.1, 0.1))
    assert times_of(h)[20] == pytest.approx((390,) * 3, rel=0.01)
    assert time_left(h)[1] == pytest.approx(195)


def test_times_of_a_throttled_run_are_those_of_its_slower_rate(tmp_path):
    assert seconds_a_step(read(made(tmp_path / "run", **FAULTS["throttling"])))[1] == pytest.approx(1 / 6.5, rel=0.03)


def test_a_rate_taken_across_a_checkpoint_is_not_believed(tmp_path):
    folder = made(tmp_path / "run")
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line.get("step") == 1000 and line["kind"] == "train":
            line |= {"it_s": 25.0}
        if line.get("step") == 950 and line["kind"] == "train":
            line |= {"it_s": 1.1, "steps": 10}
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rate = read(folder).rates()[1]
    assert rate.min() > 9
    assert rate.max() < 11


def test_schedule_facts(tmp_path):
    facts = schedule(read(made(tmp_path / "run", steps=150, end=False)))
    assert facts["warmup"] == 390
    assert facts["ema_half_life"] == pytest.approx(math.log(0.5) / math.log(facts["momentum"]))
    assert 170 < facts["ema_half_life"] < 180


def test_the_notes_speed_is_asked_for_at_its_own_setting_only(tmp_path):
    slow = {"steps": 1000, "rate": lambda s: 2.0}
    note = criteria(read(made(tmp_path / "note", preset=preset_file("compat/m1_max_quick_val"), **slow)))[0]
    ours = criteria(read(made(tmp_path / "ours", **slow)))[0]
    assert (note.passed, ours.passed) == (False, None)
    assert "img/s" in ours.found


def test_the_loss_must_fall_by_a_fifth_from_its_first_steps(tmp_path):
    held = criteria(read(made(tmp_path / "run", ratio=lambda s: 1.0 - 0.15 * s / TOTAL, wobble=0)))[1]
    assert held.passed is False
    assert "15 %" in held.found
    assert criteria(read(made(tmp_path / "fell")))[1].passed is True


# ---------------------------------------------------------------- what next


def command_loads(command):
    """A recommended training command, taken at its word: its file and its keys must load."""
    words = shlex.split(command)
    assert words[:2] == ["mlx-hjepa", "train"]
    return load(words[2], [words[i + 1] for i, word in enumerate(words) if word == "--set"])


def test_every_rung_of_the_ladder_is_a_preset():
    for name in NEXT.values():
        assert preset_file(name).is_file()
    assert {config.name for config in presets().values()} >= {Path(name).name for name in NEXT.values()}


def test_a_healthy_run_climbs(tmp_path):
    tiny = made(tmp_path / "tiny", preset=preset_file("vit_tiny_5ep"))
    assert "vit_tiny_20ep.yaml" in analyze(Run(tiny))["recommendation"]["command"]
    fast, slow, endless = (lambda c, n, t=t: (t, t, t) for t in (3600, 5 * 3600, 1e6))
    assert "vit_wide_20ep.yaml" in analyze(Run(tiny), fast)["recommendation"]["command"]
    assert "vit_tiny_20ep.yaml" in analyze(Run(tiny), slow)["recommendation"]["command"]
    done = made(tmp_path / "done")
    assert "vit_small_100ep.yaml" in analyze(Run(done), fast)["recommendation"]["command"]
    longer = analyze(Run(done), endless)["recommendation"]["command"]
    assert f"{done}/config.yaml" in longer
    assert command_loads(longer).training.epochs == 100
    top = made(tmp_path / "top", preset=preset_file("vit_small_100ep"))
    lines = (top / "metrics.jsonl").read_text().replace(f'"epoch_steps": {EPOCH}', f'"epoch_steps": {EPOCH // 5}')
    (top / "metrics.jsonl").write_text(lines)
    assert analyze(Run(top))["recommendation"]["command"].startswith("mlx-hjepa eval ")


@pytest.mark.parametrize(("fault", "key", "better"), [
    ("collapse", "lr", lambda a, b: b < a), ("divergence", "lr", lambda a, b: b == a / 2),
    ("non-finite", "lr", lambda a, b: b < a), ("plateau", "lr", lambda a, b: b >= a)])
def test_remedies_change_keys_that_exist(tmp_path, fault, key, better):
    folder = made(tmp_path / "run", **FAULTS[fault])
    before = load(folder / "config.yaml").training
    after = command_loads(analyze(Run(folder))["recommendation"]["command"]).training
    assert better(getattr(before, key), getattr(after, key))


def test_remedies_see_what_stands_out(tmp_path):
    h = read(made(tmp_path / "run", **FAULTS["collapse"]))
    assert list(remedy(h, "collapse", load(PRESET, ["training.ema=[0, 0]"]))[0]) == ["training.ema"]
    assert list(remedy(h, "collapse", load(PRESET, ["training.weight_decay=5"]))[0]) == ["training.weight_decay"]
    assert remedy(h, "collapse", load(PRESET, ["training.lr=0.06"]))[0] == {"training.lr": "0.0015"}
    assert list(remedy(h, "plateau", load(PRESET, ["training.ema=[1, 1]"]))[0]) == ["training.ema"]
    slow = remedy(h, "plateau", load(PRESET, ["training.lr=1e-4"]))[0]
    assert slow == {"training.lr": "0.00015", "training.warmup_epochs": 1.0}  # the note's rule
    assert remedy(h, "divergence", load(PRESET))[0] == {"training.lr": "0.00075", "training.warmup_epochs": 4.0}


# ---------------------------------------------------------------- the PyTorch original's log

LOG = """INFO - Using device: mps
Training:
  Epochs: 2
  Batch size: 32
\rEpoch 1/2:   0%|          | 0/200 [00:00<?, ?it/s]\
\rEpoch 1/2:   0%|          | 0/200 [00:01<?, ?it/s, loss=0.0077, lr=0.00e+00]\
\rEpoch 1/2:  12%|█▎        | 25/200 [00:08<00:54,  3.20it/s, loss=0.0077, lr=0.00e+00]\
\rEpoch 1/2:  25%|██▌       | 50/200 [00:16<00:46,  3.24it/s, loss=0.0057, lr=2.50e-05]\
\rEpoch 1/2:  50%|█████     | 100/200 [01:56<03:20,  2.00s/it, loss=0.0048, lr=5.00e-05]\
\rEpoch 1/2:  75%|███████▌  | 150/200 [02:12<00:16,  3.12it/s, loss=0.0045, lr=7.50e-05]
\rEpoch 1/2: 100%|██████████| 200/200 [02:28<00:00,  3.12it/s, loss=0.0045, lr=7.50e-05]
\rEpoch 2/2:   0%|          | 0/200 [00:00<?, ?it/s, loss=0.0044, lr=1.00e-04]\
\rEpoch 2/2:  25%|██▌       | 50/200 [00:16<00:46,  3.20it/s, loss=0.0043, lr=9.00e-05]"""


def test_the_original_log(tmp_path):
    file = tmp_path / "training_run.log"
    file.write_text(LOG)
    h = read(file)
    assert h.step.tolist() == [0, 50, 100, 150, 200, 250]  # over epochs, each loss once
    assert h.loss.tolist() == [0.0077, 0.0057, 0.0048, 0.0045, 0.0044, 0.0043]
    assert h.it_s[1:].tolist() == pytest.approx([3.22, 0.5, 3.12, 3.12, 3.2])
    assert h.seconds.tolist() == [1, 16, 116, 132, 148, 164]
    assert (h.total, h.epoch_steps, h.batch, h.pytorch) == (400, 200, 32, True)
    result = analyze(file)
    assert result["loss"]["judged"] == "raw loss"
    assert [c["passed"] for c in result["criteria"][:3]] == [True, True, None]
    assert "raw loss alone" in (tmp_path / "training_run_analysis" / "validation_report.md").read_text()


def test_a_finished_original_log_recommends_the_next_preset(tmp_path):
    file = tmp_path / "run.log"
    file.write_text(LOG.replace("/2:", "/5:") + "\nINFO - Training completed!\n")
    assert read(file).state() == "finished"
    assert "compat/m1_max_full_20epoch.yaml" in analyze(file)["recommendation"]["command"]


def test_a_diverging_original_log_is_named_with_its_caveat(tmp_path):
    file = tmp_path / "run.log"
    file.write_text("\r".join(f"Epoch 1/5:  10%|█ | {50 * i}/1562 [00:{i:02d}<10:00,  3.20it/s, "
                              f"loss={0.004 + 0.0006 * max(0, i - 8):.4f}, lr=1.{i:02d}e-05]" for i in range(1, 20)))
    found = faults(read(file))
    assert [fault.name for fault in found] == ["divergence"]
    assert "no baseline" in found[0].evidence
    judged = criteria(read(file))
    assert "training.lr=5e-05" in recommend(read(file), file, found, judged).command


# ---------------------------------------------------------------- files, live view


def test_the_analysis_is_written(tmp_path):
    folder = made(tmp_path / "run", **FAULTS["throttling"])
    result = analyze(Run(folder), times=lambda config, epochs: (epochs, 2 * epochs, 3 * epochs))
    out = folder / "analysis"
    assert {file.name for file in out.iterdir()} == {"validation_report.md", "validation_training_curves.png",
                                                     "analysis.json"}
    assert json.loads((out / "analysis.json").read_text()) == json.loads(json.dumps(result))
    assert (out / "validation_training_curves.png").read_bytes()[:4] == b"\x89PNG"
    text = (out / "validation_report.md").read_text()
    for part in ("throttling", "slowly", result["recommendation"]["command"], "vit_small_100ep", "half-life"):
        assert part in text
    assert any("fault: throttling" in line for line in summary(result))


def test_watch_says_each_line_and_analyses_at_the_end(tmp_path, monkeypatch):
    source, folder = made(tmp_path / "source"), tmp_path / "run"
    lines = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
    folder.mkdir()
    shutil.copy(source / "config.yaml", folder)
    said = []

    def write_on(_):
        text = "".join(lines[:30 * (len(said) + 1)]) if said or (folder / "metrics.jsonl").exists() else lines[0]
        (folder / "metrics.jsonl").write_text(text)

    monkeypatch.setattr(live.time, "sleep", write_on)
    monkeypatch.setattr(live.time, "time", lambda: START + 1)
    result = live.watch(Run(folder), say=said.append, console=Console(file=io.StringIO()))
    assert result["state"] == "finished"
    assert said[0].startswith("epoch ")
    assert "left" in said[0]
    assert any(line.startswith("next: mlx-hjepa train") for line in said)


def test_watch_on_a_terminal(tmp_path, monkeypatch):
    folder = made(tmp_path / "run", steps=2000, end=False, **FAULTS["collapse"])
    screen, said, h = io.StringIO(), [], read(folder)
    now = [h.written]
    monkeypatch.setattr(live.time, "time", lambda: now[0])
    monkeypatch.setattr(live.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + 400))
    result = live.watch(Run(folder), say=said.append, console=Console(file=screen, force_terminal=True, width=150))
    assert result["state"] == "silent"
    assert "collapse" in screen.getvalue()
    assert "█" in screen.getvalue()
    assert any(line.startswith("fault: collapse") for line in said)


def test_watch_gives_up_on_what_never_writes_and_lets_go_on_ctrl_c(tmp_path, monkeypatch):
    folder = made(tmp_path / "run", steps=1000, end=False)
    now = [read(folder).written]
    monkeypatch.setattr(live.time, "time", lambda: now[0])

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(live.time, "sleep", interrupt)
    said = []
    assert live.watch(Run(folder), say=said.append, console=Console(file=io.StringIO())) is None
    assert said[-1] == "no longer watching; the run goes on"
    monkeypatch.setattr(live.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + 400))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no metrics yet"):
        live.watch(Run(tmp_path / "empty"), console=Console(file=io.StringIO()))


def test_the_script_is_the_command(tmp_path):
    command = tmp_path / "mlx-hjepa"
    command.write_text('#!/bin/sh\necho "$@"\n')
    command.chmod(0o755)
    script = Path(__file__).parents[1] / "tools" / "watch_and_recommend.sh"
    done = subprocess.run([script, "results/a run"], capture_output=True, text=True, check=True,
                          env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.stdout == "watch results/a run\n"
