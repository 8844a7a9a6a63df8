#!/usr/bin/env python3
"""Pictures a second of each data source and of augmentation, beside what training needs: `python benchmarks/loader.py`.

The needs are the fastest rows of results/throughput/<machine>.json. Writes results/loader/<machine>.json.
"""

from __future__ import annotations

import mlx_hjepa  # noqa: F401  # isort: skip  (it chooses the BLAS before MLX is imported)

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from throughput import model_config

from mlx_hjepa import backend, config
from mlx_hjepa.analyze import timing
from mlx_hjepa.cli import friendly
from mlx_hjepa.data.dataset import Pictures, load_dataset
from mlx_hjepa.data.source import batches
from mlx_hjepa.model.hjepa import HJEPA, key_of
from mlx_hjepa.run import RESULTS, read_json

PICTURES = 10_000  # made-up ones, of CIFAR's size
FILES = 512
NOISE = np.random.default_rng(0)


def rate(source: Iterator[mx.array], batch: int, seconds: float) -> float:
    """Pictures a second that come out of a source, after its first ten batches."""
    for _ in range(10):
        mx.eval(next(source))
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        mx.eval(next(source))
        count += 1
    return count * batch / (time.perf_counter() - start)


def smooth_pictures(count: int, size: int) -> np.ndarray:
    """uint8 (count, size, size, 3) that compress about as photographs do: noise of a tenth of the size, enlarged."""
    small = NOISE.integers(0, 256, (count, size // 8, size // 8, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC)) for p in small])


def folder_pictures(folder: Path, stored: int, wanted: int, threads: int) -> Pictures:
    """A folder of JPEG files of `stored` pixels, read as `wanted` ones."""
    root = folder / f"pictures-{stored}"
    root.mkdir()
    for i, picture in enumerate(smooth_pictures(FILES, stored)):
        Image.fromarray(picture).save(root / f"{i}.jpg", quality=90)
    data = config.Data(dataset="folder", root=str(root), image_size=wanted, threads=threads)
    return load_dataset(data, folder / "cache", say=lambda _: None).train


def augmentation(c: config.Config, batch: int) -> Iterator[mx.array]:
    """Augmented, normalised patches of one batch, again and again, as the compiled step makes them."""
    prepare = mx.compile(HJEPA(c, (0.5,) * 3, (0.25,) * 3).prepare)
    images = mx.array(NOISE.integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8))
    step = 0
    while True:
        yield prepare(images, key_of(0, step))
        step += 1


def rates(batch: int, threads: int, seconds: float) -> dict[str, float]:
    """Pictures a second by source."""
    found, cifar = {}, Pictures(NOISE.integers(0, 256, (PICTURES, 32, 32, 3), dtype=np.uint8), None)

    def of(pictures: Pictures, source: Any) -> float:
        return rate(batches(pictures, source, 0, batch, 0, timing.STEPS, threads), batch, seconds)

    digits = load_dataset(config.Data(dataset="digits"), say=lambda _: None).train
    for name, pictures in (("CIFAR", cifar), ("digits", digits)):
        found |= {f"{name}, {source}": of(pictures, source) for source in ("stream", "resident")}
    batch = min(batch, FILES // 2)
    with tempfile.TemporaryDirectory() as folder:
        for stored, wanted in ((64, 32), (256, 224)):
            files = folder_pictures(Path(folder), stored, wanted, threads)
            for source in ("stream", "resident"):
                found[f"folder, JPEG of {stored} px as {wanted} px, {source}"] = of(files, source)
    plain, large = model_config("vit_tiny"), model_config("vit_tiny", size=224)
    found["augmentation, 32 px"] = rate(augmentation(plain, batch), batch, seconds)
    jittered = large.model_copy(update={"augment": large.augment.model_copy(update={"jitter": 0.4})})
    batch = min(batch, 32)
    found["augmentation, 32 to 224 px with colours"] = rate(augmentation(jittered, batch), batch, seconds)
    return found


def ratio(value: float) -> str:
    """Two digits that count: 0.043, 1.4, 1,200."""
    return f"{float(f'{value:.2g}'):,.10g}"


def needs(file: Path) -> dict[str, float]:
    """The most pictures a second that each measured model trains on."""
    found: dict[str, float] = {}
    for row in read_json(file)["rows"] if file.is_file() else []:
        name = f"{row['model']}, {row['image_size']} px"
        found[name] = max(found.get(name, 0.0), row["img_s"])
    return found


@click.command(help=__doc__)
@click.option("--batch", default=256, show_default=True)
@click.option("--threads", default=4, show_default=True, help="Threads of the streamed sources.")
@click.option("--seconds", default=3.0, show_default=True, help="Of each measurement.")
@click.option("--throughput", "file", type=click.Path(path_type=Path), help="Measured rates.  [default: those here]")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "loader", show_default=True)
@friendly
def main(batch: int, threads: int, seconds: float, file: Path | None, out: Path) -> None:
    needed = needs(file or timing.throughput_file())
    found = rates(batch, threads, seconds)
    table = Table("source", "pictures/s", *(f"x {name}" for name in needed), title="as many times as the model needs")
    for source, speed in found.items():
        table.add_row(source, f"{speed:,.0f}", *(ratio(speed / need) for need in needed.values()))
    console = Console(highlight=False)
    console.print(table)
    if not needed:
        console.print("no rates of this machine yet: run python benchmarks/throughput.py first")
    target = out / f"{timing.machine_name(backend.device())}.json"
    document = {"device": backend.environment(), "batch": batch, "threads": threads, "img_s": found, "needs": needed}
    timing.write(target, document)
    console.print(f"written to {target}")


if __name__ == "__main__":
    main()
