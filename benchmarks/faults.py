#!/usr/bin/env python3
"""Break short runs of the digits on purpose, and print what `analyze` names for each.

    python benchmarks/faults.py [NAME ...] [--save]

Each run is configs/digits_demo.yaml for 20 epochs, some 40 s on two CPU cores, under results/faults/.

Targets without LayerNorm alone break no run of the digits, so that run starts its EMA at 0.5, too. With the norm this
collapses as well, but less. EMA 1 is a target that never moves.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import click

import mlx_hjepa  # noqa: F401  (it chooses the BLAS before MLX is imported)
from mlx_hjepa.analyze.faults import faults
from mlx_hjepa.analyze.history import TRAIN, read
from mlx_hjepa.cli import friendly
from mlx_hjepa.config import load
from mlx_hjepa.model import hjepa
from mlx_hjepa.run import RESULTS, Run, write_atomically
from mlx_hjepa.train.trainer import train

TOP = Path(__file__).parents[1]
SHORT = ("training.epochs=20", "logging.every_steps=22", "logging.health_every=2", "logging.knn_every=3",
         "checkpoints.every_epochs=0")
RUNS: dict[str, tuple[str, ...]] = {  # the overrides of each
    "healthy_digits": (),
    "broken_lr_x30": ("training.lr=0.06",),
    "broken_ema_0": ("training.ema=[0, 0]",),
    "broken_ema_1": ("training.ema=[1, 1]",),
    "broken_no_norm": ("training.ema=[0.5, 0.9999]",),
}
KEPT = {*TRAIN, "kind", "total", "epoch_steps", "batch", "precision", "device", "baseline", "cosine", "std",
        "effective_rank", "alarm", "last", "levels", "finished"}  # of the metrics, with --save


@click.command(help=__doc__)
@click.argument("names", nargs=-1, type=click.Choice([*RUNS]))
@click.option("--save", is_flag=True, help="Write each run's metrics, thinned, to tests/data.")
@friendly
def main(names: tuple[str, ...], save: bool) -> None:
    for name in names or RUNS:
        config = load(TOP / "configs/digits_demo.yaml", [*SHORT, *RUNS[name], f"name={name}"])
        run = Run.create(config, RESULTS / "faults")
        bare = mock.patch.object(hjepa, "layer_norm", lambda x: x)  # there it norms the targets alone
        with contextlib.redirect_stdout(io.StringIO()), bare if name == "broken_no_norm" else contextlib.nullcontext():
            finished = train(config, run)
        h = read(run.folder)
        found = ", ".join(f"{fault.name} ({fault.evidence})" for fault in faults(h)) or "no fault"
        click.echo(f"{name}: {h.seconds[-1]:.0f} s, k-NN {100 * h.knn[0]:.0f} to {100 * h.knn[-1]:.0f} %: {found}")
        if not finished:
            sys.exit(130)
        if save:
            lines = [_thin(json.loads(text)) for text in run.metrics_file.read_text().splitlines()]
            write_atomically(TOP / "tests" / "data" / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))


def _thin(line: dict[str, Any]) -> str:
    if line["kind"] == "train":
        line.pop("levels")  # the loss of each; in a k-NN line, its accuracy

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(v) for v in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value
    return json.dumps({key: value if key == "time" else short(value) for key, value in line.items() if key in KEPT})


if __name__ == "__main__":
    main()
