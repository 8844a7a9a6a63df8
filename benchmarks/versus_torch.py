#!/usr/bin/env python3
"""MLX beside PyTorch on the same training step, on MPS, CUDA or the CPU: `python benchmarks/versus_torch.py`.

Both sides take turns within one run, MLX in this process and torch_step.py in another, and the ratio of their median
rates is printed with the peak memory of both. PyTorch is no dependency of mlx-hjepa: install it, or name a Python that
has it and this package with --python. Writes results/versus_torch/<machine>.json.
"""

from __future__ import annotations

import mlx_hjepa  # noqa: F401  # isort: skip  (it chooses the BLAS before MLX is imported)

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from rich.console import Console
from rich.table import Table
from throughput import facts, out_of_memory, plan, whole_numbers

from mlx_hjepa import backend
from mlx_hjepa.analyze import timing
from mlx_hjepa.analyze.timing import Row
from mlx_hjepa.cli import friendly
from mlx_hjepa.config import Config
from mlx_hjepa.run import RESULTS, UserError, read_json
from mlx_hjepa.train.step import Step

ROWS = {"default": ("192x12:4,8,12 384x6:2,4,6 384x12:4,8,12", "32,128,512"), "tiny": ("64x4:2,4 128x6:2,4,6", "16,64")}
DEVICES = {"cuda": "cuda", "metal": "mps", "cpu": "cpu"}
MODES = {"cuda": "default,reduce-overhead", "metal": "eager,default", "cpu": "eager,default"}
MEMORY = {"cuda": "the most that arrays held", "metal": "MLX: the most that arrays held; torch: the driver's pool",
          "cpu": "MLX: the most that arrays held; torch: how much its process grew"}
IDENTITY = ("model", "levels", "batch", "precision", "image_size", "torch_mode")
NOISY = 0.25


class Failed(Exception):
    """The PyTorch side could not do a row; its message."""


class TorchSide:
    """torch_step.py as a process: made ready on construction, then asked for turns."""

    def __init__(self, python: str, c: Config, mode: str):
        request = {"config": c.model_dump(mode="json"), "precision": timing.key(c)["precision"],
                   "device": DEVICES[backend.kind()], "mode": mode}
        self.words = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, str(Path(__file__).with_name("torch_step.py"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.words, text=True, bufsize=1, env={**os.environ, backend.NO_OPENBLAS: "1"})  # torch has its own
        self.ready = self.ask(json.dumps(request))

    def ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
            answer = json.loads(self.process.stdout.readline() or "{}")
        except BrokenPipeError:
            answer = {}
        if "error" in answer or not answer:
            self.close()
            self.words.seek(0)
            said = self.words.read().strip().splitlines() or ["it ended without a word"]
            raise Failed(answer.get("error") or said[-1])
        return answer

    def close(self) -> None:
        self.process.communicate()


class MlxSide:
    """The package's own step, in this process."""

    def __init__(self, c: Config):
        mx.clear_cache()
        self.beat: Iterator[float] = timing.pulses(c, Step)
        self.first_step_s = next(self.beat)
        mx.reset_peak_memory()
        list(islice(self.beat, 3))

    def run(self, steps: int) -> float:
        next(self.beat)  # the device was idle: its step is not measured
        return sum(islice(self.beat, steps))


def turns(mlx: MlxSide, torch: TorchSide, rounds: int, seconds: float) -> tuple[list[float], list[float], float]:
    """Rates of both in steps a second, a turn of each in every round, and torch's peak memory."""
    def steps(taken: float) -> int:
        return max(2, round(seconds / taken))

    mine, theirs = steps(mlx.run(2) / 2), steps(torch.ask("2")["seconds"] / 2)
    ours, others, peak = [], [], 0.0
    for _ in range(rounds):
        ours.append(mine / mlx.run(mine))
        answer = torch.ask(str(theirs))
        others.append(theirs / answer["seconds"])
        peak = answer["peak_gb"]
    return ours, others, peak


def compare(c: Config, modes: list[str], python: str, rounds: int, seconds: float) -> Iterator[Row]:
    """A row for each of torch's modes. Raises Failed, or MLX's own errors."""
    mlx = MlxSide(c)
    for mode in modes:
        torch = TorchSide(python, c, mode)
        try:
            ours, theirs, peak = turns(mlx, torch, rounds, seconds)
        finally:
            torch.close()
        a, b = statistics.median(ours), statistics.median(theirs)
        yield {**timing.key(c), "batch": c.training.batch, "torch_mode": mode, "mlx_it_s": a, "torch_it_s": b,
               "ratio": a / b, "mlx_peak_gb": backend.peak_memory_gb(), "torch_peak_gb": peak,
               "mlx_spread": (max(ours) - min(ours)) / 2 / a, "torch_spread": (max(theirs) - min(theirs)) / 2 / b,
               "mlx_first_step_s": mlx.first_step_s, "torch_first_step_s": torch.ready["first_step_s"],
               "torch": torch.ready["version"]}


def best(rows: list[Row]) -> list[Row]:
    """Of each point the row of torch's fastest mode."""
    points: dict[tuple, Row] = {}
    for row in rows:
        point = tuple(row[k] for k in IDENTITY[:-1])
        if point not in points or row["torch_it_s"] > points[point]["torch_it_s"]:
            points[point] = row
    return list(points.values())


def table(document: dict[str, Any]) -> Table:
    shown = Table("model", "levels", "px", "precision", "batch", "torch's mode", "MLX it/s", "torch it/s", "ratio",
                  "MLX GB", "torch GB", title=f"{document['machine']}: MLX over PyTorch")
    for r in document["rows"]:
        shown.add_row(r["model"], r["levels"], str(r["image_size"]), r["precision"], str(r["batch"]), r["torch_mode"],
                      f"{r['mlx_it_s']:.3g} ± {100 * r['mlx_spread']:.0f} %",
                      f"{r['torch_it_s']:.3g} ± {100 * r['torch_spread']:.0f} %", f"{r['ratio']:.2f}",
                      f"{r['mlx_peak_gb']:.2f}", f"{r['torch_peak_gb']:.2f}")
    return shown


def check(python: str) -> None:
    """Raises UserError when this Python cannot run the PyTorch side."""
    done = subprocess.run([python, "-c", "import torch, mlx_hjepa"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{python}: {done.stderr.strip().splitlines()[-1]}.\n"
                        "Install PyTorch beside mlx-hjepa, or name a Python that has both with --python")


@click.command(help=__doc__)
@click.option("--rows", type=click.Choice(list(ROWS)), default="default", show_default=True, help="tiny suits CPUs.")
@click.option("--models", help="Instead, such as '192x12:12 384x6:2,4,6'.")
@click.option("--configs", multiple=True, type=click.Path(), help="Instead, presets, at their own batch size.")
@click.option("--batches", help="Such as 32,128,512.")
@click.option("--precisions", default="auto", show_default=True, help="fp32, bf16.")
@click.option("--sizes", default="32", show_default=True, help="Picture sizes in pixels.")
@click.option("--modes", help="eager, default, reduce-overhead.  [default: by the machine]")
@click.option("--rounds", default=7, show_default=True)
@click.option("--seconds", default=1.5, show_default=True, help="Of a turn.")
@click.option("--python", default=sys.executable, help="A Python with PyTorch.  [default: this one]")
@click.option("--add", is_flag=True, help="Keep what the file holds of other rows.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "versus_torch", show_default=True)
@friendly
def main(rows: str, models: str | None, configs: tuple[str, ...], batches: str | None, precisions: str, sizes: str,
         modes: str | None, rounds: int, seconds: float, python: str, add: bool, out: Path) -> None:
    check(python)
    backend.set_cache_limit()
    chosen = plan(models or ("" if configs else ROWS[rows][0]), configs, precisions, sizes)
    numbers = whole_numbers(batches or ROWS[rows][1]) if batches or not configs else None
    file = timing.throughput_file(out)
    document = {"machine": file.stem, "device": facts(), "memory": MEMORY[backend.kind()], "failed": [], "rows": []}
    old = read_json(file)["rows"] if add and file.is_file() else []
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)

    def save() -> None:
        new = {tuple(timing.rounded([r[k] for k in IDENTITY])) for r in document["rows"]}
        whole = [r for r in old if tuple(r[k] for k in IDENTITY) not in new] + document["rows"]
        mean = statistics.geometric_mean([r["ratio"] for r in best(whole)]) if whole else None
        timing.write(file, document | {"rows": whole, "geometric_mean": mean})

    try:
        for sized in (timing.with_batch(c, n) for c in chosen for n in (numbers or [c.training.batch])):
            name = "{model}:{levels} {precision} {image_size} px, batch".format(**timing.key(sized))
            try:
                for r in compare(sized, (modes or MODES[backend.kind()]).split(","), python, rounds, seconds):
                    document["rows"].append(r)
                    console.print(f"{name} {r['batch']}, {r['torch_mode']}: {r['mlx_it_s']:.3g} over "
                                  f"{r['torch_it_s']:.3g} it/s = {r['ratio']:.2f}")
                    save()
            except (Failed, RuntimeError, MemoryError) as error:
                if not isinstance(error, Failed) and not out_of_memory(error):
                    raise
                document["failed"].append({"row": f"{name} {sized.training.batch}", "why": str(error)})
                console.print(f"{name} {sized.training.batch}: {error}", markup=False)
    except KeyboardInterrupt:
        console.print("stopped; what was done is kept")
    save()
    final = read_json(file)
    console.print(table(final))
    if any(max(r["mlx_spread"], r["torch_spread"]) > NOISY for r in final["rows"]):
        console.print("some rates vary by over 25 %: other programs run beside; measure again when they have ended")
    if final["rows"]:
        console.print(f"geometric mean over torch's best modes {final['geometric_mean']:.2f}; written to {file}")


if __name__ == "__main__":
    main()
