"""What is wrong with a run, if anything: each fault with its evidence and what to do about it.

Learning is judged on the loss ratio and the online k-NN, never on the raw loss, which may rise while features improve.
What healthy runs do, and no rule here minds: the ratio starts above 1 (an untrained predictor is worse than the best
constant), ends at 0.3 to 0.7, and may creep up by a third from an early low; the features' std may fall by a third.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_hjepa.analyze.history import History

DIVERGED, DIVERGED_RAW = 1.5, 1.3  # times the best level so far
JUMP = 1.3  # from one line to the next
SLOWED = 0.85
KNN_NOISE = 0.01


@dataclass(frozen=True)
class Fault:
    name: str
    evidence: str
    advice: str


def faults(h: History) -> list[Fault]:
    """The faults of a run, none if it is healthy: at most one of its learning, for a fault explains those further down
    the list (a collapsed run also diverges), and one of its speed."""
    learning = (check(h) for check in (_non_finite, _collapse, _divergence, _unstable_lr, _plateau))
    speed = (check(h) for check in (_memory, _throttling))
    found = (next(filter(None, learning), None), next(filter(None, speed), None))
    return [fault for fault in found if fault]


# ---------------------------------------------------------------- learning


def level(h: History) -> np.ndarray:
    """The loss ratio of each line, with the baseline of its own step: on the straight line between two health checks.

    The logged ratio takes the last check's baseline, and so jumps at every check while the features still change fast.
    """
    if h.pytorch or not len(h.health_step):
        return h.judged
    with np.errstate(divide="ignore", invalid="ignore"):
        base = h.loss / h.loss_ratio
    knots = [(at, base[after[0]]) for at in h.health_step
             if len(after := np.flatnonzero((h.step > at) & np.isfinite(base)))]
    if len(knots) < 2:
        return h.judged
    return h.loss / np.interp(h.step, *np.array(knots).T)


def smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """The running median of `width` values, fewer at the ends."""
    half = width // 2
    return np.array([np.nanmedian(values[max(0, i - half):i + half + 1]) for i in range(len(values))])


def noise(h: History) -> float | None:
    """Relative scatter of the loss ratio from line to line: 1.48 times the median absolute deviation of its steps."""
    steps = np.diff(np.log(level(h)[2:]))
    steps = steps[np.isfinite(steps)]
    if len(steps) < 5:
        return None
    return float(1.4826 * np.median(np.abs(steps - np.median(steps))) / np.sqrt(2))


def knn_flat(scores: np.ndarray) -> bool:
    """Whether the later half of the probes is no better than the earlier half."""
    half = len(scores) // 2
    return bool(scores[half:].max() <= scores[:half].max() + KNN_NOISE)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _non_finite(h: History) -> Fault | None:
    bad, row = (float(np.nanmax(v)) if np.isfinite(v).any() else 0.0 for v in (h.bad, h.bad_in_a_row))
    lost = int(np.isnan(h.loss).sum())
    if row < 10 and bad <= 20 + 0.02 * h.last_step and not lost:  # fp16 finds its loss scale by a few such steps
        return None
    return Fault("non-finite", f"{bad:.0f} of {h.last_step:,} steps without a finite gradient, up to {row:.0f} in a row"
                 + (f"; {lost} lines without a finite loss" if lost else ""),
                 "lower training.lr by 3x or lengthen training.warmup_epochs; with precision fp16, use bf16 or fp32")


def _collapse(h: History) -> Fault | None:
    """The training's own alarm; not where the effective rank at least doubled, which no collapse does."""
    def real(i: int) -> bool:
        return bool(h.alarm[i]) and not (h.rank[i] >= 2 * h.rank[0] and h.baseline[i] >= 1e-3)
    alarms = [i for i in range(len(h.alarm)) if real(i)]
    if not alarms:
        return None
    first, last = (h.health_step[alarms[i]] for i in (0, -1))
    evidence = (f"alarm at {len(alarms)} of {len(h.alarm)} health checks, first at step {first:,.0f}, last at step "
                f"{last:,.0f}: {h.alarm[alarms[-1]]}")
    if len(h.knn) > 1 and h.knn[-1] < h.knn.max() - KNN_NOISE:
        evidence += f"; k-NN {_percent(h.knn.max())} at its best, now {_percent(h.knn[-1])}"
    return Fault("collapse", evidence,
                 "lower training.lr by 3x, start training.ema at 0.996 or more, keep training.clip at 1")


def _divergence(h: History) -> Fault | None:
    lower = "halve training.lr and double training.warmup_epochs"
    if len(h.knn) > 2:
        best, last = h.knn.max(), h.knn[-2:]
        if last.max() < best - max(0.05, 0.1 * best) or (
                last.max() < best - KNN_NOISE and last[1] < best - max(0.1, 0.2 * best)):
            return Fault("divergence", f"online k-NN fell from {_percent(best)} at step "
                         f"{h.knn_step[h.knn.argmax()]:,.0f} to {_percent(h.knn[-1])}", lower)
    x = level(h)
    x, step = x[np.isfinite(x)], h.step[np.isfinite(x)]
    if len(x) < 6:
        return None
    tail = max(3, len(x) // 10)
    before = smooth(x)[:-tail]
    low, now = int(before.argmin()), float(np.median(x[-tail:]))
    later = h.knn[h.knn_step > step[low]]
    improves = len(later) and len(h.knn) > 1 and h.knn[-1] >= h.knn.max() - KNN_NOISE
    if now < (DIVERGED_RAW if h.pytorch else DIVERGED) * before[low] or improves:
        return None
    return Fault("divergence", f"{h.measure} {before[low]:.4g} at step {step[low]:,.0f}, now {now:.4g}"
                 + (" (no baseline in this log: a raw loss may rise in a healthy run)" if h.pytorch else ""), lower)


def restarted(h: History) -> str | None:
    """The evidence, when the learning rate rises again after it fell."""
    lr = h.lr[1:][np.isfinite(h.lr[1:])]  # the first line of the PyTorch original shows another one
    fell = np.flatnonzero(lr < 0.9 * np.maximum.accumulate(lr))
    if not len(fell):
        return None
    rest = lr[fell[0]:]
    rose = np.flatnonzero(rest > 1.1 * np.minimum.accumulate(rest))
    if not len(rose):
        return None
    return (f"the learning rate rises again, from {rest[:rose[0] + 1].min():.2e} to {rest[rose[0]]:.2e} at step "
            f"{h.step[1 + fell[0] + rose[0]]:,.0f}: its schedule started anew")


def _unstable_lr(h: History) -> Fault | None:
    """A learning rate that jumps itself, or is too high for a steady descent."""
    if evidence := restarted(h):
        return Fault("unstable lr", evidence, "start a new run; a resumed one must go on at its own step")
    with np.errstate(divide="ignore", invalid="ignore"):
        jumps = np.diff(np.log(level(h)[2:])) > np.log(JUMP)
    if jumps.sum() < 3 or jumps.mean() < 0.04:
        return None
    return Fault("unstable lr", f"the {h.measure} jumped by more than {_percent(JUMP - 1)} from one line to the next "
                 f"{jumps.sum()} times in {len(jumps)}", "halve training.lr and double training.warmup_epochs")


def _plateau(h: History) -> Fault | None:
    """Nothing has improved since the warm-up: not the k-NN, or where it is not probed, neither ratio nor rank."""
    advice = ("if training.lr is below 1e-3 at batch 256: 1.5x that and half the training.warmup_epochs; "
              "else more levels in model.levels or a smaller training.batch")
    if len(h.knn) >= 4 and np.ptp(h.knn_step) >= 0.3 * (h.total or 0) and knn_flat(h.knn):
        return Fault("plateau", f"online k-NN {_percent(h.knn[0])} at step {h.knn_step[0]:,.0f}, best "
                     f"{_percent(h.knn.max())}, now {_percent(h.knn[-1])}: no better in the later half of the probes",
                     advice)
    if not np.isfinite(h.lr).any():
        return None
    start = h.step[np.nanargmax(h.lr)] if h.warmup is None else h.warmup
    x = level(h)
    after = (h.step > start) & np.isfinite(x)
    step, x = h.step[after], x[after]
    if len(x) < 8 or (h.total and step[-1] - step[0] < 0.15 * h.total):
        return None
    quarter = max(2, len(x) // 4)
    first, last = np.median(x[:quarter]), np.median(x[-quarter:])
    probed, rank = h.knn_step >= step[0], h.rank[h.health_step >= step[0]]
    spans = probed.any() and np.ptp(h.knn_step[probed]) >= 0.5 * (step[-1] - step[0])
    knn = h.knn[probed] if spans else np.zeros(0)
    if last < 0.98 * first or (len(knn) < 2 and len(rank) < 2 and not h.pytorch):
        return None
    if not knn_flat(knn) if len(knn) >= 2 else len(rank) >= 2 and rank[-1] > 1.05 * rank[0]:
        return None
    beside = (f", online k-NN {_percent(knn[0])} then {_percent(knn[-1])}" if len(knn) >= 2 else
              f", effective rank {rank[0]:.0f} then {rank[-1]:.0f}" if len(rank) >= 2 else "")
    return Fault("plateau", f"{h.measure} {first:.4g} after warm-up and {last:.4g} at step {step[-1]:,.0f}{beside}",
                 advice)


# ---------------------------------------------------------------- speed


def _memory(h: History) -> Fault | None:
    peak = h.peak_gb[np.isfinite(h.peak_gb)]
    if len(peak) < 12:
        return None
    half, usual = peak[len(peak) // 2:], np.median(peak[:len(peak) // 2])
    if peak[-1] < 1.25 * usual or (np.diff(half) > 0.01 * half[:-1]).sum() < 3:
        return None
    return Fault("memory growth", f"peak memory {usual:.2f} GB in the first half of the run, {peak[-1]:.2f} GB now and "
                 "growing", "stop with Ctrl-C and go on with --resume; a smaller training.batch if it comes again")


def _throttling(h: History) -> Fault | None:
    """A sustained slow-down. Heat comes slowly and then holds; a step down is power or another program."""
    step, rate = h.rates()
    if len(rate) < 12:
        return None
    tail = rate[-max(3, len(rate) // 4):]
    early, late, level_of = np.median(rate[:max(3, len(rate) // 6)]), np.median(tail), smooth(rate)
    drop, scatter = 1 - late / early, 1.4826 * np.median(np.abs(rate / level_of - 1))
    held = (tail < 0.9 * early).mean() >= 0.9 and tail.std() < drop * early / 4
    if drop < 1 - SLOWED or drop < 3 * scatter or not held:
        return None
    began = int(np.argmax(level_of < early - 0.2 * (early - late)))
    over = int(np.argmax(level_of < late + 0.2 * (early - late))) - began
    shape = (f"slowly, over {step[began + over] - step[began]:,.0f} steps, as with heat" if over >= 3 else
             "at once, as with a battery, a low-power mode or another program")
    return Fault("throttling", f"{early:.2f} it/s at first, {late:.2f} now ({_percent(drop)} slower); from "
                 f"step {step[began]:,.0f} {shape}", "plug the machine in, let air to it, close other programs; "
                 "the run itself is sound, and its times are those of the slower rate")
