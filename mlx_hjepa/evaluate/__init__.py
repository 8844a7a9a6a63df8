"""How good the features of an encoder are. Nothing here imports from `mlx_hjepa.train`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_hjepa.run import UserError


@dataclass(frozen=True)
class Features:
    """Features of n pictures: plain (n, D) float32, labels (n,) int, and those of the mirror images (n, D), if any."""

    plain: np.ndarray
    labels: np.ndarray
    mirror: np.ndarray | None = None

    def check(self, classes: int, what: str) -> None:
        """Raise UserError for features or labels that no protocol could use."""
        check_features(self.plain, what)
        check_labels(self.labels, len(self.plain), classes, what)
        if self.mirror is not None:
            check_features(self.mirror, f"{what} (mirror images)")
            if self.mirror.shape != self.plain.shape:
                raise UserError(f"{what}: mirror images of shape {self.mirror.shape}, plain ones {self.plain.shape}; "
                                "compute both again")


def check_features(features: np.ndarray, what: str) -> None:
    """Raise UserError unless `features` is a finite (N, D) array with at least one row."""
    if features.ndim != 2 or not features.size:
        raise UserError(f"{what}: features of shape {features.shape}; expected (pictures, dimensions), neither 0")
    for start in range(0, len(features), 1 << 14):  # in blocks: a million rows need no mask of their size
        finite = np.isfinite(features[start:start + (1 << 14)]).all(axis=1)
        if not finite.all():
            raise UserError(f"{what}: the features of picture {start + int(np.argmin(finite))} are not finite; "
                            "the checkpoint may come from a run that diverged")


def check_labels(labels: np.ndarray, rows: int, classes: int, what: str) -> None:
    """Raise UserError unless `labels` is (rows,) integers in 0 .. classes - 1: MLX checks no index."""
    if labels.shape != (rows,):
        raise UserError(f"{what}: {rows} pictures, but labels of shape {labels.shape}; each picture needs one label")
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{what}: labels must be integers, found {labels.dtype}")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{what}: labels from {labels.min()} to {labels.max()}; the data set has {classes} classes, "
                        f"0 to {classes - 1}")
