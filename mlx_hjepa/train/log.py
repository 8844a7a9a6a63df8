"""What a run tells: metrics.jsonl, train.log, the terminal, and TensorBoard or W&B on request."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from mlx_hjepa.config import Config
from mlx_hjepa.run import Run, UserError, write_atomically


class Log:
    """Opened for one process's share of a run, from step `start` of `total`; a context manager that closes what it
    opened."""

    def __init__(self, run: Run, config: Config, start: int, total: int):
        self.metrics, self.text = (open(f, "a", encoding="utf-8")  # noqa: SIM115  (open as long as the run)
                                   for f in (run.metrics_file, run.log_file))
        self.board = _tensorboard(run, start) if config.logging.tensorboard else None
        self.wandb = _wandb(run, config) if config.logging.wandb else None
        self.console = Console(highlight=False)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        if sys.stdout.isatty():
            status = TextColumn("{task.fields[status]}", table_column=Column(ratio=1, no_wrap=False))
            self.bar = Progress(BarColumn(12), status, console=self.console, transient=True, expand=True)
            self.task = self.bar.add_task("", total=total, completed=start, status="compiling the step ...")
            self.bar.start()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
        for closing in (self.metrics, self.text, self.board):
            if closing:
                closing.close()
        if self.wandb:
            self.wandb.finish()

    def record(self, kind: str, step: int, **values: Any) -> None:
        """One line of metrics.jsonl; its numbers also go to TensorBoard and W&B."""
        values = _plain(values)
        self.metrics.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3)} | values) + "\n")
        self.metrics.flush()
        numbers = {f"{kind}/{k}": v for k, v in _flat(values) if type(v) in (int, float)}
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def keep(self, text: str) -> None:
        """A line of train.log, with the time."""
        self.text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self.text.flush()

    def line(self, text: str) -> None:
        """A line that stays, on the terminal and in train.log."""
        self.keep(text)
        self.console.print(text, markup=False, soft_wrap=True)

    def status(self, step: int, text: str) -> None:
        """Progress: beside a bar on a terminal, a plain line otherwise."""
        if self.bar:
            self.bar.update(self.task, completed=step, status=text)
            self.keep(text)
        else:
            self.line(text)


def truncate(metrics: Path, step: int) -> None:
    """Drop the lines after `step`, and a last one cut by a crash: temporary name, rename."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_atomically(metrics, "".join(f"{line}\n" for line in kept))


def _plain(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes null. Floats keep 6 digits."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _flat(values: dict[str, Any]) -> list[tuple[str, Any]]:
    pairs = []
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            pairs += [(f"{name}_{i}", v) for i, v in enumerate(value)]
        else:
            pairs.append((name, value))
    return pairs


def _tensorboard(run: Run, start: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("logging.tensorboard needs a writer: pip install 'mlx-hjepa[tensorboard]'") from None
    return SummaryWriter(str(run.folder / "tensorboard"), purge_step=start + 1)


def _wandb(run: Run, config: Config) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("logging.wandb needs its package: pip install 'mlx-hjepa[wandb]'") from None
    began = int(run.config_file.stat().st_mtime)  # a resumed run goes on in the same place
    return wandb.init(project="mlx-hjepa", name=run.name, id=f"{run.name}-{began}", resume="allow",
                      dir=str(run.folder), config=config.model_dump(mode="json"))
