#!/usr/bin/env python3
"""Measure the training step on this machine: `python benchmarks/throughput.py [--quick]`.

Sweeps batch sizes, up and down again, for each model, precision and picture size, and fits t = a + b * B, or what comes
of it where launches hide behind the device's work (timing.Fit). Prints tables and writes a picture and
results/throughput/<machine>.json, from which `mlx-hjepa project` tells how long a run takes. Running out of memory ends
a model's row of batches; Ctrl-C keeps what is done.

Among the default models on a GPU are those of the presets for 32 px, without SIGReg. Those for 224 px, and any other
configuration, are measured with --add --configs configs/compat/m1_max_quick_val.yaml, at a quarter, half and all of
their batch.
"""

from __future__ import annotations

import mlx_hjepa  # noqa: F401  # isort: skip  (it chooses the BLAS before MLX is imported)

import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np
from kernels import graph, launches, step_of
from rich.console import Console
from rich.table import Table

from mlx_hjepa import backend, config
from mlx_hjepa.analyze import timing
from mlx_hjepa.analyze.timing import Row
from mlx_hjepa.cli import friendly
from mlx_hjepa.config import Config, ConfigError
from mlx_hjepa.evaluate.features import FrozenEncoder
from mlx_hjepa.evaluate.knn import knn_accuracy
from mlx_hjepa.model.hjepa import key_of
from mlx_hjepa.run import RESULTS, Run, read_json
from mlx_hjepa.train import checkpoint, health
from mlx_hjepa.train.step import DTYPES, Step, part

MODELS = {"gpu": "192x12:4,8,12 192x12:2,4,6,8,10,12*4 384x6:2,4,6 "
                 "384x6:1,2,3,4,5,6*4/20/16 384x6:1,2,3,4,5,6*8/20/16 384x12:4,8,12 384x12:2,4,6,8,10,12*2/20/16 "
                 "384x12:2,4,6,8,10,12*4/20/16",
          "cpu": "64x4:2,4 128x6:2,4,6 192x12:4,8,12", "quick": "64x4:2,4 128x6:2,4,6"}
BATCHES = {"gpu": "32,64,128,256,512,1024", "cpu": "8,16,32,64", "quick": "16,32,64"}
EPOCHS = (5, 20, 50, 100)
LIKELY_BATCH = 128  # of the picture of hours, as in most presets
MATRIX = {"cuda": (8192, 10), "metal": (4096, 2), "cpu": (1536, 1)}  # size of the product, how many in a row


# ---------------------------------------------------------------- what to measure


def model_config(spec: str, precision: str = "auto", size: int = 32) -> Config:
    """`192x12:4,8,12`, or a size's name; levels at thirds of the depth when left out; `12/2` pools 2 x 2 windows; `*4`
    at the end takes four masks a picture, `*4/20/16` each of 20 context and 16 predicted tokens.

    Patches of 4 at 32 px, of 16 at 224 px. Raises ConfigError.
    """
    found = re.fullmatch(r"(?:(\d+)x(\d+)|(\w+))(?::(\d+(?:/\d+)?(?:,\d+(?:/\d+)?)*))?"
                         r"(?:\*(\d+)(?:/(\d+)/(\d+))?)?", spec)
    if not found or (found[3] and found[3] not in config.SIZES):
        raise ConfigError(f"--models {spec}: write it as 192x12:4,8,12, or one of {', '.join(config.SIZES)}")
    dim, depth = config.SIZES[found[3]] if found[3] else (int(found[1]), int(found[2]))
    chosen = found[4].split(",") if found[4] else sorted({max(1, depth * i // 3) for i in (1, 2, 3)})
    split, narrow = [[int(n) for n in str(level).split("/")] for level in chosen], min(192, dim)
    patch = {32: 4, 224: 16}.get(size, max(1, size // 8))
    tokens = {64: 28}.get((size // patch) ** 2, int(0.39 * (size // patch) ** 2))
    seen, wanted = int(found[6] or tokens), int(found[7] or tokens)
    return config.build({
        "name": "throughput", "data": {"image_size": size}, "training": {"precision": precision},
        "model": {"dim": dim, "depth": depth, "patch": patch, "head_dim": math.gcd(dim, 64),
                  "levels": [dict(zip(("depth", "pool"), level, strict=False)) for level in split]},
        "predictor": {"dim": narrow, "depth": 4 if depth >= 6 else 2, "head_dim": math.gcd(narrow, 64)},
        "masking": {"target_tokens": wanted, "context_tokens": seen, "masks_per_image": int(found[5] or 1)}},
        f"--models {spec}")


def plan(models: str, configs: tuple[str, ...], precisions: str, sizes: str) -> list[Config]:
    """The configurations to sweep over batch sizes."""
    specs = [model_config(m, p, s) for m in models.split() for p in precisions.split(",") for s in whole_numbers(sizes)]
    return specs + [config.load(path, [f"training.precision={p}"]) for path in configs for p in precisions.split(",")]


def whole_numbers(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ConfigError(f"{text}: write numbers with commas between them")
    return [int(n) for n in text.split(",")]


# ---------------------------------------------------------------- measuring


def matrix_tflops(precision: str) -> float:
    """What this machine reaches in large square matrix products, TFLOP/s; the best of six."""
    size, count = MATRIX[backend.kind()]
    x = (mx.random.normal((size, size)) * size**-0.5).astype(DTYPES[precision])

    def multiply() -> None:
        y = x
        for _ in range(count):
            y = y @ x
        mx.eval(y)

    return 2 * size**3 * count / min(seconds(multiply) for _ in range(6)) / 1e12


def seconds(work: Callable[[], Any], times: int = 1) -> float:
    """What it takes; of the last time, where the first compiles."""
    for _ in range(times):
        start = time.perf_counter()
        work()
    return time.perf_counter() - start


def costs(c: Config, first_step: float) -> timing.Costs:
    """What encoding, a health check, the online k-NN and a checkpoint take, from 512 pictures and CIFAR's k-NN bank.

    A kernel's first compilation on a machine is not counted: MLX keeps them (MLX_PTX_CACHE_DIR), and a run finds them.
    """
    step = step_of(c)
    state, rng = step.initial_state(), np.random.default_rng(0)
    images = rng.integers(0, 256, (timing.HEALTH_PICTURES, 32, 32, 3), dtype=np.uint8)
    probe = FrozenEncoder(c, part(step.layout.views(state.target), "encoder"), step.model.mean, step.model.std)
    held = rng.normal(size=(timing.VALIDATION, len(probe.depths), probe.dim)).astype(np.float32)
    bank, labels = np.concatenate([held, held]), np.arange(2 * timing.VALIDATION) % 10

    def search() -> None:
        for view in (lambda x: x[:, -1], lambda x: x.reshape(len(x), -1)):
            knn_accuracy(view(bank), labels, view(held), labels[: len(held)], 10, ks=(20,))

    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder)
        run.checkpoints.mkdir()
        saving = seconds(lambda: checkpoint.save(run, state, step.layout, {"step": 0}))
    return timing.Costs(
        first_step, seconds(lambda: probe.depth_features(images), 2) / len(images),
        seconds(lambda: mx.eval(step.health(state, mx.array(images), key_of(0, 0))), 2),
        seconds(lambda: health.statistics(held), 2) / len(held), seconds(search, 2) / len(held) / len(bank), saving)


def sweep(configs: list[Config], batches: list[int] | None, effort: dict[str, Any], quick: bool,
          document: dict[str, Any], done: Callable[[], None], say: Callable[[str], None]) -> None:
    """Measure each configuration at each batch size into `document`; `done` is called after each configuration.

    batches: None takes a quarter, half and all of the configuration's own.
    """
    mark = timing.stamp(document["device"], quick)
    for c in configs:
        precision, nodes = timing.key(c)["precision"], None
        if precision not in document["matrix_tflops"]:
            document["matrix_tflops"][precision] = matrix_tflops(precision)
        rows, own = [], c.training.batch
        for batch in batches or sorted({max(1, own // 4), max(1, own // 2), own}):
            sized = timing.with_batch(c, batch)
            try:
                if rows and rows[-1]["peak_gb"] * batch / rows[-1]["batch"] > 0.9e-9 * backend.device()["memory"]:
                    raise MemoryError  # before the machine swaps, or Linux kills
                nodes = nodes or graph(sized)
                row = timing.measure(sized, Step, **effort)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                document["out_of_memory"].append({**timing.key(c), "batch": batch})
                say(f"{timing.key(c)['model']} at batch {batch}: out of memory")
                break
            rows.append(row | mark | {"matrix_share": row["tflops"] / document["matrix_tflops"][precision],
                                      "kernels": len(nodes[0]), "kernels_with_copies": len(nodes[0]) + nodes[1]})
            document["rows"].append(rows[-1])
            say(f"{row['model']}:{row['levels']} {precision} {row['image_size']} px, batch {batch}: "
                f"{row['it_s']:.3g} it/s, {row['img_s']:,.0f} img/s, first step {row['first_step_s']:.1f} s")
        for row in [] if quick else reversed(rows):  # and back: a host that is slower for a while slows no size alone
            row |= timing.together(row, timing.measure(timing.with_batch(c, row["batch"]), Step, **effort))
        if len({row["batch"] for row in rows}) > 1:
            smallest = timing.with_batch(c, rows[0]["batch"])
            beside = costs(smallest, min(row["first_step_s"] for row in rows))
            document["fits"].append(timing.fitted(rows, beside, launches(smallest)))
        done()


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or bool(re.search(r"malloc|memory|allocat", str(error), re.IGNORECASE))


def sustained(c: Config, minutes: float) -> dict[str, Any]:
    """The rate over a longer time, in its first and last tenth, and macOS's words on the heat after it."""
    beat, times = timing.pulses(c, Step), []
    list(islice(beat, 5))
    while sum(times) < 60 * minutes:
        times.append(next(beat))
    tenth = max(1, len(times) // 10)
    cold, settled = (1 / float(np.mean(share)) for share in (times[:tenth], times[-tenth:]))
    return {**timing.key(c), "batch": c.training.batch, "minutes": minutes, "it_s_cold": cold, "it_s_settled": settled,
            "thermal": thermal()}


def thermal() -> str | None:
    """What macOS says of the heat; None elsewhere."""
    if sys.platform != "darwin":
        return None
    return subprocess.run(["pmset", "-g", "therm"], capture_output=True, text=True).stdout.strip()


def facts() -> dict[str, Any]:
    """The machine, the code, its power and heat."""
    return {**backend.environment(), "on_battery": backend.on_battery(), "thermal": thermal()}


# ---------------------------------------------------------------- telling


def tables(document: dict[str, Any]) -> list[Table]:
    """The rows, and the fits."""
    rows = Table("model", "levels", "px", "precision", "batch", "it/s", "img/s", "TFLOP/s", "of matrix rate", "GB",
                 "kernels", "first step", "measured", title=document["machine"])
    for r in document["rows"]:
        whole = "kernels" in r  # else a row of `mlx-hjepa project`
        rows.add_row(r["model"], r["levels"], str(r["image_size"]), r["precision"], str(r["batch"]),
                     f"{r['it_s']:.3g} ± {100 * r['spread']:.0f} %", f"{r['img_s']:,.0f}", f"{r['tflops']:.3g}",
                     f"{100 * r['matrix_share']:.1f} %" if whole else "-", f"{r['peak_gb']:.2f}",
                     f"{r['kernels']} ({r['kernels_with_copies']})" if whole else "-", f"{r['first_step_s']:.1f} s",
                     f"{r['commit'] or '-'}{', quick' * r['quick']}")
    fits = Table("model", "levels", "px", "precision", "a", "b a picture", "p", "interval", "left out", "launches",
                 "encode a picture", "checkpoint", title="t = (a^p + (b * B)^p)^(1/p)")
    for f in document["fits"]:
        errors = ", ".join(f"{batch}: {100 * error:+.1f} %" for batch, error in f["left_out"].items())
        fits.add_row(f["model"], f["levels"], str(f["image_size"]), f["precision"], f"{1e3 * f['a']:.2f} ms",
                     f"{1e6 * f['b']:.1f} µs", str(f["overlap"]), f"± {100 * f['interval']:.0f} %", errors,
                     f"{f['launches'] or '-'}",
                     *("-" if f["costs"][name] is None else f"{1e3 * f['costs'][name]:.3g} ms"
                       for name in ("encode", "checkpoint")))
    return [rows, fits]


def picture(document: dict[str, Any], cadence: Config, file: Path) -> None:
    """it/s and img/s against batch size; hours of 5 to 100 epochs by the fit, checked and saved as `cadence` asks."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def named(entries: list[Row]) -> dict[str, list[Row]]:
        groups: dict[str, list[Row]] = {}
        for e in entries:
            groups.setdefault("{model}, levels {levels}, {image_size} px, {precision}".format(**e), []).append(e)
        return groups

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.8), constrained_layout=True)
    for label, rows in named(document["rows"]).items():
        for axis, what in zip(axes, ("it_s", "img_s"), strict=False):
            axis.plot([r["batch"] for r in rows], [r[what] for r in rows], "o-", label=label)
    for label, fits in named(document["fits"]).items():
        speed = timing.Fit(*(fits[-1][k] for k in ("a", "b", "interval")), timing.Costs(**fits[-1]["costs"]),
                           overlap=fits[-1]["overlap"])
        sized = timing.with_batch(cadence, LIKELY_BATCH)
        done = [timing.project(sized, speed, epochs, timing.PICTURES["cifar10"]) for epochs in EPOCHS]
        spread = [[(p.mid - p.low) / 3600 for p in done], [(p.high - p.mid) / 3600 for p in done]]
        axes[2].errorbar(EPOCHS, [p.mid / 3600 for p in done], spread, fmt="o-", capsize=3, label=label)
    sizes = sorted({r["batch"] for r in document["rows"]})
    for axis, title in zip(axes, ("steps a second", "pictures a second"), strict=False):
        axis.set(xscale="log", yscale="log", xlabel="batch size", title=title)
        axis.set_xticks(sizes, labels=sizes)
        axis.set_xticks([], minor=True)
    axes[2].set(yscale="log", xlabel="epochs", ylabel="hours", xticks=EPOCHS,
                title=f"50,000 pictures, batch {LIKELY_BATCH}, with evaluation: by the fit")
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    quick = any(r["quick"] for r in document["rows"])
    figure.suptitle(document["device"]["name"] + (", some of it measured for seconds only" if quick else ""))
    figure.savefig(file, dpi=110)


@click.command(help=__doc__)
@click.option("--models", help="Such as '192x12:4,8,12 vit_small'.  [default: by the machine]")
@click.option("--configs", multiple=True, type=click.Path(), help="Configurations to measure instead; several allowed.")
@click.option("--batches", help="Such as 32,128,512.  [default: by the machine; with --configs 1/4, 1/2, 1 of theirs]")
@click.option("--precisions", default="auto", show_default=True, help="Such as fp32,bf16.")
@click.option("--sizes", default="32", show_default=True, help="Picture sizes in pixels, such as 32,224.")
@click.option("--quick", is_flag=True, help="Two small models, three batches, 5 steps and 3 s a point.")
@click.option("--sustained", "minutes", type=float, default=0.0, help="Then run the first model for so many minutes.")
@click.option("--add", is_flag=True, help="Keep what the file holds of other models and batches.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "throughput", show_default=True)
@friendly
def main(models: str | None, configs: tuple[str, ...], batches: str | None, precisions: str, sizes: str, quick: bool,
         minutes: float, add: bool, out: Path) -> None:
    backend.set_cache_limit()
    here = "quick" if quick else "cpu" if backend.kind() == "cpu" else "gpu"
    chosen = plan(models or ("" if configs else MODELS[here]), configs, precisions, sizes)
    numbers = whole_numbers(batches) if batches else None if configs else whole_numbers(BATCHES[here])
    effort = {"steps": 5, "seconds": 3.0, "window": 1} if quick else {"steps": 15, "seconds": 5.0}
    document, file = timing.document(facts()), timing.throughput_file(out)
    old = timing.recorded(file) if add else timing.document(document["device"])
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)

    def save() -> None:
        timing.write(file, timing.merged(old, document))

    try:
        sweep(chosen, numbers, effort, quick, document, save, console.print)
        if minutes:
            longer = timing.with_batch(chosen[0], numbers[-1]) if numbers else chosen[0]
            document["sustained"] = sustained(longer, minutes)
            console.print("{it_s_cold:.3g} it/s cold, {it_s_settled:.3g} settled".format(**document["sustained"]))
    except KeyboardInterrupt:
        console.print("stopped; what was done is kept")
    save()
    final = read_json(file)
    for table in tables(final):
        console.print(table)
    if final["rows"]:
        picture(final, chosen[0], file.with_suffix(".png"))
    console.print(f"matrix products: {', '.join(f'{p} {v:.4g} TFLOP/s' for p, v in final['matrix_tflops'].items())}; "
                  f"written to {file}")


if __name__ == "__main__":
    main()
