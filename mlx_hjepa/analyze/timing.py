"""How long training takes: FLOPs, measured steps, the fit t = a + b * B, projections, and what a budget allows.

A row is one measured point as results/throughput/<machine>.json holds it (docs/performance.md names its keys).
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from mlx_hjepa import backend
from mlx_hjepa.config import Config
from mlx_hjepa.data.dataset import Pictures
from mlx_hjepa.data.source import batches
from mlx_hjepa.model.hjepa import HJEPA, key_of
from mlx_hjepa.run import RESULTS, UserError, read_json
from mlx_hjepa.schedule import Schedule

PICTURES = {"cifar10": 50_000, "cifar100": 50_000, "digits": 1_437}  # of the training splits
HEALTH_PICTURES, VALIDATION, BANK = 512, 5_000, 10_000  # what a health check and the online k-NN encode
DISK = 0.5e9  # bytes a second of a checkpoint, hashed and synced, where none was measured
STEPS = 1_000_000
Row = dict[str, Any]


class Flops(NamedTuple):
    """Floating-point operations that one picture costs in one step; a multiply-add is 2."""

    context: float
    target: float
    predictor: float
    total: float


class Costs(NamedTuple):
    """Seconds of what is not a step: the first step's compilation, one health check, one k-NN probe, one checkpoint."""

    first_step: float = 0.0
    health: float = 0.0
    knn: float = 0.0
    checkpoint: float = 0.0


class Speed(Protocol):
    """What `project` asks: seconds a step (low, mid, high) at a batch size, and the costs, None if not measured."""

    @property
    def costs(self) -> Costs | None: ...

    def step(self, batch: int) -> tuple[float, float, float]: ...


# ---------------------------------------------------------------- counted


def flops_per_picture(config: Config) -> Flops:
    """Forward and backward FLOPs of the matrix products: L F(N,d) + M (3 L F(kc,d) + 3 Lp F(kc+kt,dp)), with
    F(n,d) = (8 + 4 ratio) n d^2 + 4 n^2 d, and the patch embeddings, level embeddings and heads.

    Not counted: augmentation, masks, pooling, norms, softmax and the optimizer, together a few per cent.
    """
    m, p, k = config.model, config.predictor, config.masking
    assert m.dim is not None
    assert m.depth is not None
    kc, kt, draws, tokens = k.context_tokens, k.target_tokens, k.masks_per_image, config.grid**2
    patch = 2 * m.patch * m.patch * 3 * m.dim
    embed = 2 * len({level.depth for level in m.levels}) * m.dim * p.dim
    head = 2 * p.dim * len(m.levels) * m.dim

    def block(n: int, dim: int) -> float:
        return (8 * dim + 4 * round(dim * m.mlp_ratio)) * n * dim + 4 * n * n * dim

    target = m.depth * block(tokens, m.dim) + tokens * patch
    context = draws * (3 * m.depth * block(kc, m.dim) + 2 * kc * patch)  # pixels have no gradient: 2, not 3
    predictor = draws * 3 * (p.depth * block(kc + kt, p.dim) + kc * embed + kt * head)
    return Flops(context, target, predictor, context + target + predictor)


def parameters(config: Config) -> tuple[int, int]:
    """Weights of the encoder and of the predictor, biases and norms left out (1 to 2 %)."""
    m, p = config.model, config.predictor
    assert m.dim is not None
    assert m.depth is not None
    encoder = m.depth * (4 * m.dim + 2 * round(m.dim * m.mlp_ratio)) * m.dim + m.patch**2 * 3 * m.dim
    sources = len({level.depth for level in m.levels})
    return encoder, (p.depth * (4 * p.dim + 2 * round(p.dim * m.mlp_ratio)) + (sources + len(m.levels)) * m.dim) * p.dim


def levels_name(config: Config) -> str:
    """`4,8,12`; a level pooled over 2 x 2 windows is written `12/2`."""
    return ",".join(f"{v.depth}/{v.pool}" if v.pool > 1 else str(v.depth) for v in config.model.levels)


def key(config: Config) -> Row:
    """What a measurement belongs to, all but the batch size: the first keys of a row."""
    return {"model": f"{config.model.dim}x{config.model.depth}", "levels": levels_name(config),
            "precision": backend.precision(config.training.precision), "image_size": config.data.image_size,
            "gflop": flops_per_picture(config).total / 1e9}


# ---------------------------------------------------------------- measured


def pulses(config: Config, make_step: Callable[..., Any]) -> Iterator[float]:
    """Seconds of each training step, without end; the first is the one that compiles.

    make_step: `train.step.Step`, handed in because `analyze` does not import `train`. The loop is the trainer's, with
    made-up pictures from the configured source, and one step prepared while the one before it runs.
    """
    batch = config.training.batch
    side = {"digits": 8, "folder": config.data.image_size}.get(config.data.dataset, 32)
    images = np.random.default_rng(0).integers(0, 256, (max(2_000, batch), side, side, 3), dtype=np.uint8)
    source = batches(Pictures(images, None), config.data.source, 0, batch, 0, STEPS, config.data.threads)
    model, schedule = HJEPA(config, (0.5,) * 3, (0.25,) * 3), Schedule(config.training, 1_000)
    step = make_step(model, schedule, backend.precision(config.training.precision))
    state, weights, previous = step.initial_state(), [1.0] * len(model.levels), None
    mark = time.perf_counter()
    for i, pictures in enumerate(source):
        state, stats = step(state, pictures, key_of(0, i), step.scalars(i % schedule.total, weights))
        mx.async_eval(state.arrays(), stats)
        mx.eval(stats if previous is None else previous)
        previous = stats
        yield time.perf_counter() - mark
        mark = time.perf_counter()


def measure(config: Config, make_step: Callable[..., Any], steps: int = 30, seconds: float = 10.0,
            window: int = 5) -> Row:
    """One row: the step's rate at the configuration's batch size, over at least `steps` steps and `seconds`.

    Before that it warms up until the medians of two windows of steps agree within 5 %, for `seconds` at most. it_s is
    the median of up to ten groups of steps, spread half their range from the 10th to the 90th percentile, relative.
    """
    mx.clear_cache()
    beat = pulses(config, make_step)
    first = next(beat)
    mx.reset_peak_memory()
    _warm_up(beat, window, seconds)
    times: list[float] = []
    while len(times) < steps or sum(times) < seconds:
        times.append(next(beat))
    beat.close()  # type: ignore[attr-defined]
    groups = [float(part.mean()) for part in np.array_split(times, min(10, len(times)))]
    second, batch, found = statistics.median(groups), config.training.batch, key(config)
    spread = float(np.subtract(*np.percentile(groups, [90, 10]))) / 2 / second
    return {**found, "batch": batch, "it_s": 1 / second, "img_s": batch / second, "spread": spread,
            "tflops": found["gflop"] * batch / second / 1e3, "peak_gb": backend.peak_memory_gb(),
            "first_step_s": first, "steps": len(times)}


def _warm_up(beat: Iterator[float], window: int, limit: float) -> None:
    times = [next(beat) for _ in range(2 * window)]
    while sum(times) < limit:
        before, now = statistics.median(times[-2 * window:-window]), statistics.median(times[-window:])
        if abs(now / before - 1) < 0.05:
            return
        times.append(next(beat))


def with_batch(config: Config, batch: int) -> Config:
    """The configuration at another batch size, in one part."""
    training = config.training.model_copy(update={"batch": batch, "accumulation": 1})
    return config.model_copy(update={"training": training})


def measure_here(config: Config, make_step: Callable[..., Any], seconds: float = 20.0) -> list[Row]:
    """Rows for a first `fit`, in about `seconds` of steps (compilation comes on top): batches of 8, 32, 128 ... as far
    as the next still fits, at most the configuration's own."""
    rows: list[Row] = []
    batch, left = min(8, max(1, config.training.batch // 4)), seconds
    while batch <= config.training.batch:
        began = time.perf_counter()
        rows.append(measure(with_batch(config, batch), make_step, 5, seconds / 8, 1))
        left -= time.perf_counter() - began - rows[-1]["first_step_s"]
        batch *= 4
        if len(rows) > 1 and left < 8 * batch / rows[-1]["img_s"]:
            break
    return rows


# ---------------------------------------------------------------- fitted


@dataclass(frozen=True)
class Fit:
    """t = a + b * B seconds a step: a the floor of launches and optimizer, b the time of a picture. `interval` is the
    relative half-width of a predicted t."""

    a: float
    b: float
    interval: float
    costs: Costs | None = None

    def step(self, batch: int) -> tuple[float, float, float]:
        t = self.a + self.b * batch
        return t * (1 - self.interval), t, t * (1 + self.interval)


def fit(rows: list[Row], costs: Costs | None = None) -> Fit:
    """The Fit of one model's rows, by least squares of the relative error, with a >= 0.

    interval: twice the root of the residuals' variance plus the median spread squared, at least 3 %, and 10 % from two
    rows, which no residual checks. Raises UserError for fewer than two batch sizes.
    """
    batch, t = np.array([r["batch"] for r in rows], float), np.array([1 / r["it_s"] for r in rows], float)
    if len(set(batch)) < 2:
        raise UserError("a fit needs two batch sizes: run python benchmarks/throughput.py with more --batches")
    x = np.stack([1 / t, batch / t], axis=1)
    a, b = np.linalg.lstsq(x, np.ones(len(t)), rcond=None)[0]
    if a < 0 or b < 0:  # all floor, or none
        column = x[:, int(a < 0)]
        value = column.sum() / (column @ column)
        a, b = (0.0, value) if a < 0 else (value, 0.0)
    variance = float(((a + b * batch) / t - 1) @ ((a + b * batch) / t - 1)) / max(1, len(t) - 2)
    spread = statistics.median(r.get("spread", 0.0) for r in rows)
    interval = max(0.03 if len(t) > 2 else 0.10, 2 * (variance + spread**2) ** 0.5)
    return Fit(float(a), float(b), min(interval, 0.9), costs)


def left_out(rows: list[Row]) -> dict[int, float]:
    """For each batch size but the smallest and the largest: predicted by the fit of the others / measured - 1."""
    rows = sorted(rows, key=lambda r: r["batch"])
    return {row["batch"]: fit([r for r in rows if r is not row]).step(row["batch"])[1] * row["it_s"] - 1
            for row in rows[1:-1] if len(rows) > 2}


def machine_name(device: dict[str, Any]) -> str:
    """The file name of a machine, from `backend.device()`: apple-m1-max-32-cores, amd-epyc-2-threads."""
    name = re.sub(r"[^a-z0-9]+", "-", device["name"].lower().replace("(r)", "").replace("(tm)", "")).strip("-")
    if device["kind"] == "cuda":
        return name
    return f"{name}-{device['threads']}-threads" if device["kind"] == "cpu" else f"{name}-{device['gpu_cores']}-cores"


def throughput_file(folder: Path = RESULTS / "throughput") -> Path:
    """Where this machine's measurements are."""
    return folder / f"{machine_name(backend.device())}.json"


def measured(config: Config, file: Path) -> Fit | None:
    """The fit of this configuration's model from a file of benchmarks/throughput.py; None where it was not measured (at
    two batch sizes at least). Raises UserError when the file is damaged."""
    if not file.is_file():
        return None
    document, wanted = read_json(file), key(config)

    def same(entry: Row) -> bool:
        return (all(entry.get(k) == wanted[k] for k in ("model", "levels", "precision", "image_size"))
                and abs(entry["gflop"] / wanted["gflop"] - 1) < 0.01)

    rows = [r for r in document["rows"] if same(r)]
    costs = next((Costs(**f["costs"]) for f in document["fits"] if same(f) and f.get("costs")), None)
    return fit(rows, costs) if len({r["batch"] for r in rows}) > 1 else None


# ---------------------------------------------------------------- projected


@dataclass(frozen=True)
class Projection:
    """Seconds of a whole run; `parts` are those of mid: training, first_step, health, knn, checkpoint."""

    low: float
    mid: float
    high: float
    parts: dict[str, float]
    epochs: int
    steps: int


def estimated_costs(config: Config, speed: Speed, pictures: int) -> Costs:
    """Costs from the step's own rate, where none were measured: encoding by its FLOPs, a checkpoint by its bytes."""
    held = min(VALIDATION, pictures // 10)
    flops, batch = flops_per_picture(config), config.training.batch
    picture = speed.step(batch)[1] / batch
    forward = picture * flops.target / flops.total
    encoder, predictor = parameters(config)
    health = held * forward + min(HEALTH_PICTURES, pictures) * picture / 2
    return Costs(0.0, health, min(held + BANK, pictures) * forward, (16 * encoder + 12 * predictor) / DISK)


def project(config: Config, speed: Speed, epochs: int | None = None, pictures: int | None = None) -> Projection:
    """The time of a run: its steps, and the checks, probes and checkpoints that `logging` and `checkpoints` ask for.

    pictures: of the training split, known for all but folders. Raises UserError where unknown, or less than a batch.
    """
    c, pictures = config, pictures or PICTURES.get(config.data.dataset)
    if not pictures:
        raise UserError("data.dataset: folder needs the number of its training pictures (mlx-hjepa data tells it)")
    epochs, per_epoch = epochs or c.training.epochs, pictures // c.training.batch
    if not per_epoch:
        raise UserError(f"training.batch {c.training.batch} is larger than the {pictures} training pictures")
    low, mid, high = speed.step(c.training.batch)
    total, costs = epochs * per_epoch, speed.costs or estimated_costs(c, speed, pictures)

    def due(every: float) -> set[int]:
        return {*range(period, total, period), total} if (period := round(every * per_epoch)) else set()

    checks, probes = due(c.logging.health_every), due(c.logging.knn_every)
    saves = due(c.checkpoints.every_epochs) | probes | {total}  # each probe may be the best yet
    gap = total * mid / len(saves) / (60 * c.checkpoints.every_minutes)
    parts = {"training": total * mid, "first_step": costs.first_step, "health": (1 + len(checks)) * costs.health,
             "knn": len(probes) * costs.knn, "checkpoint": len(saves) * (1 + int(gap)) * costs.checkpoint}
    whole = sum(parts.values())
    return Projection(whole * low / mid, whole, whole * high / mid, parts, epochs, total)


# ---------------------------------------------------------------- budgeted


@dataclass(frozen=True)
class Option:
    """A preset that fits a budget: its name, a batch size and as many epochs as fit."""

    preset: str
    batch: int
    epochs: int
    projection: Projection
    complete: bool  # at least the preset's own epochs

    def overrides(self) -> str:
        return f"--set training.batch={self.batch} --set training.epochs={self.epochs}"


def fits(budget: float, presets: dict[str, Config], speed: Callable[[Config], Speed],
         scales: tuple[float, ...] = (0.5, 1, 2), most: int = 300) -> list[Option]:
    """What fits into `budget` seconds, even at the projection's high end; the best first.

    presets: by name; speed: a configuration's Speed here; scales: batch sizes to try, as multiples of the preset's own;
    most: no more epochs than these. First comes what reaches its preset's epochs, then the larger model, then the
    preset's own batch.
    """
    options = []
    for name, config in presets.items():
        rate = speed(config)
        for batch in {max(1, round(config.training.batch * s)) for s in scales}:
            sized = with_batch(config, batch)
            least = int(config.training.warmup_epochs) + 1
            tries = (project(sized, rate, epochs) for epochs in range(most, least - 1, -1))
            if done := next((p for p in tries if p.high <= budget), None):
                options.append(Option(name, batch, done.epochs, done, done.epochs >= config.training.epochs))
    return sorted(options, reverse=True, key=lambda o: (
        o.complete, flops_per_picture(presets[o.preset]).total, o.batch == presets[o.preset].training.batch, o.epochs))
