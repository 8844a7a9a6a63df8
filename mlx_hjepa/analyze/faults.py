"""What is wrong with a run, if anything: each fault with its evidence and what to do about it.

Learning is judged on the loss ratio and the online k-NN, never on the raw loss, which may rise while features improve.
What healthy runs do, and no rule here minds: the ratio starts above 1 (an untrained predictor is worse than the best
constant), ends at 0.3 to 0.7, and may creep up by a third from an early low; the features' std may fall by a third.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_hjepa.analyze.history import History, smooth

DIVERGED, DIVERGED_RAW, DIVERGED_FLAT = 1.5, 1.3, 1.15  # times the best level so far; flat: the k-NN stands still
JUMP = 1.3  # from one line to the next
SLOWED, HELD = 0.85, 5  # of the rate before, for so many lines
NEAR_MEMORY = 0.75  # of the device's memory: about what Metal recommends to use at most
KNN_NOISE = 0.01
SPEED_FAULTS = ("throttling", "slow loading", "memory pressure", "memory growth")


@dataclass(frozen=True)
class Fault:
    name: str
    evidence: str
    advice: str


def faults(h: History) -> list[Fault]:
    """The faults of a run, none if it is healthy: at most one of its learning, for a fault explains those further down
    the list (a collapsed run also diverges), and one of its speed."""
    learning = (check(h) for check in (_non_finite, _collapse, _divergence, _unstable_lr, _decline, _plateau))
    speed = (check(h) for check in (_memory_growth, _slow_down))
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


def scatter(values: np.ndarray) -> float | None:
    """Relative scatter from line to line: 1.48 times the median absolute deviation of the steps' logarithms."""
    steps = np.diff(np.log(values))
    steps = steps[np.isfinite(steps)]
    if len(steps) < 5:
        return None
    return float(1.4826 * np.median(np.abs(steps - np.median(steps))) / np.sqrt(2))


def noise(h: History) -> float | None:
    """The scatter of the loss ratio."""
    return scatter(level(h)[2:])


def knn_flat(scores: np.ndarray) -> bool:
    """Whether the later half of the probes is no better than the earlier half."""
    half = len(scores) // 2
    return bool(scores[half:].max() <= scores[:half].max() + KNN_NOISE)


def _knn_stands_still(h: History) -> bool:
    """Whether it stopped early. After a rise of 5 points it takes eight probes to tell that from a run's calm end."""
    if len(h.knn) < 4 or (len(h.knn) < 8 and np.ptp(h.knn) >= 0.05):
        return False
    return bool(np.ptp(h.knn_step) >= 0.3 * (h.total or 0)) and knn_flat(h.knn)


def _rise(h: History) -> tuple[float, float, float] | None:
    """The lowest level so far, its step, and the level of the last tenth of the lines."""
    x = level(h)
    x, step = x[np.isfinite(x)], h.step[np.isfinite(x)]
    if len(x) < 6:
        return None
    tail = max(3, len(x) // 10)
    before = smooth(x)[:-tail]
    return float(before.min()), float(step[before.argmin()]), float(np.median(x[-tail:]))


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _non_finite(h: History) -> Fault | None:
    bad, row = (float(np.nanmax(v)) if np.isfinite(v).any() else 0.0 for v in (h.bad, h.bad_in_a_row))
    lost = int((~np.isfinite(h.loss)).sum())
    if row < 10 and bad <= 20 + 0.02 * h.last_step and not lost:  # fp16 finds its loss scale by a few such steps
        return None
    steps = [f"{bad:.0f} of {h.last_step:,} steps without a finite gradient, up to {row:.0f} in a row"] if bad else []
    lines = [f"{lost} of {len(h.loss)} lines without a finite loss"] if lost else []
    return Fault("non-finite", "; ".join(steps + lines),
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
    if (rise := _rise(h)) is None:
        return None
    low, at, now = rise
    later = int(np.searchsorted(h.knn_step, at, "right"))  # the first probe after the low
    improves = (later < len(h.knn) and h.knn[-1] > h.knn[max(0, later - 1)] + KNN_NOISE
                and h.knn[-1] >= h.knn.max() - KNN_NOISE)
    most = DIVERGED_RAW if h.pytorch else DIVERGED_FLAT if _knn_stands_still(h) else DIVERGED
    if now < most * low or improves:
        return None
    return Fault("divergence", f"{h.measure} {low:.4g} at step {at:,.0f}, now {now:.4g}"
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


def _decline(h: History) -> Fault | None:
    """The k-NN was better for a while, though the loss ratio goes on falling: the targets grow more predictable and
    tell less, the lower levels' first (docs/results.md, a hundred epochs)."""
    if len(h.knn) < 4 or h.knn[-2:].max() > h.knn.max() - 2 * KNN_NOISE:
        return None
    return Fault("decline", f"online k-NN {_percent(h.knn.max())} at step {h.knn_step[h.knn.argmax()]:,.0f}, "
                 f"{_percent(h.knn[-1])} now",
                 "augment.jitter: 1, or fewer training.epochs; --checkpoint best scores this run at its best")


def _plateau(h: History) -> Fault | None:
    """Nothing has improved since the warm-up: not the k-NN, or where it is not probed, neither ratio nor rank."""
    advice = ("if training.lr is below 1e-3 at batch 256: 1.5x that and half the training.warmup_epochs; "
              "else more levels in model.levels or a smaller training.batch")
    if _knn_stands_still(h):
        return Fault("plateau", f"online k-NN {_percent(h.knn[0])} at step {h.knn_step[0]:,.0f}, best "
                     f"{_percent(h.knn.max())}, now {_percent(h.knn[-1])}: no better in the later half of the probes",
                     advice)
    rise = _rise(h)
    if not np.isfinite(h.lr).any() or (rise and rise[2] >= DIVERGED_FLAT * rise[0]):
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


def _memory_growth(h: History) -> Fault | None:
    peak = h.peak_gb[np.isfinite(h.peak_gb)]
    if len(peak) < 12:
        return None
    half, usual = peak[len(peak) // 2:], np.median(peak[:len(peak) // 2])
    if peak[-1] < 1.25 * usual or (np.diff(half) > 0.005 * half[:-1]).sum() < max(3, len(half) / 10):
        return None
    return Fault("memory growth", f"peak memory {usual:.2f} GB in the first half of the run, {peak[-1]:.2f} GB now and "
                 "growing", "stop with Ctrl-C and go on with --resume; a smaller training.batch if it comes again")


def _slow_down(h: History) -> Fault | None:
    """A slow-down that lasts: after the split of the lines that parts them best, the rate stays below that before."""
    step, rate, wait = h.rates()
    n, usual = len(rate), smooth(rate)
    if n < 12:
        return None
    splits = np.arange(3, n - HELD + 1)  # lines before each
    sums = usual.cumsum()
    falls = sums[splits - 1] / splits - (sums[-1] - sums[splits - 1]) / (n - splits)
    at = int(splits[np.argmax(falls * np.sqrt(splits * (n - splits)))])
    early, late = float(np.median(rate[:at])), float(np.median(rate[at:]))
    drop, error = 1 - late / early, (scatter(rate) or 0.0) * np.sqrt(1 / at + 1 / (n - at))
    slow, spread = rate < 0.9 * early, 1.4826 * np.median(np.abs(rate[at:] - late))
    holds = slow[at:].sum() >= HELD and slow[-HELD:].mean() > 0.5 and spread < drop * early / 2
    if drop < max(1 - SLOWED, 5 * error) or not holds:
        return None
    began = int(np.argmax(usual < early - 0.2 * (early - late)))
    over = int(np.argmax(usual < late + 0.2 * (early - late)))
    name, shape, advice = _explained(h, step[over] - step[began] if over >= began + 3 else 0, 1 / late - 1 / early,
                                     float(np.median(wait[at:]) - np.median(wait[:at])))
    return Fault(name, f"{early:.2f} it/s at first, {late:.2f} now ({_percent(drop)} slower); from step "
                 f"{step[began]:,.0f} {shape}", advice)


def _explained(h: History, over: float, longer: float, waits: float) -> tuple[str, str, str]:
    """Name, evidence and advice for a slow-down over so many steps, each then so many seconds longer, of which it waits
    for data for so many (nan: not logged). Heat comes slowly and then holds."""
    if waits >= longer / 2:
        return ("slow loading", f"a step takes {1000 * longer:.0f} ms longer, and waits {1000 * waits:.0f} ms longer "
                "for data", "data.source: resident where it fits in memory, else more data.threads or a faster disk")
    peak = float(np.nanmax(h.peak_gb, initial=0))
    if h.memory_gb and peak >= NEAR_MEMORY * h.memory_gb:
        return ("memory pressure", f"with up to {peak:.1f} of the device's {h.memory_gb:.1f} GB in use",
                "close other programs; a smaller training.batch, or more training.accumulation, needs less memory")
    return ("throttling", f"slowly, over {over:,.0f} steps, as with heat" if over else
            "at once, as with a battery, a low-power mode or another program", "plug the machine in, let air to it, "
            "close other programs; the run itself is sound, and its times are those of the slower rate")
