"""Training curves of a run, from metrics.jsonl alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mlx_hjepa.run import Run, UserError

Lines = list[dict[str, Any]]


def read_metrics(file: Path) -> dict[str, Lines]:
    """The lines of metrics.jsonl by kind; what is no line of ours, as a last one cut by a crash, is left out. Raises
    UserError without lines."""
    kinds: dict[str, Lines] = {}
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            line = json.loads(text)
            if line["step"] >= 0:
                kinds.setdefault(line["kind"], []).append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    if not kinds:
        raise UserError(f"{file}: no metrics yet")
    return kinds


def training_curves(run: Run, out: Path) -> None:
    """Four panels as a PNG: loss ratio and cosine; online k-NN; effective rank and std; speed and learning rate."""
    kinds = read_metrics(run.metrics_file)
    train, health, knn = (kinds.get(kind, []) for kind in ("train", "health", "knn"))
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    _lines(axes[0, 0], "loss / baseline", [
        ("loss ratio", train, lambda line: line["loss_ratio"]),
        ("cosine of prediction and target, last level", health, lambda line: line["cosine"][-1])])
    _lines(axes[0, 1], "online k-NN, held-out training pictures", [
        ("levels", knn, lambda line: line["levels"]), ("last", knn, lambda line: line["last"])])
    _lines(axes[1, 0], "effective rank", [("deepest level", health, lambda line: line["effective_rank"][-1])])
    _lines(axes[1, 0].twinx(), "normalised std", [("std (right)", health, lambda line: line["std"][-1])], "C1")
    _lines(axes[1, 1], "pictures / s", [("speed", train, lambda line: line["img_s"])])
    _lines(axes[1, 1].twinx(), "learning rate", [("lr (right)", train, lambda line: line["lr"])], "C1")
    axes[0, 0].set_ylim(0, 2)  # the first steps predict nothing yet and would hide the rest
    figure.suptitle(run.name)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _lines(axis: Any, label: str, series: list[tuple[str, Lines, Callable]], colour: str | None = None) -> None:
    for name, lines, value in series:
        points = [(line["epoch"], value(line)) for line in lines if value(line) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), label=name, color=colour, marker="." if len(points) < 40 else None)
    axis.set_xlabel("epoch")
    axis.set_ylabel(label)
    axis.legend(loc="upper right" if colour else "upper left", fontsize=8)
