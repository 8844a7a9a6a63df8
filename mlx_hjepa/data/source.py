"""The batches of a run: which pictures each step sees, and how they reach the accelerator.

The order depends on (seed, epoch) alone, so a run resumes at any step, and the streamed and the resident source
give the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

import mlx.core as mx
import numpy as np

from mlx_hjepa.data.dataset import Pictures, permutation
from mlx_hjepa.run import UserError

STREAMED = 1 << 20  # indices handed to one stream; a 100-epoch list would only cost memory


def steps_per_epoch(n: int, batch: int) -> int:
    """floor(n / batch). Raises UserError when the batch is larger than the data."""
    if batch > n:
        raise UserError(f"training.batch {batch} is larger than the {n} training pictures: lower training.batch")
    return n // batch


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n pictures in an epoch, int64 (n,), read-only; it depends on (seed, epoch) alone."""
    mixed = permutation(n, (seed, epoch))
    mixed.setflags(write=False)
    return mixed


def indices(seed: int, step: int, n: int, batch: int) -> np.ndarray:
    """The pictures of a step, int64 (batch,). The tail of an epoch that fills no batch is dropped."""
    epoch, position = divmod(step, steps_per_epoch(n, batch))
    return order(seed, epoch, n)[position * batch:(position + 1) * batch]


def batches(pictures: Pictures, source: Literal["stream", "resident"], seed: int, batch: int, start: int, stop: int,
            threads: int, rows: np.ndarray | None = None) -> Iterator[mx.array]:
    """uint8 (batch, H, W, 3) for the steps start .. stop - 1. rows: the pictures to train on, by default all.

    Raises UserError when the batch is larger than the data, or a file changes or vanishes on the way.
    """
    rows = np.arange(len(pictures)) if rows is None else pictures.checked(rows)
    steps_per_epoch(len(rows), batch)
    read = _resident if source == "resident" else _streamed
    return read(pictures, rows, seed, batch, range(start, stop), threads)


def _resident(pictures: Pictures, rows: np.ndarray, seed: int, batch: int, steps: range,
              threads: int) -> Iterator[mx.array]:
    whole, n = pictures.resident, len(rows)
    per_epoch, held = steps_per_epoch(n, batch), -1
    for step in steps:
        epoch, position = divmod(step, per_epoch)
        if epoch != held:  # once an epoch; see hjepa.Ahead
            mixed, held = mx.array(rows[order(seed, epoch, n)].astype(np.uint32)), epoch
        yield whole[mixed[position * batch:(position + 1) * batch]]


def _streamed(pictures: Pictures, rows: np.ndarray, seed: int, batch: int, steps: range,
              threads: int) -> Iterator[mx.array]:
    stride = max(1, STREAMED // batch)
    for first in range(0, len(steps), stride):
        part = [indices(seed, step, len(rows), batch) for step in steps[first:first + stride]]
        for images in pictures.stream(rows[np.concatenate(part)], batch, threads):
            yield mx.array(images)
