"""Statistics of features, each defined once. Features are float32 arrays (N, D); everything here is NumPy, in float64.

Singular values come from the eigenvalues of the smaller Gram matrix, so that 10,000 x 384 takes a few hundredths of a
second. What lies under the resolution of float32, 2^-23 of the Frobenius norm of the features as given, counts as zero:
otherwise the rounding errors of a collapsed encoder would look like features of full rank, or like any others.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

PAIR_ROWS = 2000  # rows that statistics over all pairs look at
RESOLUTION = 2.0**-23


def _centred(features: np.ndarray) -> np.ndarray:
    raw = np.asarray(features, np.float64)
    values = raw - raw.mean(axis=0)
    return values if np.linalg.norm(values) > RESOLUTION * np.linalg.norm(raw) else np.zeros_like(raw)


def _normalised(features: np.ndarray) -> np.ndarray:
    values = np.asarray(features, np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def _spread_rows(features: np.ndarray, rows: int) -> np.ndarray:
    """At most `rows` of the rows, evenly spaced: the same ones on every call."""
    n = len(features)
    return features if n <= rows else features[np.linspace(0, n - 1, rows).astype(np.int64)]


def _singular_values(features: np.ndarray, centre: bool) -> np.ndarray:
    """The min(N, D) singular values, largest first."""
    raw = np.asarray(features, np.float64)
    values = _centred(raw) if centre else raw
    gram = values.T @ values if values.shape[0] >= values.shape[1] else values @ values.T
    sigma = np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0))
    sigma[sigma <= RESOLUTION * np.linalg.norm(raw)] = 0.0
    return sigma


def _entropy_rank(values: np.ndarray, eps: float) -> float:
    """exp of the entropy of values / sum(values) + eps; 1 when all are zero."""
    total = values.sum()
    if total <= 0:
        return 1.0
    p = values / total + eps
    p = p[p > 0]
    return float(np.exp(-np.sum(p * np.log(p))))


def singular_spectrum(features: np.ndarray) -> np.ndarray:
    """Singular values of the centred features (N, D), largest first: (min(N, D),).

    Jing et al. 2021 (dimensional collapse, arXiv 2110.09348), whose spectrum is that of the covariance, their squares.
    """
    return _singular_values(features, centre=True)


def effective_rank(features: np.ndarray, spectrum: np.ndarray | None = None) -> float:
    """exp(entropy of sigma / sum(sigma)), sigma the singular values of the centred, unwhitened features (N, D).

    Between 1 (also for constant features) and min(N - 1, D). Roy & Vetterli 2007, "The effective rank".
    spectrum: their singular_spectrum, where it is at hand.
    """
    return _entropy_rank(singular_spectrum(features) if spectrum is None else spectrum, eps=0.0)


def rankme(features: np.ndarray, eps: float = 1e-7) -> float:
    """exp(entropy of sigma / sum(sigma) + eps), sigma the singular values of the features (N, D) as they are.

    Not centred, as in Garrido et al. 2022 (RankMe, arXiv 2210.02885). Compare only runs of one width.
    """
    return _entropy_rank(_singular_values(features, centre=False), eps)


def normalised_std(features: np.ndarray) -> float:
    """Standard deviation of the L2-normalised features (N, D), mean over dimensions, times sqrt(D).

    1 for features spread evenly over the sphere, 0 for a constant. Chen & He 2020 (SimSiam, arXiv 2011.10566).
    """
    values = _normalised(features)
    return float(values.std(axis=0).mean() * math.sqrt(values.shape[1]))


def alpha_req(features: np.ndarray, first: int = 5, last: int = 100,
              spectrum: np.ndarray | None = None) -> float | None:
    """The slope alpha of log(lambda_i) = c - alpha log(i), lambda the eigenvalues of the covariance, largest first.

    Plain least squares over i = first .. min(last, number of eigenvalues above zero), counted from 1. Good features lie
    near 1. None with fewer than five eigenvalues to fit. Agrawal et al. 2022 (alpha-ReQ, NeurIPS).
    spectrum: their singular_spectrum, where it is at hand.
    """
    sigma = singular_spectrum(features) if spectrum is None else spectrum
    last = min(last, int(np.count_nonzero(sigma)))
    if last - first + 1 < 5:
        return None
    index = np.arange(first, last + 1)
    slope = np.polyfit(np.log(index), 2 * np.log(sigma[first - 1:last]), 1)[0]
    return float(-slope)


def _pair_cosines(features: np.ndarray, rows: int) -> np.ndarray:
    values = _normalised(_spread_rows(np.asarray(features), rows))
    return (values @ values.T)[np.triu_indices(len(values), 1)]


def uniformity(features: np.ndarray, rows: int = PAIR_ROWS) -> float:
    """log of the mean over pairs of exp(-2 |x - y|^2), x and y L2-normalised features; at most `rows` rows are used.

    0 for a constant, near -4 for features spread evenly in many dimensions. Wang & Isola 2020 (arXiv 2005.10242).
    """
    return float(np.log(np.mean(np.exp(4 * _pair_cosines(features, rows) - 4))))


def alignment(view: np.ndarray, other: np.ndarray) -> float:
    """Mean |x - x'|^2 of the L2-normalised features of two views of the same pictures, (N, D) each; 0 is the best.

    Wang & Isola 2020 (arXiv 2005.10242), alpha = 2.
    """
    return float(np.mean(np.sum((_normalised(view) - _normalised(other)) ** 2, axis=1)))


def pairwise_cosine(features: np.ndarray, rows: int = PAIR_ROWS) -> dict[str, float]:
    """Distribution of the cosine of two different pictures' features, over all pairs of at most `rows` rows.

    Its mean is the anisotropy of Ethayarajh 2019 (arXiv 1909.00512), near 1 for features in a narrow cone.
    """
    cosines = _pair_cosines(features, rows)
    low, p5, median, p95, high = np.percentile(cosines, (0, 5, 50, 95, 100))
    return {"mean": float(cosines.mean()), "std": float(cosines.std()), "min": float(low), "p5": float(p5),
            "median": float(median), "p95": float(p95), "max": float(high)}


def linear_cka(features: np.ndarray, other: np.ndarray) -> float:
    """Linear centred kernel alignment of two feature sets (N, D1) and (N, D2) of the same pictures, in 0 .. 1.

    |Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms, both centred; 0 when either is constant. Kornblith et al. 2019
    (arXiv 1905.00414).
    """
    x, y = _centred(features), _centred(other)
    scale = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(y.T @ x) ** 2 / scale) if scale > 0 else 0.0


def lidar(views: np.ndarray, delta: float = 1e-4, eps: float = 1e-8) -> float:
    """exp-entropy of the eigenvalues of Sw^-1/2 Sb Sw^-1/2 over the views (n, q, D) of n pictures, q views of each.

    Sb is the covariance of the pictures' mean features, Sw the mean covariance of a picture's views plus delta times
    the identity. At most min(D, n - 1). Thilak et al. 2023 (LiDAR, arXiv 2312.04000).
    """
    values = np.asarray(views, np.float64)
    n, q, dim = values.shape
    means = values.mean(axis=1)
    within = (values - means[:, None]).reshape(n * q, dim)
    spread = _centred(means)
    # L^-1 Sb L^-T has the eigenvalues of Sw^-1/2 Sb Sw^-1/2, L the Cholesky factor of Sw
    factor = np.linalg.cholesky(within.T @ within / (n * q) + delta * np.eye(dim))
    whitened = np.linalg.solve(factor, spread.T)
    gram = whitened @ whitened.T if dim <= n else whitened.T @ whitened
    return _entropy_rank(np.maximum(np.linalg.eigvalsh(gram / n), 0.0), eps)


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a proportion, 95 % by default: (low, high) in 0 .. 1. Wilson 1927."""
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"{correct} correct of {n} is no proportion")
    p, spread = correct / n, z * z / n
    middle = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def probe_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What a classifier's scores (Q, C) say of the labels (Q,), which lie in 0 .. C - 1.

    top1; top5, where the label's score is among the five highest and above -inf; per_class, the accuracy of each
    class (C,), NaN for one without pictures; confusion (C, C), rows the truth; predictions (Q,); interval, Wilson's
    95 % for top1.
    """
    classes = scores.shape[1]
    predictions = scores.argmax(axis=1)
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    top5 = (own[:, 0] > -np.inf) & (np.count_nonzero(scores > own, axis=1) < 5)
    confusion = np.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)
    correct, sizes = np.diag(confusion), confusion.sum(axis=1)
    return {"top1": float(correct.sum() / len(labels)), "top5": float(top5.mean()),
            "per_class": np.where(sizes > 0, correct / np.maximum(sizes, 1), np.nan), "confusion": confusion,
            "predictions": predictions, "interval": wilson_interval(int(correct.sum()), len(labels))}


def verdict(rank: float, std: float, full: int, random: tuple[float, float] | None = None) -> tuple[str, str]:
    """("healthy" | "weak" | "collapsed", the reason), from effective_rank and normalised_std.

    `full` is the highest rank that N pictures of width D can have, min(D, N - 1). `random` is (effective_rank,
    normalised_std) of the untrained encoder on the same pictures, where known.
    collapsed: std under 1e-3; rank under 2, or under 2 % of full; either under half the untrained encoder's.
    weak: rank under 10 % of full, or std under 0.1. Noise is "healthy" too, so read it beside k-NN.
    """
    if std < 1e-3:
        return "collapsed", f"normalised std {std:.2g} is under 0.001: every picture has the same feature"
    if rank < max(2.0, 0.02 * full):
        return "collapsed", f"effective rank {rank:.1f} of {full} is under {max(2.0, 0.02 * full):.3g}"
    if random is not None and rank < random[0] / 2:
        return "collapsed", f"effective rank {rank:.1f} is under half the untrained encoder's {random[0]:.1f}"
    if random is not None and std < random[1] / 2:
        return "collapsed", f"normalised std {std:.3g} is under half the untrained encoder's {random[1]:.3g}"
    if rank < 0.1 * full:
        return "weak", f"effective rank {rank:.1f} is under 10 % of {full}"
    if std < 0.1:
        return "weak", f"normalised std {std:.3g} is under 0.1: features differ little from their mean"
    return "healthy", f"effective rank {rank:.1f} of {full}, normalised std {std:.2f}"
