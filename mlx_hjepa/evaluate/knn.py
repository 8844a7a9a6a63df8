"""Weighted k-nearest-neighbour classification, by DINO's rule (Caron et al. 2021, `eval_knn.py`).

Features are L2-normalised and nothing more; each of the k nearest bank pictures by cosine s votes exp(s / T) for its
class. The neighbours are found on the MLX device in blocks over both the queries and the bank, with a running list of
the best, so that device memory does not grow with the bank: at D = 2304, about 0.4 GB of bank and scores on a CPU and
0.8 GB on a GPU, plus the queries. The votes are counted on the host in float64. Equal cosines are ranked in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_hjepa.evaluate import check_features, check_labels
from mlx_hjepa.evaluate.subject import Progress
from mlx_hjepa.metrics import probe_metrics
from mlx_hjepa.run import UserError

KS = (1, 5, 10, 20, 50, 100, 200)
HEADLINE = (20, 0.07)
GROUP = 8
NOISE = 1e-7  # of the largest variance: below it fp32 features hold rounding alone


@dataclass(frozen=True)
class KnnResult:
    """`accuracy` is top-1 by (k, T); all else is the headline's: predictions (Q,), confusion (C, C), rows the truth."""

    accuracy: dict[tuple[int, float], float]
    headline: tuple[int, float]
    top1: float
    top5: float
    interval: tuple[float, float]
    per_class: np.ndarray
    confusion: np.ndarray
    predictions: np.ndarray


def knn_accuracy(bank: np.ndarray, bank_labels: np.ndarray, queries: np.ndarray, query_labels: np.ndarray,
                 classes: int, ks: tuple[int, ...] = KS, temperatures: tuple[float, ...] = (0.07,),
                 headline: tuple[int, float] = HEADLINE, progress: Progress | None = None) -> KnnResult:
    """Classify queries (Q, D) by their neighbours in the bank (N, D): every k and T, and the headline, in one pass.

    Raises UserError for labels out of range, a class without a bank picture, a k larger than the bank, features that
    are not finite or differ in width.
    """
    pairs = sorted({*((k, t) for k in ks for t in temperatures), headline})
    _check(bank, bank_labels, queries, query_labels, classes, pairs)
    cosines, indices = nearest(bank, queries, max(k for k, _ in pairs), progress=progress)
    labels = np.asarray(bank_labels)[indices]
    truth = np.asarray(query_labels).astype(np.int64)
    accuracy, best = {}, {}
    for k, temperature in pairs:
        scores = votes(cosines[:, :k], labels[:, :k], classes, temperature)
        accuracy[k, temperature] = float(np.mean(scores.argmax(axis=1) == truth))
        if (k, temperature) == headline:
            best = probe_metrics(np.where(scores > 0, scores, -np.inf), truth)
    return KnnResult(accuracy, headline, **best)


def whitening(bank: np.ndarray, dims: int, block: int = 16384) -> Callable[[np.ndarray], np.ndarray]:
    """PCA whitening by the bank's own mean and covariance, without labels: (n, D) -> (n, d), each of unit variance.

    d: the directions of largest variance, at most `dims`, and at most a tenth as many as pictures, which could not tell
    more of them from chance. Where a few directions hold most of the variance, plain cosines see those alone.
    """
    mean = bank.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((bank.shape[1], bank.shape[1]))
    for start in range(0, len(bank), block):  # no copy of a large bank
        centred = (bank[start:start + block] - mean).astype(np.float32)
        covariance += centred.T @ centred
    variance, directions = np.linalg.eigh(covariance / len(bank))
    kept = max(1, min(dims, len(bank) // 10, int((variance > NOISE * variance[-1]).sum())))
    scaled = directions[:, -kept:] / np.sqrt(np.maximum(variance[-kept:], 1e-30))
    return lambda x: np.concatenate([((x[start:start + block] - mean) @ scaled).astype(np.float32)
                                     for start in range(0, len(x), block)])


def votes(cosines: np.ndarray, labels: np.ndarray, classes: int, temperature: float) -> np.ndarray:
    """Sum of exp((s - s_max) / T) by class, (Q, C) float64, for neighbours (Q, k), nearest first."""
    weights = np.exp((cosines - cosines[:, :1]) / temperature)
    cells = np.arange(len(labels))[:, None] * classes + labels
    return np.bincount(cells.ravel(), weights.ravel(), len(labels) * classes).reshape(-1, classes)


def nearest(bank: np.ndarray, queries: np.ndarray, k: int, query_block: int = 1024, bank_block: int = 16384,
            progress: Progress | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The k bank rows of highest cosine for each query, nearest first: cosines (Q, k) float64 and rows (Q, k) int64."""
    starts = range(0, len(queries), query_block)
    left = [_operand(queries[s:s + query_block], query=True) for s in starts]
    found = [(mx.zeros((len(block), 0)), mx.zeros((len(block), 0), mx.int32)) for block in left]
    for start in range(0, len(bank), bank_block):
        right = _operand(bank[start:start + bank_block], query=False).T
        for i, block in enumerate(left):
            found[i] = _merge(found[i], block @ right, start, k)
            mx.async_eval(*found[i])  # or the graph would hold every block of scores
        mx.eval(found)
        if progress:
            progress("k-NN", min(start + bank_block, len(bank)), len(bank))
    cosines = np.concatenate([np.array(c) for c, _ in found]).astype(np.float64)
    rows = np.concatenate([np.array(r) for _, r in found]).astype(np.int64)
    order = np.argsort(-cosines, axis=1, kind="stable")
    return np.take_along_axis(cosines, order, 1), np.take_along_axis(rows, order, 1)


def _merge(best: tuple[mx.array, mx.array], scores: mx.array, start: int, k: int) -> tuple[mx.array, mx.array]:
    """The k highest of those found before and of a block's scores (q, n), whose columns are bank rows from `start`."""
    columns = _highest(scores, k)
    values = mx.concatenate([best[0], mx.take_along_axis(scores, columns, 1)], 1)
    rows = mx.concatenate([best[1], columns.astype(mx.int32) + start], 1)
    columns = _highest(values, k)
    return mx.take_along_axis(values, columns, 1), mx.take_along_axis(rows, columns, 1)


def _highest(scores: mx.array, k: int) -> mx.array:
    """Columns of the k highest scores (q, n) in any order, (q, min(k, n)).

    They lie in the k groups whose best is highest. So a wide block is cut into groups of columns (c, c + n/8, ...) and
    only the chosen groups are partitioned, which is three times as fast as partitioning it all.
    """
    q, width = scores.shape
    if width <= k:
        return mx.broadcast_to(mx.arange(width, dtype=mx.uint32), scores.shape)
    if width % GROUP or width < 2 * GROUP * k:
        return mx.argpartition(scores, width - k, axis=1)[:, width - k:]
    groups = _highest(scores.reshape(q, GROUP, -1).max(axis=1), k)
    columns = mx.arange(0, width, width // GROUP, dtype=mx.uint32)[:, None] + groups[:, None, :]
    columns = columns.reshape(q, -1)
    chosen = _highest(mx.take_along_axis(scores, columns, 1), k)
    return mx.take_along_axis(columns, chosen, 1)


def _operand(features: np.ndarray, query: bool) -> mx.array:
    """L2-normalised rows for a product of float32 accuracy.

    CUDA (and the M5's matrix units) round the operands of a float32 product to the 10 bits of TF32, which reorders
    neighbours. On a GPU every operand is therefore cut into a high part that TF32 holds and the low rest, side by
    side: one product of three times the width gives high*high + high*low + low*high, as good as float32.
    """
    x = mx.array(np.asarray(features, np.float32))
    x = x / mx.maximum(mx.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return x if mx.default_device() == mx.cpu else split_for_tf32(x, query)


def split_for_tf32(x: mx.array, query: bool) -> mx.array:
    """(n, D) -> (n, 3D): high, high, low for a query, high, low, high for a bank row."""
    high = (x.view(mx.uint32) & 0xFFFFE000).view(mx.float32)
    low = x - high
    return mx.concatenate([high, high, low] if query else [high, low, high], axis=1)


def _check(bank, bank_labels, queries, query_labels, classes, pairs) -> None:
    check_features(bank, "k-NN bank")
    check_features(queries, "k-NN queries")
    check_labels(np.asarray(bank_labels), len(bank), classes, "k-NN bank")
    check_labels(np.asarray(query_labels), len(queries), classes, "k-NN queries")
    if bank.shape[1] != queries.shape[1]:
        raise UserError(f"k-NN: the bank's features have width {bank.shape[1]}, the queries' {queries.shape[1]}")
    empty = np.flatnonzero(np.bincount(bank_labels, minlength=classes) == 0)
    if len(empty):
        raise UserError(f"k-NN: class {empty[0]} has no picture in the bank; use a larger bank, or all of the data")
    for k, temperature in pairs:
        if not 1 <= k <= len(bank):
            raise UserError(f"k-NN: k {k} with a bank of {len(bank)} pictures; k can be 1 to {len(bank)}")
        if not temperature > 0:
            raise UserError(f"k-NN: temperature {temperature:g} must be above 0")
