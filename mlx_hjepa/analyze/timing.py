"""How long training takes: measured steps, the fit of a step's time, and what a run costs by it.

A row is one measured point as results/throughput/<machine>.json holds it (docs/performance.md names its keys).
"""

from __future__ import annotations

import gc
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from mlx_hjepa import backend
from mlx_hjepa.analyze.flops import Row, flops_per_picture, key, parameters
from mlx_hjepa.config import PICTURES, Config
from mlx_hjepa.data.dataset import BANK, VALIDATION, Pictures
from mlx_hjepa.data.source import batches
from mlx_hjepa.model.hjepa import HJEPA, keys_of
from mlx_hjepa.run import RESULTS, UserError, read_json, write_atomically
from mlx_hjepa.schedule import Schedule

HEALTH_PICTURES = 512  # what a health check encodes at most
DISK = 0.5e9  # bytes a second of a checkpoint, hashed and synced, where none was measured
STEPS = 1_000_000
OVERLAPS = (1, 2, 3, 4)  # 1 first: of equals the simplest
POINT = ("model", "levels", "precision", "image_size", "gflop")  # rows with these in common have one fit


class Costs(NamedTuple):
    """Seconds of what is not a step; None where nobody measured it."""

    first_step: float | None = None  # with its compilation
    encode: float | None = None  # a picture, for the health check and the k-NN probe
    check: float | None = None  # loss and baseline of a health check
    feature_statistics: float | None = None  # a picture's share of the feature statistics
    knn_search: float | None = None  # a query and a picture of the bank
    checkpoint: float | None = None


UNKNOWN = Costs()
NEEDS = {"health": ("encode", "check"), "knn": ("encode",), "checkpoint": ("checkpoint",)}  # what can be estimated


class Speed(Protocol):
    """What `project` asks: seconds a step (low, mid, high) at a batch size, the costs, and what both rest on."""

    @property
    def costs(self) -> Costs: ...

    @property
    def basis(self) -> str: ...

    def step(self, batch: int) -> tuple[float, float, float]: ...


# ---------------------------------------------------------------- measured


def pulses(config: Config, make_step: Callable[..., Any]) -> Iterator[float]:
    """Seconds of each training step, without end; the first is the one that compiles.

    make_step: `train.step.Step`, handed in because `analyze` does not import `train`. The loop is the trainer's, with
    made-up pictures from the configured source, and one step prepared while the one before it runs.
    """
    batch = config.training.batch
    side = {"digits": 8, "folder": config.data.image_size}.get(config.data.dataset, 32)
    images = np.random.default_rng(0).integers(0, 256, (max(2_000, 16 * batch), side, side, 3), dtype=np.uint8)
    source = batches(Pictures(images, None), config.data.source, 0, batch, 0, STEPS, config.data.threads)
    model, schedule = HJEPA(config, (0.5,) * 3, (0.25,) * 3), Schedule(config.training, 1_000)
    step = make_step(model, schedule, backend.precision(config.training.precision))
    state, weights, previous, keys = step.initial_state(), [1.0] * len(model.levels), None, keys_of(0)
    mark = time.perf_counter()
    with backend.both_cores():
        for i, pictures in enumerate(source):
            state, stats = step(state, pictures, keys(i), step.scalars(i % schedule.total, weights))
            mx.async_eval(state.arrays(), stats)
            mx.eval(stats if previous is None else previous)
            previous = stats
            yield time.perf_counter() - mark
            mark = time.perf_counter()


def measure(config: Config, make_step: Callable[..., Any], steps: int = 30, seconds: float = 10.0,
            window: int = 5, limit: float = math.inf) -> Row:
    """One row: the step's rate at the configuration's batch size, over at least `steps` steps and `seconds`.

    Before that it warms up until the medians of two windows of steps agree within 5 %, for `seconds` at most. it_s is
    the median of up to ten groups of steps, spread half their range from the 10th to the 90th percentile, relative.
    limit: seconds after which, warm-up included, two steps are enough.
    """
    gc.collect()  # a step and its compiled functions hold one another, and their arrays: the last row's
    mx.clear_cache()
    beat = pulses(config, make_step)
    first = next(beat)
    mx.reset_peak_memory()
    limit -= _warm_up(beat, window, seconds)
    times: list[float] = []
    while len(times) < 2 or (sum(times) < limit and (len(times) < steps or sum(times) < seconds)):
        times.append(next(beat))
    beat.close()  # type: ignore[attr-defined]
    groups = [float(part.mean()) for part in np.array_split(times, min(10, len(times)))]
    second, batch, found = statistics.median(groups), config.training.batch, key(config)
    spread = float(np.subtract(*np.percentile(groups, [90, 10]))) / 2 / second
    return {**found, "batch": batch, "it_s": 1 / second, "img_s": batch / second, "spread": spread,
            "tflops": found["gflop"] * batch / second / 1e3, "peak_gb": backend.peak_memory_gb(),
            "first_step_s": first, "steps": len(times)}


def _warm_up(beat: Iterator[float], window: int, limit: float) -> float:
    times = [next(beat) for _ in range(2 * window)]
    while sum(times) < limit:
        before, now = statistics.median(times[-2 * window:-window]), statistics.median(times[-window:])
        if abs(now / before - 1) < 0.05:
            break
        times.append(next(beat))
    return sum(times)


def with_batch(config: Config, batch: int) -> Config:
    """The configuration at another batch size, in one part."""
    training = config.training.model_copy(update={"batch": batch, "accumulation": 1})
    return config.model_copy(update={"training": training})


def together(row: Row, again: Row) -> Row:
    """One row of a point's two measurements: their mean time a step, and a spread that covers both."""
    a, b = 1 / row["it_s"], 1 / again["it_s"]
    second = (a + b) / 2
    rates: Row = {name: row[name] * a / second for name in ("it_s", "img_s", "tflops", "matrix_share") if name in row}
    return {**row, **rates, "spread": max(row["spread"], again["spread"], abs(a - b) / 2 / second),
            "peak_gb": max(row["peak_gb"], again["peak_gb"]), "steps": row["steps"] + again["steps"],
            "first_step_s": min(row["first_step_s"], again["first_step_s"])}


def measure_here(config: Config, make_step: Callable[..., Any], seconds: float = 20.0) -> list[Row]:
    """Rows for a first `fit`, in about `seconds` of steps (compilation comes on top): batch sizes from 2, each four or
    two times the last, up to the configuration's own, while five steps at the last's rate still fit; two at least."""
    rows: list[Row] = []
    batch, left, mark = min(2, max(1, config.training.batch // 4)), seconds, stamp(backend.environment(), True)
    while True:
        began = time.perf_counter()
        limit = left if rows else left / 2
        rows.append(measure(with_batch(config, batch), make_step, 5, seconds / 8, 1, limit) | mark)
        left -= time.perf_counter() - began - rows[-1]["first_step_s"]
        most = min(config.training.batch, rows[-1]["img_s"] * left / 5)
        batch *= 4 if 4 * batch <= most else 2
        if batch > most and len(rows) > 1:
            return rows


def stamp(environment: dict[str, Any], quick: bool) -> Row:
    """What tells a row's origin: device, commit (+ where files had changed), and whether it was a quick look."""
    commit = environment["commit"] and environment["commit"][:7] + "+" * bool(environment["dirty"])
    return {"device": environment["name"], "commit": commit, "quick": quick}


# ---------------------------------------------------------------- fitted


@dataclass(frozen=True)
class Fit:
    """t = (a^p + (b * B)^p)^(1/p) seconds a step: a the floor of launches and optimizer, b the time of a picture.

    overlap: p. With 1, t = a + b * B: one after the other; the larger, the more of the launches is hidden behind the
    device's work, up to the larger of the two. `interval` is the relative half-width of a predicted t."""

    a: float
    b: float
    interval: float
    costs: Costs = UNKNOWN
    basis: str = ""
    overlap: int = 1

    def step(self, batch: int) -> tuple[float, float, float]:
        t = (self.a**self.overlap + (self.b * batch) ** self.overlap) ** (1 / self.overlap)
        return t * (1 - self.interval), t, t * (1 + self.interval)

    def errors(self, rows: list[Row]) -> np.ndarray:
        """Predicted / measured - 1 of each row."""
        return np.array([self.step(r["batch"])[1] * r["it_s"] - 1 for r in rows])


def fit(rows: list[Row]) -> Fit:
    """The Fit of one model's rows, by least squares of the relative error, with a, b >= 0; of the overlaps the one that
    leaves least, where there are rows enough to tell.

    interval: twice the root of the residuals' variance plus the median spread squared, at least 3 %, and 10 % from two
    rows, which no residual checks. Raises UserError for fewer than two batch sizes.
    """
    sizes = len({r["batch"] for r in rows})
    if sizes < 2:
        raise UserError("a fit needs two batch sizes: run python benchmarks/throughput.py with more --batches")
    tries = [_line(rows, overlap) for overlap in (OVERLAPS if sizes > 2 else OVERLAPS[:1])]
    found = min(tries, key=lambda f: float(np.square(f.errors(rows)).sum()))
    variance = float(np.square(found.errors(rows)).sum()) / max(1, len(rows) - 2)
    spread = statistics.median(r.get("spread", 0.0) for r in rows)
    interval = max(0.03 if len(rows) > 2 else 0.10, 2 * (variance + spread**2) ** 0.5)
    return replace(found, interval=min(interval, 0.9))


def _line(rows: list[Row], overlap: int) -> Fit:
    """With u = t^p and v = B^p a line again: u = a^p + b^p v, whose relative errors are p times those of t."""
    batch, t = np.array([r["batch"] for r in rows], float), np.array([1 / r["it_s"] for r in rows], float)
    v, u = (batch / batch.max()) ** overlap, (t / t.max()) ** overlap
    x = np.stack([1 / u, v / u], axis=1)
    a, b = np.linalg.lstsq(x, np.ones(len(t)), rcond=None)[0]
    if a < 0 or b < 0:  # all floor, or none
        column = x[:, int(a < 0)]
        value = column.sum() / (column @ column)
        a, b = (0.0, value) if a < 0 else (value, 0.0)
    root = 1 / overlap
    return Fit(float(a**root * t.max()), float(b**root * t.max() / batch.max()), 0.0, overlap=overlap)


def left_out(rows: list[Row]) -> dict[int, float]:
    """For each batch size but the smallest and the largest: predicted by the fit of the others / measured - 1."""
    rows = sorted(rows, key=lambda r: r["batch"])
    return {row["batch"]: fit([r for r in rows if r is not row]).step(row["batch"])[1] * row["it_s"] - 1
            for row in rows[1:-1] if len(rows) > 2}


# ---------------------------------------------------------------- kept


def machine_name(device: dict[str, Any]) -> str:
    """The file name of a machine, from `backend.device()`: apple-m1-max-32-cores, amd-epyc-2-threads."""
    name = re.sub(r"[^a-z0-9]+", "-", device["name"].lower().replace("(r)", "").replace("(tm)", "")).strip("-")
    if device["kind"] == "cuda":
        return name
    return f"{name}-{device['threads']}-threads" if device["kind"] == "cpu" else f"{name}-{device['gpu_cores']}-cores"


def throughput_file(folder: Path = RESULTS / "throughput") -> Path:
    """This machine's file."""
    return folder / f"{machine_name(backend.device())}.json"


def document(environment: dict[str, Any]) -> dict[str, Any]:
    """What a machine's file holds, without measurements."""
    return {"machine": machine_name(environment), "device": environment, "matrix_tflops": {}, "rows": [], "fits": [],
            "out_of_memory": [], "sustained": None}


def recorded(file: Path) -> dict[str, Any]:
    """A machine's file; nothing measured where there is none, or one of an older layout. Raises UserError: damaged."""
    found = read_json(file) if file.is_file() else document(backend.device())
    return found if all("quick" in row for row in found["rows"]) else document(backend.device())


def same(a: Row, b: Row) -> bool:
    """Whether two rows, fits or keys are of one model, in one precision and picture size."""
    return all(a[k] == b[k] for k in POINT[:-1]) and abs(a["gflop"] / b["gflop"] - 1) < 0.01


def fitted(rows: list[Row], costs: Costs, launches: float | None = None) -> Row:
    """One model's entry among a document's fits."""
    found = fit(rows)
    return {**{k: rows[0][k] for k in POINT}, "a": found.a, "b": found.b, "overlap": found.overlap,
            "interval": found.interval, "left_out": left_out(rows), "costs": costs._asdict(), "launches": launches}


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` with what `old` has beyond it: rows of other points, fits of other models; fits are made of all rows."""
    whole = {**new, "matrix_tflops": old["matrix_tflops"] | new["matrix_tflops"],
             "sustained": new["sustained"] or old["sustained"]}
    for what, identity in (("rows", (*POINT, "batch")), ("fits", POINT), ("out_of_memory", (*POINT, "batch"))):
        entries = {tuple(rounded([e[k] for k in identity])): e for e in old[what] + new[what]}
        whole[what] = [entries[name] for name in sorted(entries)]
    for f in whole["fits"]:
        f |= fitted([r for r in whole["rows"] if same(r, f)], Costs(**f["costs"]), f["launches"])
    return whole


def rounded(value: Any) -> Any:
    """A JSON value with its numbers to five digits that count."""
    return json.loads(json.dumps(value), parse_float=lambda digits: float(f"{float(digits):.5g}"))


def write(file: Path, contents: dict[str, Any]) -> None:
    """Write a machine's file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(rounded(contents), indent=1))


def measured(config: Config, file: Path) -> Fit | None:
    """A configuration's fit from a machine's file; None below two batch sizes. Raises UserError: a damaged file."""
    found, wanted = recorded(file), key(config)
    rows = [r for r in found["rows"] if same(r, wanted)]
    sizes = sorted({r["batch"] for r in rows})
    if len(sizes) < 2:
        return None
    costs = next((Costs(**f["costs"]) for f in found["fits"] if same(f, wanted)), UNKNOWN)
    quick = any(r["quick"] for r in rows)
    basis = "a guess from a few seconds of steps" if quick else "the fit of benchmarks/throughput.py"
    return replace(fit(rows), costs=costs, basis=f"{basis} on {rows[-1]['device']}, batch {str(sizes)[1:-1]}")


# ---------------------------------------------------------------- projected


@dataclass(frozen=True)
class Projection:
    """Seconds of a whole run; `parts` are those of mid: training, first_step, health, knn, checkpoint.

    estimated: parts whose costs were not measured but computed; not_counted: costs that are in no part.
    """

    low: float
    mid: float
    high: float
    parts: dict[str, float]
    epochs: int
    steps: int
    estimated: list[str]
    not_counted: list[str]


def estimated_costs(config: Config, speed: Speed) -> Costs:
    """Costs from the step's own rate, where none were measured: encoding by its FLOPs, a checkpoint by its bytes."""
    flops, batch = flops_per_picture(config), config.training.batch
    picture = speed.step(batch)[1] / batch
    encoder, predictor = parameters(config)
    return Costs(encode=picture * flops.target / flops.total, check=HEALTH_PICTURES * picture / 2,
                 checkpoint=(16 * encoder + 12 * predictor) / DISK)


def labelled(config: Config) -> bool:
    """Whether the pictures have classes, so that k-NN probes them; a folder that is not here is taken to have."""
    root = Path(config.data.root or "").expanduser()
    return config.data.dataset != "folder" or not root.is_dir() or any(p.is_dir() for p in root.glob("train/*"))


def project(config: Config, speed: Speed, epochs: int | None = None, pictures: int | None = None) -> Projection:
    """The time of a run: its steps, and the checks, probes and checkpoints that `logging` and `checkpoints` ask for.

    pictures: of the training split, known for all but folders. Raises UserError where unknown, or less than a batch.
    """
    c, pictures = config, pictures or PICTURES.get(config.data.dataset)
    if not pictures:
        raise UserError("data.dataset: folder needs the number of its training pictures (mlx-hjepa data tells it)")
    held = min(VALIDATION, pictures // 10)
    epochs = epochs or c.training.epochs
    per_epoch = (pictures - held * c.data.hold_out) // c.training.batch
    if not per_epoch:
        raise UserError(f"training.batch {c.training.batch} is larger than the {pictures} training pictures")
    (low, mid, high), total = speed.step(c.training.batch), epochs * per_epoch

    def due(every: float) -> set[int]:
        return {*range(period, total, period), total} if (period := round(every * per_epoch)) else set()

    checks, probes = due(c.logging.health_every), due(c.logging.knn_every) if labelled(c) else set()
    saves = due(c.checkpoints.every_epochs) | probes | {total}  # each probe may be the best yet
    gap = total * mid / len(saves) / (60 * c.checkpoints.every_minutes)
    known, guess = speed.costs._asdict(), estimated_costs(c, speed)._asdict()
    costs = {name: guess[name] if value is None else value for name, value in known.items()}
    cost = {name: value or 0.0 for name, value in costs.items()}
    bank = min(BANK, pictures - held)
    parts = {
        "training": total * mid, "first_step": cost["first_step"],
        "health": (1 + len(checks)) * (held * (cost["encode"] + cost["feature_statistics"]) + cost["check"]),
        "knn": len(probes) * ((held + bank) * cost["encode"] + held * bank * cost["knn_search"]),
        "checkpoint": len(saves) * (1 + int(gap)) * cost["checkpoint"]}
    whole = sum(parts.values())
    return Projection(whole * low / mid, whole, whole * high / mid, parts, epochs, total,
                      [part for part, needs in NEEDS.items() if any(known[name] is None for name in needs)],
                      [name for name, value in costs.items() if value is None])
