"""A data set, whatever it was read from: pictures, labels, a fingerprint, the mean and deviation of the colours."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hjepa import config
from mlx_hjepa.backend import cache_folder
from mlx_hjepa.run import UserError

dx: Any
try:
    import mlx.data as dx
except ImportError:  # no wheel: Python 3.14, Linux on Arm
    dx = None

AHEAD = 8  # batches prepared before they are asked for
VALIDATION, BANK = 5_000, 10_000  # pictures of the online k-NN, at most
Say = Callable[[str], None]
Colour = tuple[float, float, float]


class Pictures:
    """One split, held in memory.

    images: uint8 (n, H, W, 3). labels: int32 (n,), or None when unlabelled. names: file names, for folders.
    """

    names: list[str] | None = None

    def __init__(self, images: np.ndarray, labels: np.ndarray | None):
        self.images = images
        self.labels = labels
        self.shape: tuple[int, int, int] = images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """uint8 (len(indices), H, W, 3). Raises IndexError beyond 0 .. len(self) - 1."""
        return self.images[self.checked(indices)]

    def stream(self, indices: np.ndarray, batch: int, threads: int) -> Iterator[np.ndarray]:
        """The pictures in the order of `indices`, uint8 (batch, H, W, 3) at a time, prepared ahead by threads."""
        read = self.read if dx is None else partial(taken, self._buffer)
        yield from read_ahead(read, self.checked(indices), batch, threads)

    @cached_property
    def resident(self) -> mx.array:
        """Every picture as one uint8 (n, H, W, 3) array of the accelerator. Raises UserError when too large."""
        size = len(self) * int(np.prod(self.shape))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if size > memory / 2:
            raise UserError(f"the pictures take {size / 1e9:.1f} GB of this machine's {memory / 1e9:.0f} GB: "
                            "set data.source: stream")
        return mx.array(self.read(np.arange(len(self))))

    @cached_property
    def _buffer(self) -> Any:
        return dx.buffer_from_vector([{"image": image} for image in self.images])

    def checked(self, indices: np.ndarray) -> np.ndarray:
        """`indices` as int64; NumPy alone would count negative ones from the end, MLX would read beyond the array."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"pictures {indices.min()} to {indices.max()} were asked for; there are {len(self)}")
        return indices


def taken(buffer: Any, indices: np.ndarray) -> np.ndarray:
    """The pictures of an mlx-data buffer at `indices`, one batch."""
    return next(iter(buffer.perm(indices).batch(len(indices))))["image"]


def read_ahead(read: Callable[[np.ndarray], np.ndarray], indices: np.ndarray, batch: int,
               threads: int) -> Iterator[np.ndarray]:
    """Batches in order, read by threads, each as it is wanted.

    In place of mlx-data's ordered_prefetch, which is as fast but sets OpenBLAS to one thread at a moment of its own,
    for good: a run on the CPU would round differently from there on, and no two of them alike.
    """
    pool = ThreadPoolExecutor(threads)
    waiting: deque = deque()
    try:
        for start in range(0, len(indices), batch):
            waiting.append(pool.submit(read, indices[start:start + batch]))
            if len(waiting) == AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Dataset:
    """name: the label beside every result. mean, std: per channel of the training pictures, on the scale 0..1.

    fingerprint: SHA-256, hexadecimal; equal when pictures and labels are. note: what a reader of the results should
    know, one line. corrupt: names of the files that were left out.
    """

    name: str
    classes: list[str]
    train: Pictures
    test: Pictures | None
    fingerprint: str
    note: str | None
    mean: Colour
    std: Colour
    corrupt: tuple[str, ...] = ()


def load_dataset(data: config.Data, cache: Path | None = None, say: Say = print) -> Dataset:
    """Read the data set that the configuration names, fetching it when it must be; says the note, if there is one.

    cache: the folder for downloads and indices, by default $MLX_HJEPA_CACHE, else ~/.cache/mlx-hjepa.
    Raises UserError: no network, wrong digest, damaged or missing files, corrupt pictures.
    """
    from mlx_hjepa.data import cifar, digits, folder  # they need Pictures and Dataset from here

    readers = {"cifar10": cifar.load, "cifar100": cifar.load, "digits": digits.load, "folder": folder.load}
    dataset = readers[data.dataset](data, cache or cache_folder(), say)
    if dataset.note:
        say(dataset.note)
    if dx is None and (data.source == "stream" or data.dataset == "folder"):
        say("mlx-data has no wheel for this Python or machine: NumPy and Pillow threads read the pictures instead")
    return dataset


def describe(dataset: Dataset) -> dict[str, Any]:
    """The facts about a data set, as plain values."""
    return {
        "name": dataset.name, "classes": dataset.classes, "train": len(dataset.train),
        "test": len(dataset.test) if dataset.test else 0, "labelled": dataset.train.labels is not None,
        "picture": list(dataset.train.shape), "fingerprint": dataset.fingerprint, "mean": list(dataset.mean),
        "std": list(dataset.std), "note": dataset.note, "corrupt": list(dataset.corrupt),
    }


def moments(batches: Iterable[np.ndarray]) -> tuple[Colour, Colour]:
    """Mean and population standard deviation of each channel, on the scale 0..1, of uint8 (B, H, W, 3) batches.

    256 squares of a byte stay below 2**24, so the float32 sums over a slice are exact.
    """
    count, total, squares = 0, np.zeros(3), np.zeros(3)
    for images in batches:
        flat = images.reshape(len(images), -1)
        for start in range(0, len(flat), 256):
            values = flat[start:start + 256].astype(np.float32)
            total += values.sum(0).reshape(-1, 3).sum(0, dtype=np.float64)
            squares += np.square(values).sum(0).reshape(-1, 3).sum(0, dtype=np.float64)
        count += images.size // 3
    mean = total / count
    std = np.sqrt(squares / count - mean**2)
    return _colour(mean), _colour(std)


def _colour(values: np.ndarray) -> Colour:
    red, green, blue = (float(value) / 255 for value in values)
    return red, green, blue


def permutation(n: int, key: tuple[int, int]) -> np.ndarray:
    """0 .. n - 1 in an order that depends on `key` alone: Philox's raw bits are fixed for every NumPy, its
    Generator's shuffles are not (NEP 19)."""
    bits = np.random.Philox(key=np.array(key, np.uint64)).random_raw(n)
    return np.argsort(bits, kind="stable")


def validation_split(n: int, split_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(bank, validation): sorted, disjoint indices of n labelled training pictures, fixed by `split_seed` alone.

    Validation is 5,000 pictures, n // 10 when n < 50,000; the bank is 10,000 of the others, or all when fewer.
    """
    held = min(VALIDATION, n // 10)
    mixed = permutation(n, (split_seed, 2**63))  # 2**63: no epoch's order
    return np.sort(mixed[held:held + BANK]), np.sort(mixed[:held])
