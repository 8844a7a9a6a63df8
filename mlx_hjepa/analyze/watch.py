"""A live view of a run, from what it writes alone; it ends with the analysis."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlx_hjepa.analyze.faults import faults
from mlx_hjepa.analyze.history import SILENT, History, read
from mlx_hjepa.analyze.measures import progress, time_left
from mlx_hjepa.analyze.recommend import Times
from mlx_hjepa.analyze.report import analyze, summary
from mlx_hjepa.run import Run, UserError, duration


def watch(source: Run | Path, times: Times | None = None, refresh: float = 5.0, say: Callable[[str], None] = print,
          console: Console | None = None) -> dict[str, Any] | None:
    """Show a run while it writes, from its metrics alone; when it ends, or is silent for ten minutes, analyse it, say
    what next and return the analysis. On a terminal a live view, else a line for each new one. Ctrl-C ends the view,
    not the run, and returns None. Raises UserError when nothing is written within ten minutes.
    """
    where = source.folder if isinstance(source, Run) else Path(source)
    console, began, shown = console or Console(), time.time(), -1
    try:
        with contextlib.ExitStack() as stack:
            live = None
            if console.is_terminal:
                live = stack.enter_context(Live(console=console, auto_refresh=False, transient=True))
            while (h := _read(where, began)) is None or h.state() == "running":
                if h is not None and live is not None:
                    live.update(view(h), refresh=True)
                elif h is not None and len(h.step) and h.last_step > shown:
                    shown = h.last_step
                    say(status(h))
                time.sleep(refresh)
    except KeyboardInterrupt:
        say("no longer watching; the run goes on")
        return None
    result = analyze(source, times)
    for line in summary(result):
        say(line)
    return result


def _read(where: Path, began: float) -> History | None:
    """None while nothing is written yet."""
    try:
        return read(where)
    except UserError:
        if time.time() - began > SILENT:
            raise
        return None


def status(h: History) -> str:
    """The run's newest numbers in one line."""
    rate = [*h.it_s[-1:], *h.rates()[1][-1:]][-1]
    parts = [f"epoch {h.epoch[-1]:.2f}", progress(h.last_step, h.total), f"{h.measure} {h.judged[-1]:.4g}",
             f"lr {h.lr[-1]:.2e}", f"{rate:.2f} it/s"]
    if len(h.health_step):
        parts.append(f"rank {h.rank[-1]:.0f} std {h.std[-1]:.2f}")
    if len(h.knn):
        parts.append(f"k-NN {100 * h.knn[-1]:.1f} %")
    left = time_left(h)
    return "  ".join([*parts, f"{duration(left[1])} left"] if left else parts)


def view(h: History) -> Group:
    """The live view: progress, numbers, the course of the loss ratio, and the faults so far."""
    table = Table.grid(padding=(0, 2))
    table.add_row(h.name, ProgressBar(h.total or 1, h.last_step, width=40))
    if len(h.step):
        table.add_row("", status(h))
        table.add_row(h.measure, spark(h.judged))
    if len(h.knn):
        table.add_row("online k-NN", spark(h.knn))
    for fault in faults(h):
        table.add_row(Text(fault.name, style="bold red"), fault.evidence)
    return Group(table)


def spark(values: np.ndarray, width: int = 60) -> str:
    """Numbers as a row of bars, the newest last."""
    values = values[np.isfinite(values)]
    if not len(values):
        return ""
    means = np.array([part.mean() for part in np.array_split(values, min(width, len(values)))])
    height = (means - means.min()) / (np.ptp(means) or 1)
    return "".join("▁▂▃▄▅▆▇█"[int(7.99 * value)] for value in height)
