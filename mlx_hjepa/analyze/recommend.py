"""What to run next: the command, and why."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx_hjepa
from mlx_hjepa import backend
from mlx_hjepa.analyze.faults import SPEED_FAULTS, Fault, faults, restarted
from mlx_hjepa.analyze.history import History
from mlx_hjepa.analyze.measures import Criterion, Span, no_rise, progress, span, time_left, times_of
from mlx_hjepa.config import Config, ConfigError, load, parse_yaml

Times = Callable[[Config, int], Span | None]  # seconds of a configuration run for so many epochs, if known

BASELINE_HOURS, NIGHT_HOURS = 4, 14
FIRST = "vit_wide_lunch"  # the preset to start with
NEXT = {  # the ladder of presets, files under configs/
    "digits_demo": "vit_tiny_5ep", "vit_tiny_5ep": "vit_tiny_20ep", "vit_tiny_20ep": "vit_small_100ep",
    "vit_wide_20ep": "vit_small_100ep", "vit_wide_lunch": "vit_small_100ep", "vit_small_100ep": "vit_small_300ep",
    "m1_max_quick_val": "compat/m1_max_full_20epoch",
    "m1_max_full_20epoch": "compat/m1_max_full_100epoch",
}
COLOURS = {"augment.jitter": 1.0}  # what keeps long runs learning (docs/results.md, a hundred epochs)
COMPAT = {5: "m1_max_quick_val", 20: "m1_max_full_20epoch", 100: "m1_max_full_100epoch"}


@dataclass
class Recommendation:
    command: str
    why: list[str] = field(default_factory=list)


def preset_file(name: str) -> Path:
    """The file of a preset: from the folder one works in, or from the package's own checkout."""
    for folder in (Path("configs"), Path(mlx_hjepa.__file__).parents[1] / "configs"):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    return Path("configs") / f"{name}.yaml"


def presets() -> dict[str, Config]:
    """Every preset on the ladder that is on this machine."""
    names = sorted({*NEXT, *NEXT.values()} - {*COMPAT.values()} | {f"compat/{name}" for name in COMPAT.values()})
    return {name: config for name in names if (config := _try_load(preset_file(name)))}


def recommend(h: History, where: Path, found: list[Fault], judged: list[Criterion], times: Times | None = None,
              now: float | None = None) -> Recommendation:
    """The next command and why. where: the run's folder, or the log's file; times: seconds of other presets."""
    state, (own, base, unknown) = h.state(now), _setting(h, where)
    failed = {c.name for c in judged if c.passed is False}
    fault = next((f for f in found if f.name not in SPEED_FAULTS), None)
    beside = [f"{f.name}: {f.advice}" for f in found if f.name in SPEED_FAULTS]
    if fault:
        changes, why = remedy(h, fault.name, base)
        if state != "finished":
            stop = "stop this run (Ctrl-C saves it)" if state == "running" else f"{_ended(h, state)}; do not resume it"
            why = [f"{stop}: it will not mend itself", *why]
        if fault.name == "decline" and base is not None:
            why.append(f"{_score(where)} --checkpoint best scores this run at its best")
        return Recommendation(train(own, changes), [*why, *unknown, *beside])
    met = ("not met: " + ", ".join(sorted(failed)) if failed else "too early to judge" if judged[1].passed is None
           else "")
    so_far = [text for text in (met, no_rise(h)) if text] or [
        "it learns" if beside else "it learns, and nothing is wrong"]
    if state != "finished":
        return _unfinished(h, where, own, state, [*so_far, *(unknown if state != "running" else []), *beside])
    if f"{h.measure} down" in failed:
        changes, why = remedy(h, "slow", base)
        return Recommendation(train(own, changes), [f"the {h.measure} fell too little", *why, *unknown, *beside])
    file, changes, why = _next(h, where, times)
    why = [*so_far, *why, *unknown]
    loading = any(f.name == "slow loading" for f in found)
    if file is not None and (loading or ("steady speed" in failed and not beside)):
        extra, reason = _steadier(base, loading)
        changes, why = {**changes, **extra}, [*why, reason]
    if "speed" in failed:
        file = preset_file("vit_tiny_5ep")
        changes = {key: value for key, value in _carried(h.config, file).items() if key != "data.image_size"}
        why = ["under 2.5 it/s: at 32 px and patch 4 there are 64 tokens instead of 196, for the same pictures"]
    if file is None and h.config is not None:
        return Recommendation(_use(h, where)[0], [*why, *beside])
    if file is None and h.pytorch:
        why.append("this is its setting here")
    return Recommendation(train(file or own, changes), [*why, *beside])


def _setting(h: History, where: Path) -> tuple[Path, Config | None, list[str]]:
    """The file to train the run's setting by, what it holds, and a word where that is not known."""
    if h.pytorch:
        own = preset_file("compat/" + COMPAT.get(round((h.total or 0) / (h.epoch_steps or 1)), COMPAT[5]))
        return own, _try_load(own), []
    if h.config is None:  # a log alone, or of another version
        return preset_file(FIRST), None, [
            f"there is no config.yaml to read beside these metrics, so this run's keys are not known; {FIRST} is the "
            "preset to start with"]
    return where / "config.yaml", h.config, []


def _score(where: Path) -> str:
    return f"mlx-hjepa eval {shlex.quote(str(where))} --knn --linear"


def _use(h: History, where: Path) -> tuple[str, str]:
    """The command that a finished run is for, and what to say of it."""
    report = where / "evaluation" / "report.md"
    if h.labelled and not report.is_file():
        return _score(where), f"score this run: {_score(where)}"
    command = f"mlx-hjepa embed {shlex.quote(str(where))} FOLDER --out features.npz"
    return command, f"its scores are in {report}" if h.labelled else f"use this run: {command}"


def _ended(h: History, state: str) -> str:
    return f"{'saved' if state == 'stopped' else 'nothing written any more'} at {progress(h.last_step, h.total)}"


def _unfinished(h: History, where: Path, own: Path, state: str, why: list[str]) -> Recommendation:
    run, ended = shlex.quote(str(where)), _ended(h, state)
    if state == "running":
        left = time_left(h)
        return Recommendation(f"mlx-hjepa watch {run}", [
            "let it go on" + (f", {span(left)} left" if left else ""), *why])
    if h.config is None:
        further = ("this is its setting here, for the original's --resume starts the schedules anew" if h.pytorch else
                   "where its folder is, go on with it: mlx-hjepa train RUN --resume")
        return Recommendation(train(own, {}), [f"{ended}; {further}", *why])
    return Recommendation(f"mlx-hjepa train {run} --resume", [ended, *why])


def train(file: Path, changes: dict[str, Any]) -> str:
    """The command line that trains by a configuration with some keys changed."""
    sets = "".join(f" --set {shlex.quote(f'{key}={value}')}" for key, value in changes.items())
    return f"mlx-hjepa train {shlex.quote(str(file))}{sets}"


def remedy(h: History, fault: str, base: Config | None) -> tuple[dict[str, Any], list[str]]:
    """Which keys to change against a fault, and why: the design note's rules, and what the configuration shows."""
    if base is None:
        return {}, [f"{f.name}: {f.advice}" for f in faults(h) if f.name == fault]
    t = base.training
    if fault == "non-finite" and t.precision == "fp16":
        return {"training.precision": "auto"}, ["non-finite: fp16 overflows where bf16 and fp32 do not"]
    if fault in ("non-finite", "collapse"):
        changes, why = _cause(t)
        return changes, [f"{fault}: {why}"]
    if fault in ("divergence", "unstable lr"):
        if restarted(h):
            return {}, ["unstable lr: the schedule started anew within this run; start a new one"]
        warmup = min(2 * t.warmup_epochs or 1, t.epochs / 2)
        return {"training.lr": _short(t.lr / 2), "training.warmup_epochs": warmup}, [
            f"{fault}: half the learning rate, twice the warm-up (the note's rule)"]
    if fault == "decline":
        best = max(1, round(h.knn_step[h.knn.argmax()] / (h.epoch_steps or 1)))
        if base.augment.jitter < 1:
            return COLOURS, [
                "decline: with colours jittered so the k-NN rose for 85 epochs and more, with 0.4 for 20"]
        shorter = {"training.warmup_epochs": best / 2} if t.warmup_epochs > best / 2 else {}
        return {"training.epochs": best, **shorter}, [f"decline: it was best after {best} epochs"]
    if t.ema[0] >= 0.9999:
        return {"training.ema": "[0.996, 0.9999]"}, [
            f"plateau: training.ema starts at {t.ema[0]:g}, and the target encoder, which is scored, hardly moves"]
    if t.lr * 256 / t.batch <= 1e-3:
        return {"training.lr": _short(1.5 * t.lr), "training.warmup_epochs": t.warmup_epochs / 2}, [
            f"{fault}: 1.5 times the learning rate, half the warm-up (the note's rule)"]
    depths = {level.depth for level in base.model.levels}
    if base.model.depth and len(depths) < base.model.depth:
        weights = {"model.level_weights": "equal"} if isinstance(base.model.level_weights, list) else {}
        return {"model.levels": str(list(range(1, base.model.depth + 1))), **weights}, [
            f"{fault}, and the learning rate is high enough: every block a level gave 2 points of linear accuracy"]
    return {"training.batch": max(1, t.batch // 2)}, [f"{fault}: more, smaller steps, by half the batch"]


def _cause(t: Any) -> tuple[dict[str, Any], str]:
    """The key of the training section that is furthest from any that works; the learning rate if none stands out."""
    if t.ema[0] < 0.99:
        return {"training.ema": f"[0.996, {max(t.ema[1], 0.9995):g}]"}, (
            f"training.ema starts at {t.ema[0]:g}, so the targets follow the context encoder too closely")
    if t.weight_decay > 0.5:
        return {"training.weight_decay": 0.05}, f"training.weight_decay {t.weight_decay:g} pulls all weights to zero"
    changes: dict[str, Any] = {"training.lr": _short(min(t.lr / 3, 1.5e-3))}
    if t.clip > 10:
        changes["training.clip"] = 1.0
    return changes, "a third of the learning rate" + (", at most 1.5e-3" if t.lr > 4.5e-3 else "")


def _steadier(base: Config | None, loading: bool) -> tuple[dict[str, Any], str]:
    if base is not None and base.data.source == "stream" and base.data.dataset != "folder":
        return {"data.source": "resident"}, "unsteady speed: pictures in memory take the loader out of it"
    threads = base.data.threads if base is not None else 4
    if loading:
        return {"data.threads": 2 * threads}, "slow loading: more loader threads read further ahead"
    return {"data.threads": max(1, threads // 2)}, (
        "unsteady speed: fewer loader threads leave cores to the step (the note's rule)")


def _carried(config: Config | None, file: Path) -> dict[str, Any]:
    """The user's own data.* keys and seed, to be set beside another preset's file: those that neither it nor the run's
    own preset has."""
    if config is None:
        return {}
    known = [c for c in (_try_load(file), _preset_of(config)) if c]
    mine = {"seed": config.seed, **{f"data.{key}": value for key, value in config.data}}
    del mine["data.source"]  # each data set has its own, and the batches are the same
    theirs = [{"seed": c.seed, **{f"data.{key}": value for key, value in c.data}} for c in known]
    return {key: value if parse_yaml(str(value)) == value else json.dumps(value)
            for key, value in mine.items() if all(value != other[key] for other in theirs)}


def _preset_of(config: Config) -> Config | None:
    return next((preset for preset in presets().values() if preset.name == config.name), None)


def _next(h: History, where: Path, times: Times | None) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The next rung: file, keys to set, why. No file: the ladder ends here, use the run."""
    epochs = round((h.total or 0) / (h.epoch_steps or 1))
    name = COMPAT.get(epochs, COMPAT[5]) if h.pytorch else h.config.name if h.config else ""
    why = [_use(h, where)[1]] if h.config else []
    own, preset = times_of(h), h.config and _preset_of(h.config)
    if name in NEXT and no_rise(h) is None and not (
            h.config and preset and preset.data.dataset != h.config.data.dataset):
        choice, took = NEXT[name], _took(NEXT[name], times)
        if name == "vit_tiny_5ep":
            took = took or own.get(20)  # the same encoder and pictures
            lunch = _took(FIRST, times)
            if lunch and lunch[1] <= 3600 * BASELINE_HOURS:
                choice, took = FIRST, lunch  # learns more in as many epochs
        if took is None or took[1] <= 3600 * NIGHT_HOURS:
            why.append(f"{choice}: {span(took)} here" if took else f"{choice} is next")
            return preset_file(choice), _carried(h.config, preset_file(choice)), why
        why.append(f"{choice} would take {span(took)} here, more than a night")
    if h.config is None or epochs >= 100:
        return None, {}, why
    longer = 20 if epochs < 20 else 100
    took, there = own.get(longer), "here" if h.device in ("", backend.device()["name"]) else f"on {h.device}"
    colours = COLOURS if longer == 100 and h.config.augment.jitter < 1 else {}
    return where / "config.yaml", {"training.epochs": longer, **colours}, [
        *why, f"the same for {longer} epochs{', colours jittered more,' if colours else ''}"
        + (f": {span(took)} {there}" if took else "")]


def _took(name: str, times: Times | None) -> Span | None:
    config = _try_load(preset_file(name))
    return times(config, config.training.epochs) if times and config else None


def _try_load(file: Path) -> Config | None:
    try:
        return load(file)
    except ConfigError:
        return None


def _short(value: float) -> str:
    return f"{value:.3g}"
