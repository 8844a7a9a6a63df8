"""What is evaluated: an encoder, or raw pixels, and its features on each split, computed once and kept."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_hjepa.config import Config
from mlx_hjepa.data.augment import resize
from mlx_hjepa.data.dataset import Dataset, Pictures, validation_split
from mlx_hjepa.evaluate import Features
from mlx_hjepa.evaluate.features import BATCH, FrozenEncoder
from mlx_hjepa.run import UserError, sync_folder

LEAKED = 0.01  # a collection may hold a few pictures twice
RAW_SIZE = 32  # larger pictures are reduced to this for the raw-pixel row
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Splits:
    """The pictures a report is about: a bank to learn from, a test split to score on, and rows of the bank held out to
    choose on. Labels are int (n,)."""

    train: Pictures
    train_rows: np.ndarray
    validation: np.ndarray
    test: Pictures
    test_rows: np.ndarray
    classes: list[str]
    note: str | None
    leaked: int = 0  # test pictures that are in the bank too

    @property
    def train_labels(self) -> np.ndarray:
        assert self.train.labels is not None
        return self.train.labels[self.train_rows]

    @property
    def test_labels(self) -> np.ndarray:
        assert self.test.labels is not None
        return self.test.labels[self.test_rows]

    def check(self) -> None:
        """Raise UserError when there are too few pictures to score, or a class has none in the bank."""
        if not len(self.validation) or not len(self.test_rows):
            raise UserError(f"{len(self.train_rows)} training and {len(self.test_rows)} test pictures are too few to "
                            "score: it takes 10 labelled training pictures, a tenth to be held out, and 1 test picture")
        missing = np.setdiff1d(np.arange(len(self.classes)), self.train_labels)
        if len(missing):
            raise UserError(f"class {self.classes[missing[0]]!r} has no picture in the bank of {len(self.train_rows)}, "
                            "so no probe can find it. Use a larger --subset, or more pictures of it")


def splits(dataset: Dataset, split_seed: int, subset: int | None = None, held_out: bool = False) -> Splits:
    """All training pictures as the bank and the whole test split; `subset` takes that many of each, spread evenly.

    held_out, and data without a test split: the validation pictures are scored instead, and left out of the bank.
    Raises UserError without labels.
    """
    if dataset.train.labels is None:
        raise UserError("these pictures have no labels, so there is nothing to score. Lay them out as train/<class>/*, "
                        "or take their features: mlx-hjepa embed")
    rows, note = np.arange(len(dataset.train)), None
    if dataset.test is None or held_out:
        held = validation_split(len(rows), split_seed)[1]
        rows, test, test_rows = np.setdiff1d(rows, held), dataset.train, held
        why = "not the test set" if held_out else "no test split"
        note = f"{why}: scored on {len(held)} training pictures held out from the probes"
    else:
        test, test_rows = dataset.test, np.arange(len(dataset.test))
    if test.labels is None:
        raise UserError("the test pictures have no labels")
    rows, test_rows = (_spread(r, subset) for r in (rows, test_rows))
    leaked = _leaks(dataset.train, rows, test, test_rows)
    validation = validation_split(len(rows), split_seed)[1]
    return Splits(dataset.train, rows, validation, test, test_rows, dataset.classes, note, leaked)


def mirrored(config: Config, dataset: Dataset) -> bool:
    """Whether the probes learn from mirror images too: where the run took them; a mirrored digit is another one."""
    return config.augment.flip and dataset.name != "digits"


def _spread(rows: np.ndarray, count: int | None) -> np.ndarray:
    return rows if count is None or count >= len(rows) else rows[np.linspace(0, len(rows) - 1, count).astype(int)]


def _leaks(bank: Pictures, rows: np.ndarray, test: Pictures, test_rows: np.ndarray) -> int:
    """How many test pictures lie in the bank, byte for byte. Raises UserError when they are more than LEAKED."""
    known = set(_fingerprints(bank, rows))
    leaked = sum(f in known for f in _fingerprints(test, test_rows))
    if leaked > LEAKED * len(test_rows):
        raise UserError(f"{leaked} of the {len(test_rows)} test pictures are in the training pictures too, so their "
                        "scores would mean nothing. Take them out of one of the two")
    return leaked


def _fingerprints(pictures: Pictures, rows: np.ndarray) -> Iterator[bytes]:
    for start in range(0, len(rows), BATCH):
        for picture in pictures.read(rows[start : start + BATCH]):
            yield hashlib.blake2b(picture.tobytes(), digest_size=12).digest()


class Subject:
    """One row of the table. `depths` is empty for raw pixels, whose only level is `last`."""

    def __init__(self, name: str, split: Splits, encoder: FrozenEncoder | None, cache: Path | None = None,
                 key: str = "", progress: Progress | None = None):
        self.name, self.split, self.encoder = name, split, encoder
        self.cache, self.key, self.progress = cache, key, progress
        self.depths = encoder.levels if encoder else []
        self._kept: dict[tuple[str, bool], np.ndarray] = {}

    @property
    def levels(self) -> list[str | int]:
        """What can be scored: `last`, and for an encoder of several depths `levels` and each depth but the last."""
        if len(self.depths) < 2:
            return ["last"]
        return ["last", "levels", *self.depths[:-1]]

    def depth_features(self, split: str, mirror: bool = False) -> np.ndarray:
        """(n, depths, D) of `train` or `test`; raw pixels are one depth."""
        if (split, mirror) not in self._kept:
            self._kept[split, mirror] = self._cached(split, mirror)
        return self._kept[split, mirror]

    def _cached(self, split: str, mirror: bool) -> np.ndarray:
        if self.cache is None or self.encoder is None:
            return self._compute(split, mirror)
        rows = self.split.train_rows if split == "train" else self.split.test_rows
        about = f"{self.key} {self.encoder.depths} {split} {mirror} "
        print_of = hashlib.sha256(about.encode() + rows.tobytes()).hexdigest()[:16]
        file = self.cache / f"{self.name}-{split}{'-mirror' if mirror else ''}-{print_of}.npy"
        if file.exists():
            with contextlib.suppress(ValueError, OSError, EOFError):  # a damaged one is written anew
                return np.load(file)
        found = self._compute(split, mirror)
        self.cache.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as out:
                np.save(out, found)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(self.cache)
        _remove_stale(file)
        return found

    def _compute(self, split: str, mirror: bool) -> np.ndarray:
        s = self.split
        pictures, rows = (s.train, s.train_rows) if split == "train" else (s.test, s.test_rows)
        done = 0

        def step(count: int) -> None:
            nonlocal done
            done += count
            if self.progress:
                self.progress(f"{self.name}: {split}{' mirrored' if mirror else ''}", done, len(rows))

        if self.encoder:
            return self.encoder.extract(pictures, rows, mirror, step)
        out = []
        for start in range(0, len(rows), BATCH):
            images = pictures.read(rows[start : start + BATCH])
            out.append(_pixels(images[:, :, ::-1] if mirror else images))
            step(len(out[-1]))
        return np.concatenate(out)[:, None]

    def features(self, split: str, level: str | int, mirror: bool = False) -> Features:
        """Features of a level with their labels."""
        labels = self.split.train_labels if split == "train" else self.split.test_labels
        plain = self._select(self.depth_features(split), level)
        other = self._select(self.depth_features(split, True), level) if mirror else None
        return Features(plain, labels.astype(np.int64), other)

    def _select(self, features: np.ndarray, level: str | int) -> np.ndarray:
        return self.encoder.select(features, level) if self.encoder else features[:, 0]


def _remove_stale(file: Path) -> None:
    """Remove the features that `file` takes the place of, and what processes that are dead left unfinished."""
    for other in file.parent.glob(f"{file.stem.rpartition('-')[0]}-{'[0-9a-f]' * 16}.npy"):
        if other != file:
            other.unlink(missing_ok=True)
    for other in file.parent.glob("*.tmp"):
        try:
            os.kill(int(other.name.split(".")[-2]), 0)
        except ProcessLookupError:
            other.unlink(missing_ok=True)
        except (ValueError, OSError):  # no number of a process, or another user's
            continue


def _pixels(images: np.ndarray) -> np.ndarray:
    """uint8 (n, H, W, 3) -> float32 (n, pixels * 3) in 0..1, at most RAW_SIZE a side."""
    x = images.astype(np.float32)
    if max(images.shape[1:3]) > RAW_SIZE:
        x = np.array(resize(mx.array(x), RAW_SIZE))
    return x.reshape(len(x), -1) / 255
