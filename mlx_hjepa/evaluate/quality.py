"""Are the features worth probing? Statistics of the test pictures' features, of augmented views, and a verdict.

Each statistic is defined, with its source, in `mlx_hjepa.metrics`. None of them sees a label, and noise scores well in
most: read them beside k-NN and the untrained encoder.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hjepa import metrics
from mlx_hjepa.config import Augment
from mlx_hjepa.evaluate.features import BATCH, FrozenEncoder
from mlx_hjepa.evaluate.subject import Subject
from mlx_hjepa.model.hjepa import HJEPA
from mlx_hjepa.model.vit import Weights, pooled_features
from mlx_hjepa.run import UserError

PICTURES, VIEWS = 1000, 16
SPECTRUM = 64


def quality(subject: Subject, untrained: dict[str, Any] | None = None, pictures: int = PICTURES, views: int = VIEWS,
            seed: int = 0) -> dict[str, Any]:
    """What the features of the test split are like, as plain values for JSON.

    by_level: the statistics of `last`, `levels` and each depth; verdict, reason: of `last`, for a lower depth may be
    nearly constant and still tell classes apart. cka: linear CKA between depths, all near 1
    when the hierarchy is idle. views: alignment of two augmented views and LiDAR, of `last`; None for raw pixels, for a
    run that augments nothing, and with `views` under 2.

    untrained: what this function returned for the untrained encoder, which the verdict then compares with.
    pictures, views: the first is cut to the test split; the encoder is run pictures x views times, by default 16,000.
    The LiDAR paper takes 50 views of 1,000 pictures. 16 leave 15,000 degrees of freedom for the covariance within a
    picture, many times the width, at a third of the cost; but that covariance / views is in the one between pictures,
    which lifts every eigenvalue by 1 / views. Compare LiDAR only at equal numbers, which are in the result.
    Raises UserError for features that are not finite, or fewer than 3 test pictures.
    """
    by_level: dict[str, Any] = {}
    known = (untrained or {}).get("by_level", {})
    for level in subject.levels:
        features = subject.features("test", level)
        features.check(len(subject.split.classes), f"feature quality, {subject.name}")
        if len(features.plain) < 3:
            raise UserError(f"feature quality: {len(features.plain)} test pictures; it needs at least 3")
        by_level[str(level)] = statistics(features.plain)
    return {"pictures": len(subject.split.test_rows),
            **_verdict(by_level["last"], len(subject.split.test_rows), known.get("last")), "by_level": by_level,
            "cka": _similarity(subject), "views": _views(subject, pictures, views, seed)}


def statistics(features: np.ndarray) -> dict[str, Any]:
    """features (N, D) -> its statistics; spectrum: the highest 64 singular values of the centred features over the
    first."""
    sigma = metrics.singular_spectrum(features)
    return {
        "dim": features.shape[1],
        "effective_rank": metrics.effective_rank(features, sigma),
        "rankme": metrics.rankme(features),
        "alpha_req": metrics.alpha_req(features, spectrum=sigma),
        "normalised_std": metrics.normalised_std(features),
        "uniformity": metrics.uniformity(features),
        "cosine": metrics.pairwise_cosine(features),
        "spectrum": (sigma[:SPECTRUM] / (sigma[0] or 1.0)).tolist(),
    }


def _verdict(found: dict[str, Any], pictures: int, untrained: dict[str, Any] | None) -> dict[str, str]:
    random = (untrained["effective_rank"], untrained["normalised_std"]) if untrained else None
    full = min(found["dim"], pictures - 1)
    verdict, reason = metrics.verdict(found["effective_rank"], found["normalised_std"], full, random)
    return {"verdict": verdict, "reason": reason}


def _similarity(subject: Subject) -> dict[str, Any] | None:
    """Linear CKA of each pair of depths, a symmetric matrix; None with fewer than two depths."""
    count = len(subject.depths)
    if count < 2:
        return None
    features = [subject.features("test", depth).plain for depth in subject.depths]
    matrix = np.zeros((count, count))
    for i in range(count):
        for j in range(i + 1):
            matrix[i, j] = matrix[j, i] = metrics.linear_cka(features[i], features[j])
    return {"depths": list(subject.depths), "matrix": matrix.tolist()}


def _views(subject: Subject, pictures: int, views: int, seed: int) -> dict[str, Any] | None:
    if subject.encoder is None or views < 2 or not _augments(subject.encoder.config.augment):
        return None
    rows = subject.split.test_rows
    rows = rows[np.linspace(0, len(rows) - 1, min(pictures, len(rows))).astype(np.int64)]
    features = view_features(subject, subject.encoder, rows, views, seed)
    return {"pictures": len(rows), "views": views, "lidar": metrics.lidar(features),
            "alignment": metrics.alignment(features[:, 0], features[:, 1])}


def _augments(settings: Augment) -> bool:
    return settings.crop != "none" or settings.flip or settings.jitter > 0


def view_features(subject: Subject, encoder: FrozenEncoder, rows: np.ndarray, views: int, seed: int) -> np.ndarray:
    """Features of `last` of augmented views of the test pictures `rows`, float32 (len(rows), views, D).

    The augmentation is the run's own, as its step draws it; the views depend on the seed and on the arguments alone.
    """
    model = HJEPA(encoder.config, encoder.mean, encoder.std)

    @mx.compile
    def forward(weights: Weights, images: mx.array, key: mx.array) -> mx.array:
        outputs = encoder.encoder(weights, model.prepare(images, key), fused=True)
        return pooled_features(outputs)[:, -1]

    size = min(BATCH, len(rows))
    blocks = np.resize(rows, (-(-len(rows) // size), size))  # the last is filled up from the first: one shape
    keys = mx.random.split(mx.random.key(seed), len(blocks) * views).reshape(len(blocks), views, 2)
    out = np.empty((len(blocks), size, views, encoder.dim), np.float32)
    for i, block in enumerate(blocks):
        images = mx.array(subject.split.test.read(block))
        for view in range(views):
            out[i, :, view] = np.array(forward(encoder.weights, images, keys[i, view]))
        if subject.progress:
            subject.progress(f"{subject.name}: views", min((i + 1) * size, len(rows)) * views, len(rows) * views)
    return out.reshape(-1, views, encoder.dim)[:len(rows)]
