"""What a run has written so far, as arrays: from its metrics.jsonl, or from the PyTorch original's console log."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hjepa.analyze.timing import labelled
from mlx_hjepa.config import Config, ConfigError
from mlx_hjepa.plots.curves import Lines, read_metrics
from mlx_hjepa.run import Run, UserError

SILENT = 600.0  # seconds without a line after which a run is taken for dead
TRAIN = ("step", "epoch", "steps", "loss", "loss_ratio", "lr", "momentum", "it_s", "wait_s", "peak_gb", "seconds",
         "bad", "bad_in_a_row", "time")
LOG_EVERY = 50  # steps for which the PyTorch original shows one and the same loss
TQDM = re.compile(
    r"Epoch (?P<epoch>\d+)/(?P<epochs>\d+):[^\r\n]*?\| *(?P<step>\d+)/(?P<of>\d+) \[(?P<elapsed>[\d:]+)<[^,\]]*, *"
    r"(?P<rate>[\d.]+|\?) *(?P<unit>it/s|s/it), loss=(?P<loss>[\d.eE+-]+|nan|inf), lr=(?P<lr>[\d.eE+-]+)")


def empty() -> np.ndarray:
    return np.zeros(0)


def smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """The running median of `width` values, an odd number, fewer at the ends."""
    padded = np.pad(values, width // 2, constant_values=np.nan)
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1) if len(values) else values


@dataclass
class History:
    """A run's log lines (one array element a line; nan where a line lacks the value), health checks and k-NN probes.

    `loss_ratio` is loss / baseline, `seconds` the training time so far, `steps` how many steps a line averages,
    `wait_s` the seconds a step waited for its pictures, `memory_gb` the device's memory. Health is of the deepest
    level, but `baseline` the smallest of all levels'. `judged` is what convergence is judged on: the loss ratio, or for
    the PyTorch original, which knows no baseline, the raw loss.
    """

    name: str
    step: np.ndarray = field(default_factory=empty)
    epoch: np.ndarray = field(default_factory=empty)
    steps: np.ndarray = field(default_factory=empty)
    loss: np.ndarray = field(default_factory=empty)
    loss_ratio: np.ndarray = field(default_factory=empty)
    lr: np.ndarray = field(default_factory=empty)
    momentum: np.ndarray = field(default_factory=empty)
    it_s: np.ndarray = field(default_factory=empty)
    wait_s: np.ndarray = field(default_factory=empty)
    peak_gb: np.ndarray = field(default_factory=empty)
    seconds: np.ndarray = field(default_factory=empty)
    bad: np.ndarray = field(default_factory=empty)
    bad_in_a_row: np.ndarray = field(default_factory=empty)
    time: np.ndarray = field(default_factory=empty)
    health_step: np.ndarray = field(default_factory=empty)
    std: np.ndarray = field(default_factory=empty)
    rank: np.ndarray = field(default_factory=empty)
    cosine: np.ndarray = field(default_factory=empty)
    baseline: np.ndarray = field(default_factory=empty)
    alarm: list[str | None] = field(default_factory=list)
    knn_step: np.ndarray = field(default_factory=empty)
    knn: np.ndarray = field(default_factory=empty)
    knn_last: np.ndarray = field(default_factory=empty)
    total: int | None = None
    epoch_steps: int | None = None
    batch: int | None = None
    device: str = ""
    memory_gb: float | None = None
    labelled: bool = True  # the pictures have classes
    encoder: str = ""  # as the PyTorch original's log names it
    hierarchies: int | None = None
    ended: bool = False
    finished: bool = False
    written: float = 0.0  # unix time of the last line
    config: Config | None = None
    pytorch: bool = False

    @property
    def last_step(self) -> int:
        return int(max((a[-1] for a in (self.step, self.health_step) if len(a)), default=0))

    @property
    def judged(self) -> np.ndarray:
        return self.loss if self.pytorch else self.loss_ratio

    @property
    def measure(self) -> str:
        return "raw loss" if self.pytorch else "loss ratio"

    @property
    def warmup(self) -> int | None:
        """Steps of warm-up; None where it is not known."""
        if self.config is None or not self.epoch_steps:
            return None
        return round(self.config.training.warmup_epochs * self.epoch_steps)

    def state(self, now: float | None = None) -> str:
        """finished; stopped (saved before its end); running; or silent: nothing written for ten minutes, or for three
        times its usual interval if that is longer."""
        if self.finished or self.ended:
            return "finished" if self.finished else "stopped"
        usual = float(np.median(np.diff(self.time))) if len(self.time) > 2 else 0.0
        quiet = (time.time() if now is None else now) - self.written
        return "running" if quiet < max(SILENT, 3 * usual) else "silent"

    def rates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(step, steps a second, seconds a step waited for data) of the lines whose rate can be trusted.

        Left out: the first, lines over fewer steps than usual and those right after them (a check or a checkpoint fell
        into their clock), and what is not finite or beyond three times the lines around it.
        """
        good = np.isfinite(self.it_s) & (self.it_s > 0)
        if len(self.step) > 3:
            good[0] = False
            windows = np.nan_to_num(self.steps)  # the PyTorch log has none
            short = windows < 0.9 * np.median(windows)
            good &= ~short & ~np.r_[False, short[:-1]]
        good[good] = self.it_s[good] < 3 * smooth(self.it_s[good])
        return self.step[good], self.it_s[good], self.wait_s[good]


def read(path: str | Path) -> History:
    """The history of a run's folder, of a metrics.jsonl, or of a console log of the PyTorch original.

    A run may be going on, have crashed, or have three lines. Raises UserError when there is nothing to read.
    """
    path = Path(path)
    if path.is_dir():
        return _from_metrics(path / "metrics.jsonl", Run(path))
    if not path.is_file():
        raise UserError(f"{path}: neither a run's folder nor a log file")
    if path.suffix == ".jsonl":
        return _from_metrics(path, None)
    return _from_log(path)


def _from_metrics(file: Path, run: Run | None) -> History:
    kinds = read_metrics(file)
    config = None
    if run is not None and run.config_file.is_file():
        try:
            config = run.config
        except ConfigError:
            config = None  # of another version: its numbers can still be read
    train, health, knn = (_in_order(kinds.get(kind, [])) for kind in ("train", "health", "knn"))
    begun = (kinds.get("resume") or kinds.get("start") or [{}])[-1]
    written = max(line.get("time") or 0.0 for lines in kinds.values() for line in lines)
    end = (kinds.get("end") or [{}])[-1]
    ended = bool(end) and (end.get("time") or 0.0) >= (begun.get("time") or 0.0)  # and was not resumed
    columns: dict[str, Any] = {key: _column(train, key) for key in TRAIN}
    return History(
        name=file.absolute().parent.name, **columns,
        health_step=_column(health, "step"), std=_column(health, "std", -1), rank=_column(health, "effective_rank", -1),
        cosine=_column(health, "cosine", -1), baseline=np.array([_smallest(line.get("baseline")) for line in health]),
        alarm=[line.get("alarm") for line in health], knn_step=_column(knn, "step"), knn=_column(knn, "levels"),
        knn_last=_column(knn, "last"), total=begun.get("total"), epoch_steps=begun.get("epoch_steps"),
        batch=begun.get("batch"), device=begun.get("device", ""), memory_gb=_memory(run), written=written, ended=ended,
        finished=ended and bool(end.get("finished")), config=config, labelled=bool(knn) or _labelled(run, config))


def _memory(run: Run | None) -> float | None:
    """The device's memory in GB, if the run's folder tells it."""
    try:
        return run.environment["memory"] / 1e9 if run else None
    except (UserError, KeyError, TypeError):
        return None


def _labelled(run: Run | None, config: Config | None) -> bool:
    """Whether the pictures of a run without probes have classes: as its folder tells, else as its pictures do."""
    try:
        return bool(run.environment["dataset"]["classes"]) if run else True
    except (UserError, KeyError, TypeError):
        return config is None or labelled(config)


def _in_order(lines: Lines) -> Lines:
    """By step; of lines of one step the last written, that of a resumed run, holds."""
    return [line for _, line in sorted({line["step"]: line for line in lines}.items())]


def _column(lines: Lines, key: str, item: int | None = None) -> np.ndarray:
    def number(value: Any) -> float:
        if item is not None and isinstance(value, list):
            value = value[item] if value else None
        return float(value) if isinstance(value, (int, float)) else np.nan  # null: it was not finite
    return np.array([number(line.get(key)) for line in lines], np.float64)


def _smallest(values: Any) -> float:
    numbers = [v for v in values or [] if v is not None]
    return min(numbers) if numbers else np.nan


# ---------------------------------------------------------------- the PyTorch original


def _from_log(path: Path) -> History:
    """tqdm's lines, `Epoch 1/5:  18%|.. | 283/1562 [01:50<08:10,  3.14it/s, loss=0.0042, lr=1.60e-05]`.

    tqdm counts from 0 in each epoch, repeats a loss for 50 steps, and turns to s/it below 1 it/s. Here steps count over
    epochs, of each 50 steps and of each epoch the last line is taken, with the median of their rates, and s/it is
    inverted.
    """
    text = path.read_bytes().decode("utf-8", "replace")
    rows: dict[tuple[int, int], dict[str, float]] = {}
    rates: dict[tuple[int, int], list[float]] = {}
    before, epoch, elapsed, matched = 0.0, 0, 0.0, None
    for matched in TQDM.finditer(text):
        if int(matched["epoch"]) != epoch:
            before, epoch = before + elapsed, int(matched["epoch"])
        elapsed, at, of = _seconds(matched["elapsed"]), int(matched["step"]), int(matched["of"])
        if not at and rows:  # the last line of the epoch before had this step
            continue
        place, step = (epoch, at // LOG_EVERY), (epoch - 1) * of + at
        if matched["rate"] != "?" and float(matched["rate"]) > 0:
            value = float(matched["rate"])
            rates.setdefault(place, []).append(value if matched["unit"] == "it/s" else 1 / value)
        rows[place] = {"step": step, "epoch": step / of, "loss": float(matched["loss"]), "lr": float(matched["lr"]),
                       "it_s": float(np.median(rates.get(place, [np.nan]))), "seconds": before + elapsed}
    if matched is None:
        raise UserError(f"{path}: no training lines found. Expected a run's folder, its metrics.jsonl, or the console "
                        "log of the PyTorch H-JEPA (Epoch 1/5: ... it/s, loss=..., lr=...)")
    of = int(matched["of"])
    columns: dict[str, Any] = {key: np.array([row.get(key, np.nan) for row in rows.values()], np.float64)
                               for key in TRAIN}
    finished = "Training completed!" in text
    return History(path.stem, **columns, total=int(matched["epochs"]) * of, epoch_steps=of,
                   batch=_number(r"Batch size: (\d+)", text), device=_word(r"Using device: (\S+)", text),
                   encoder=_word(r"Encoder: (\S+)", text), hierarchies=_number(r"Hierarchies: (\d+)", text),
                   ended=finished, finished=finished, written=path.stat().st_mtime, pytorch=True)


def _seconds(clock: str) -> float:
    total = 0
    for part in clock.split(":"):
        total = 60 * total + int(part)
    return float(total)


def _word(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""


def _number(pattern: str, text: str) -> int | None:
    word = _word(pattern, text)
    return int(word) if word else None
