"""The analysis of a run, written beside it: a report, curves, and the same as JSON."""

from __future__ import annotations

import io
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from mlx_hjepa.analyze.faults import faults, noise
from mlx_hjepa.analyze.history import History, read
from mlx_hjepa.analyze.measures import (
    EPOCHS,
    criteria,
    loss_change,
    progress,
    schedule,
    span,
    speed,
    time_left,
    times_of,
    verdict,
)
from mlx_hjepa.analyze.projection import times_from
from mlx_hjepa.analyze.recommend import Times, presets, recommend
from mlx_hjepa.run import Run, write_atomically

MARK = {True: "yes", False: "NO", None: "-"}


def analyze(source: Run | Path, times: Times | None = None, now: float | None = None) -> dict[str, Any]:
    """Judge a run, going on, ended or crashed, or a console log of the PyTorch original. Raises UserError.

    Writes validation_report.md, validation_training_curves.png and analysis.json to the run's analysis/, for published
    weights to one under results/, or beside a log to <log>_analysis/, and returns what the JSON holds. times: (config,
    epochs) -> (low, mid, high) seconds, for the other presets.
    """
    where = source.folder if isinstance(source, Run) else Path(source)
    if where == (run := Run(where.parent)).metrics_file and run.config_file.is_file():
        where = run.folder  # with all that it tells beside its metrics
    h = read(where)
    result = judge(h, where, times, now)
    out = Run(where).scored.with_name("analysis") if where.is_dir() else where.with_name(f"{where.stem}_analysis")
    out.mkdir(parents=True, exist_ok=True)
    files = {name: out / name for name in ("validation_report.md", "validation_training_curves.png", "analysis.json")}
    result["files"] = [str(file) for file in files.values()]
    write_atomically(files["validation_training_curves.png"], curves(h))
    write_atomically(files["validation_report.md"], report(h, result))
    write_atomically(files["analysis.json"], json.dumps(result, indent=1, allow_nan=False))
    return result


def judge(h: History, where: Path, times: Times | None = None, now: float | None = None) -> dict[str, Any]:
    """Everything that the report says, as plain values."""
    found, held = faults(h), criteria(h)
    change, each, rate = loss_change(h), {"this run": times_of(h)}, speed(h)
    source = "the throughput benchmark" if times else "this run's speed and the FLOPs of a step"
    others = times or (times_from(h.config, 1 / rate["it_s"]) if h.config and rate["it_s"] else None)
    if others:
        each |= {name: {n: t for n in EPOCHS if (t := others(config, n))} for name, config in presets().items()}
    result = {
        "run": h.name, "source": "PyTorch log" if h.pytorch else "metrics.jsonl", "device": h.device,
        "generated": time.strftime("%Y-%m-%d %H:%M:%S"), "state": h.state(now), "verdict": verdict(found, held),
        "criteria": [asdict(c) for c in held], "faults": [asdict(f) for f in found],
        "recommendation": asdict(recommend(h, where, found, held, times, now)),
        "loss": {"judged": h.measure, "first_steps": change and change[0], "now": change and change[1],
                 "noise": noise(h)},
        "knn": {"step": h.knn_step, "levels": h.knn, "last": h.knn_last},
        "health": {"step": h.health_step, "std": h.std, "effective_rank": h.rank, "cosine": h.cosine,
                   "baseline": h.baseline, "alarm": h.alarm},
        "speed": rate, "schedule": schedule(h), "seconds_left": time_left(h), "seconds": each,
        "seconds_from": source,
    }
    return _plain(result)


def _plain(value: Any) -> Any:
    """For JSON: lists for arrays, null for what is not finite, 6 digits."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


# ---------------------------------------------------------------- what is read


def summary(result: dict[str, Any]) -> list[str]:
    """The lines for a terminal: state, criteria, faults, what next."""
    at = progress(result["schedule"]["step"], result["schedule"]["total"])
    lines = [f"{result['run']}: {result['state']} at {at}; {result['verdict']}"]
    lines += [f"  {MARK[c['passed']]:>3}  {c['name']}: {c['found']} (asked: {c['required']})"
              for c in result["criteria"]]
    lines += [f"fault: {f['name']}: {f['evidence']}" for f in result["faults"]]
    return [*lines, "next: " + result["recommendation"]["command"],
            *(f"  {reason}" for reason in result["recommendation"]["why"])]


def report(h: History, result: dict[str, Any]) -> str:
    """validation_report.md."""
    advice = result["recommendation"]
    faulty = [f"- **{f['name']}**: {f['evidence']}. {f['advice'][0].upper()}{f['advice'][1:]}."
              for f in result["faults"]]
    parts = [
        f"# {result['run']}: {result['verdict']}",
        f"{result['state']} at {progress(h.last_step, h.total)}; {result['device'] or 'unknown device'}; "
        f"analysed {result['generated']} from {result['source']}.",
        "## Next", f"```\n{advice['command']}\n```", "\n".join(f"- {reason}" for reason in advice["why"]),
        "## Criteria", _table(["", "asked", "found", "met"], [
            [c["name"], c["required"], c["found"], MARK[c["passed"]]] for c in result["criteria"]]),
        "## Faults", "\n".join(faulty) or "None.", "## Learning", _learning(h, result), "## Speed", _speed(h, result),
        "## Schedule", _schedule(h, result["schedule"]), "## Times", _times(result),
        "![curves](validation_training_curves.png)"]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _learning(h: History, result: dict[str, Any]) -> str:
    loss, lines = result["loss"], []
    if loss["now"] is not None:
        scatter = "" if loss["noise"] is None else f", scatter {100 * loss['noise']:.1f} % from line to line"
        lines.append(f"- {h.measure}: {loss['first_steps']:.4g} over the first steps, {loss['now']:.4g} now{scatter}")
    if h.pytorch:
        lines.append("- this log holds the raw loss alone. It may rise while features improve and fall while they "
                     "collapse; without baseline, k-NN or feature statistics neither can be told")
    if len(h.knn):
        lines.append("- online k-NN (levels): " + ", ".join(
            f"{100 * score:.1f} % at step {step:,.0f}" for step, score in zip(h.knn_step, h.knn, strict=True)))
    if len(h.health_step):
        lines.append(f"- deepest level, step {h.health_step[0]:,.0f} to {h.health_step[-1]:,.0f}: std {h.std[0]:.3g} "
                     f"to {h.std[-1]:.3g}, effective rank {h.rank[0]:.1f} to {h.rank[-1]:.1f}, cosine of prediction "
                     f"and target {h.cosine[-1]:.3f}, smallest baseline {np.nanmin(h.baseline):.2g}")
    return "\n".join(lines) or "Nothing to judge yet."


def _speed(h: History, result: dict[str, Any]) -> str:
    s = result["speed"]
    if s["it_s"] is None:
        return "Not known yet."
    return (f"{s['it_s']:.2f} it/s" + (f", {s['img_s']:,.0f} img/s" if s["img_s"] else "")
            + (f", varies by {100 * s['variation']:.0f} %" if s["variation"] is not None else "")
            + (f", peak memory {np.nanmax(h.peak_gb):.2f} GB" if np.isfinite(h.peak_gb).any() else "")
            + (f". {s['cause']}" if s["cause"] else "") + ".")


def _schedule(h: History, s: dict[str, Any]) -> str:
    lines = []
    if s["lr"] is not None:
        lines.append(f"- learning rate {s['lr']:.2e}, at most {s['lr_peak']:.2e} so far" + (
            "" if s["warmup"] is None else f"; in warm-up until step {s['warmup']:,}" if s["step"] < s["warmup"] else
            f"; warm-up ended at step {s['warmup']:,}"))
    if s["momentum"] is not None:
        half = s["ema_half_life"]
        lines.append(f"- EMA momentum {s['momentum']:g}: the target encoder's half-life is " + (
            "without end, it stands still" if half is None else f"{half:,.0f} steps" + (
                f", {100 * half / s['total']:.1f} % of the run" if s["total"] else "")))
    if h.state() == "running" and (left := time_left(h)):
        lines.append(f"- {span(left)} left")
    return "\n".join(lines) or "Not in what was written."


def _times(result: dict[str, Any]) -> str:
    rows = [[name, *(span(each[str(n)]) for n in EPOCHS)] for name, each in result["seconds"].items() if each]
    if not rows:
        return "The rate is not known yet."
    return _table(["", *(f"{n} epochs" for n in EPOCHS)], rows) + (
        "\n\nThis run's from its own clock, checks and checkpoints included"
        + (f"; the others' from {result['seconds_from']}." if len(rows) > 1 else "."))


def curves(h: History) -> bytes:
    """validation_training_curves.png: what is judged, learning rate, speed, health."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    loss, lr, pace, health = axes.flat
    loss.plot(h.step, h.judged, label=h.measure)
    if not h.pytorch:
        loss.set_ylim(0, 2)  # the first steps predict nothing yet and would hide the rest
    lr.plot(h.step, h.lr, color="C2")
    if (h.lr > 0).any():
        lr.set_yscale("log")
    step, rate, _ = h.rates()
    pace.plot(h.step, np.where(np.isin(h.step, step), h.it_s, np.nan), ".", color="C1", markersize=4)
    now = speed(h)["it_s"]
    if now:
        pace.axhline(now, color="C3", linestyle="--", label=f"now {now:.2f} it/s")
        pace.set_ylim(0, 1.15 * rate.max())
        pace.legend(fontsize=8, loc="lower right")
    health.plot(h.health_step, h.std, "o-", label="std of features", markersize=3)
    health.plot(h.knn_step, h.knn, "s-", label="online k-NN", markersize=3)
    beside = health.twinx()
    beside.plot(h.health_step, h.rank, "^-", color="C4", label="effective rank (right)", markersize=3)
    for axis, label in ((loss, h.measure), (lr, "learning rate"), (pace, "steps / s"), (health, "health")):
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    beside.legend(handles=[*health.get_lines(), *beside.get_lines()], fontsize=8, loc="lower right")
    health.set_ylim(bottom=0)
    beside.set_ylim(bottom=0)
    figure.suptitle(h.name)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()
