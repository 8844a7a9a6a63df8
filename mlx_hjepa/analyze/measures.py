"""What a history says in numbers: the loss's fall, speed, times, the schedule; and the criteria a run is held to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_hjepa.analyze.faults import KNN_NOISE, SLOWED, SPEED_FAULTS, Fault, faults
from mlx_hjepa.analyze.history import History
from mlx_hjepa.run import duration

Span = tuple[float, float, float]  # low, mid, high

EPOCHS = (5, 20, 50, 100)
ENOUGH_IT_S, ENOUGH_FALL, ENOUGH_STEADY = 2.5, 0.2, 0.2  # the design note's criteria
FIRST_STEPS = 50
FAIR_LINES, FAIR_SHARE = 10, 0.1  # of a run: with less it cannot fail to learn yet
SAME = {"no collapse": ("collapse",), "steady speed": SPEED_FAULTS}  # a criterion that a fault already tells


@dataclass(frozen=True)
class Criterion:
    """passed is None where it cannot be told: too early, or not in what was written."""

    name: str
    required: str
    found: str
    passed: bool | None


def span(times: Span) -> str:
    """`2 h 05 min (1 h 50 min to 2 h 30 min)`."""
    low, mid, high = map(duration, times)
    return mid if low == high else f"{mid} ({low} to {high})"


def progress(step: int, total: int | None) -> str:
    """`step 150 of 3,900`."""
    return f"step {step:,}" + (f" of {total:,}" if total else "")


def loss_change(h: History) -> tuple[float, float] | None:
    """What is judged, as its mean over the first 50 steps (or the first line, if that is longer), and now."""
    x, step = h.judged[np.isfinite(h.judged)], h.step[np.isfinite(h.judged)]
    early = max(1, int((step <= FIRST_STEPS).sum()))
    if len(x) <= early:
        return None
    return float(x[:early].mean()), float(np.median(x[early:][-3:]))


def no_rise(h: History) -> str | None:
    """The evidence, when the newest of two or more probes is no better than the first."""
    if len(h.knn) < 2 or h.knn[-1] > h.knn[0] + KNN_NOISE:
        return None
    return (f"the online k-NN has not risen: {100 * h.knn[0]:.1f} % at step {h.knn_step[0]:,.0f}, "
            f"{100 * h.knn[-1]:.1f} % at step {h.knn_step[-1]:,.0f}")


def speed(h: History) -> dict[str, Any]:
    """it_s, of the last third; variation, the standard deviation over the mean after the first tenth; the likely cause
    of an unsteady speed."""
    rate = h.rates()[1]
    if not len(rate):
        return {"it_s": None, "img_s": None, "variation": None, "cause": None}
    now = float(np.median(rate[-max(1, len(rate) // 3):]))
    kept = rate[len(rate) // 10:]
    variation = float(kept.std() / kept.mean()) if len(kept) >= 5 else None
    cause = None
    if variation is not None and variation >= ENOUGH_STEADY:
        drops = float((kept < SLOWED * np.median(kept)).mean())
        cause = (f"irregular: {100 * drops:.0f} % of the lines more than {100 - 100 * SLOWED:.0f} % below the median, "
                 "as with slow loading or other programs")
    slow = next((fault for fault in faults(h) if fault.name in SPEED_FAULTS), None)
    return {"it_s": now, "img_s": now * h.batch if h.batch else None, "variation": variation,
            "cause": f"{slow.name}: {slow.evidence}" if slow else cause}


def seconds_a_step(h: History) -> Span | None:
    """From the run's own clock, checks and checkpoints included: over its later half; the range is of its fifths."""
    known = np.isfinite(h.seconds)
    step, seconds = h.step[known], h.seconds[known]
    if len(step) < 2 or seconds[-1] <= seconds[0]:
        rate = speed(h)["it_s"]
        return (0.8 / rate, 1 / rate, 1.2 / rate) if rate else None
    half = len(step) // 2 if len(step) >= 10 else 0
    mid = (seconds[-1] - seconds[half]) / (step[-1] - step[half])
    marks = np.linspace(0, len(step) - 1, min(5, len(step) - 1) + 1).astype(int)
    parts = np.diff(seconds[marks]) / np.diff(step[marks])
    if len(parts) < 3:
        return 0.8 * mid, mid, 1.2 * mid
    return float(min(parts.min(), mid)), float(mid), float(max(parts.max(), mid))


def times_of(h: History) -> dict[int, Span]:
    """Seconds that 5, 20, 50 and 100 epochs of this very run take on this machine; empty where its rate is unknown."""
    each = seconds_a_step(h)
    if each is None or not h.epoch_steps:
        return {}
    start = max(0.0, float(h.seconds[0] - h.step[0] * each[1])) if np.isfinite(h.seconds[:1]).all() else 0.0
    low, mid, high = (value * h.epoch_steps for value in each)
    return {n: (start + n * low, start + n * mid, start + n * high) for n in EPOCHS}


def time_left(h: History) -> Span | None:
    """Seconds to the end of the run."""
    each = seconds_a_step(h)
    if each is None or not h.total:
        return None
    left = h.total - h.last_step
    return each[0] * left, each[1] * left, each[2] * left


def schedule(h: History) -> dict[str, Any]:
    """Where in its schedule the run is. The half-life of the target encoder is ln 0.5 / ln momentum steps;
    None at momentum 1, where it stands still."""
    momentum = float(h.momentum[-1]) if len(h.momentum) and np.isfinite(h.momentum[-1]) else None
    half = None if momentum is None or momentum >= 1 else math.log(0.5) / math.log(momentum) if momentum > 0 else 0.0
    return {"step": h.last_step, "total": h.total, "warmup": h.warmup,
            "lr": float(h.lr[-1]) if len(h.lr) else None, "lr_peak": float(np.nanmax(h.lr)) if len(h.lr) else None,
            "momentum": momentum, "ema_half_life": half}


def _at_notes_setting(h: History) -> bool:
    """224 px in patches of 16, ViT-Tiny, two levels, batch 32, which the note's 2.5 it/s is for."""
    if h.pytorch:
        return h.batch == 32 and h.encoder.startswith("vit_tiny") and h.hierarchies in (2, None)
    c = h.config
    return c is not None and (c.data.image_size, c.model.patch, c.model.dim, c.training.batch) == (224, 16, 192, 32)


def criteria(h: History) -> list[Criterion]:
    """The design note's criteria. Its speed is asked for at its own setting only."""
    pace, change, same = speed(h), loss_change(h), _at_notes_setting(h)
    rate, images, varies = pace["it_s"], pace["img_s"], pace["variation"]
    found = "not known" if rate is None else f"{rate:.2f} it/s" + (f", {images:,.0f} img/s" if images else "")
    fell = change is not None and change[1] <= (1 - ENOUGH_FALL) * change[0]
    fair = h.finished or (len(h.step) >= FAIR_LINES and h.last_step >= FAIR_SHARE * (h.total or 0))
    collapsed = any(fault.name == "collapse" for fault in faults(h))
    return [
        Criterion("speed", f">= {ENOUGH_IT_S} it/s" if same else
                  f"none: the design note's {ENOUGH_IT_S} it/s is for ViT-Tiny at 224 px, batch 32", found,
                  rate >= ENOUGH_IT_S if same and rate is not None else None),
        Criterion(f"{h.measure} down", f">= {100 * ENOUGH_FALL:.0f} % from its mean over the first {FIRST_STEPS} steps",
                  f"{change[0]:.4g} to {change[1]:.4g}, {100 * (1 - change[1] / change[0]):.0f} %" if change
                  else "too early", fell if change and (fell or fair) else None),
        Criterion("no collapse", "no alarm", f"{sum(map(bool, h.alarm))} alarms in {len(h.alarm)} health checks"
                  if h.alarm else "no health checks in the log", not collapsed if len(h.alarm) > 1 else None),
        Criterion("steady speed", f"varies by < {100 * ENOUGH_STEADY:.0f} %",
                  "too early" if varies is None else f"{100 * varies:.0f} %",
                  varies < ENOUGH_STEADY if varies is not None else None),
    ]


def verdict(found: list[Fault], judged: list[Criterion]) -> str:
    """passed; failed, with what; or too early."""
    failed = [fault.name for fault in found]
    failed += [c.name for c in judged if c.passed is False and set(failed).isdisjoint(SAME.get(c.name, ()))]
    if failed:
        return "failed: " + ", ".join(failed)
    return "too early" if judged[1].passed is None else "passed"
