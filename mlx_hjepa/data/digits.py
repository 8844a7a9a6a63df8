"""Scikit-learn's handwritten digits: 1,797 pictures of 8 x 8 that come with the package, no network needed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from mlx_hjepa import config
from mlx_hjepa.data.dataset import Dataset, Pictures, Say, moments, permutation

TRAIN = 1_437  # the other 360 are the test set
NOTE = "8 x 8 digits: raw pixels win on pictures this small; what counts is the step from the random encoder"


def load(data: config.Data, cache: Path, say: Say) -> Dataset:
    """8 x 8 pictures, 16 grey levels scaled to 0..255, three equal channels."""
    from sklearn.datasets import load_digits  # a second to import, which only this data set should cost

    values, labels = load_digits(return_X_y=True)
    grey = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    images, labels = np.repeat(grey, 3, axis=3), labels.astype(np.int32)
    mixed = permutation(len(images), (0, 0))
    images, labels = images[mixed], labels[mixed]
    train, test = Pictures(images[:TRAIN], labels[:TRAIN]), Pictures(images[TRAIN:], labels[TRAIN:])
    fingerprint = hashlib.sha256(images.tobytes() + labels.astype("<i4").tobytes()).hexdigest()
    mean, std = moments([train.images])
    return Dataset("digits", [str(digit) for digit in range(10)], train, test, fingerprint, NOTE, mean, std)
