"""The linear probe: one linear layer on frozen features, trained on the device from features in memory.

Features of the picture and of its mirror image are two training rows, standardised with the training rows' mean and
standard deviation. AdamW, weight decay 1e-4 (not on the bias), cosine to 0. The learning rate is chosen on a validation
split of the training pictures, all candidates trained at once as the columns of one weight; then the layer is fitted
again on every training picture, and the test set is looked at once, after the last epoch, without mirror images.
On CUDA the products run in TF32, which moves an accuracy by less than its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hjepa.data.dataset import Pictures
from mlx_hjepa.evaluate import Features
from mlx_hjepa.evaluate.subject import Progress
from mlx_hjepa.metrics import probe_metrics
from mlx_hjepa.run import UserError

LRS = (3e-4, 1e-3, 3e-3, 1e-2)
DECAY, BETA1, BETA2, EPS = 1e-4, 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class ProbeResult:
    """Test accuracies in 0 .. 1; `validation_accuracy` by learning rate; confusion (C, C), rows the truth."""

    accuracy: float
    top5: float
    interval: tuple[float, float]
    lr: float
    validation_accuracy: dict[float, float]
    predictions: np.ndarray
    per_class: np.ndarray
    confusion: np.ndarray


def probe(train: Features, test: Features, validation_indices: np.ndarray, classes: int, seed: int = 0,
          epochs: int = 60, batch: int = 1000, lrs: tuple[float, ...] = LRS,
          progress: Progress | None = None) -> ProbeResult:
    """Run the whole protocol. `validation_indices` are rows of `train`; `batch` counts pictures.

    A batch is at most a 32nd of the pictures, so that a small data set still gets enough steps. Raises UserError
    for labels out of range, features that are not finite, widths that differ, a validation split that is none. Of
    equally good learning rates the first is taken.
    """
    train.check(classes, "linear probe, training features")
    test.check(classes, "linear probe, test features")
    if train.plain.shape[1] != test.plain.shape[1]:
        raise UserError(f"linear probe: training features have width {train.plain.shape[1]}, "
                        f"test features {test.plain.shape[1]}")
    held_out = np.zeros(len(train.plain), bool)
    held_out[_checked(validation_indices, len(train.plain))] = True
    scores = _fit_and_score(_rows(train, ~held_out), train.plain[held_out], classes, seed, epochs, batch, lrs,
                            progress)
    hits = scores.argmax(axis=2) == train.labels[held_out][:, None]
    validation = {lr: float(a) for lr, a in zip(lrs, hits.mean(axis=0), strict=True)}
    lr = max(lrs, key=lambda rate: validation[rate])
    scores = _fit_and_score(train, test.plain, classes, seed, epochs, batch, (lr,), progress)
    found = probe_metrics(scores[:, 0], test.labels.astype(np.int64))
    return ProbeResult(found.pop("top1"), lr=lr, validation_accuracy=validation, **found)


def _checked(indices: np.ndarray, rows: int) -> np.ndarray:
    indices = np.asarray(indices)
    if not len(indices) or indices.min() < 0 or indices.max() >= rows or len(np.unique(indices)) != len(indices):
        raise UserError(f"linear probe: the validation split must be different rows in 0 .. {rows - 1}, at least one")
    if len(indices) >= rows:
        raise UserError("linear probe: the validation split holds every training picture; nothing is left to train on")
    return indices


def _rows(features: Features, chosen: np.ndarray) -> Features:
    mirror = features.mirror
    return Features(features.plain[chosen], features.labels[chosen], None if mirror is None else mirror[chosen])


def _fit_and_score(train: Features, test: np.ndarray, classes: int, seed: int, epochs: int, batch: int,
                   lrs: tuple[float, ...], progress: Progress | None) -> np.ndarray:
    """Scores (Q, len(lrs), C) of the test rows (Q, D), by one layer for each learning rate."""
    views = [train.plain] if train.mirror is None else [train.plain, train.mirror]
    mean, scale = _statistics(views)
    data = np.empty((len(train.plain), len(views), train.plain.shape[1]), np.float32)
    for i, view in enumerate(views):
        np.subtract(view, mean, out=data[:, i])
        data[:, i] *= scale
    weight, bias = _fit(mx.array(data), mx.array(train.labels.astype(np.int32)), classes, seed, epochs, batch, lrs,
                        progress)
    scores = [np.array(mx.array((test[s:s + 8192] - mean) * scale) @ weight.T + bias)
              for s in range(0, len(test), 8192)]
    return np.concatenate(scores).reshape(len(test), len(lrs), classes)


def _statistics(views: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and 1 / std of every dimension over all rows, (D,) float32 each, summed in float64.

    A dimension that does not vary (std at most 1e-6 of the largest) carries nothing and is scaled to 0.
    """
    rows = sum(len(v) for v in views)
    mean = sum(v.sum(axis=0, dtype=np.float64) for v in views) / rows
    square = np.zeros_like(mean)
    for view in views:
        for start in range(0, len(view), 8192):
            square += np.square(view[start:start + 8192] - mean).sum(axis=0)
    std = np.sqrt(square / rows)
    scale = np.where(std > 1e-6 * std.max(), 1 / np.maximum(std, 1e-30), 0.0)
    return mean.astype(np.float32), scale.astype(np.float32)


def _fit(data: mx.array, labels: mx.array, classes: int, seed: int, epochs: int, batch: int,
         lrs: tuple[float, ...], progress: Progress | None = None) -> tuple[mx.array, mx.array]:
    """Train from zero weights; weight (L*C, D) and bias (L*C,), the rows of one learning rate one after another.

    data (n, views, D), labels (n,). The problem is convex: zero is as good a start as any, and the seed only orders.
    """
    n, _, dim = data.shape
    batch = max(1, min(batch, n // 32))
    steps = n // batch
    state = [mx.zeros(s) for s in ((len(lrs) * classes, dim), (len(lrs) * classes,))]
    state += [mx.zeros_like(s) for s in state] * 2
    update = _make_step(lrs, classes)
    for step in range(steps * epochs):
        epoch, part = divmod(step, steps)
        if part == 0:
            order = np.random.default_rng([seed, epoch]).permutation(n)[:steps * batch].astype(np.int32)
            order = order.reshape(steps, batch)
        cosine = 0.5 * (1 + math.cos(math.pi * step / (steps * epochs)))
        rates = mx.array([cosine, 1 / (1 - BETA1 ** (step + 1)), 1 / (1 - BETA2 ** (step + 1))])
        state = update(state, data, labels, mx.array(order[part]), rates)
        mx.async_eval(state)
        if progress:
            progress("linear probe", step + 1, steps * epochs)
    mx.eval(state)
    return state[0], state[1]


def _make_step(lrs: tuple[float, ...], classes: int) -> Callable:
    """One compiled AdamW step on softmax cross-entropy, whose gradient is written out: (p - one_hot) / rows."""
    rate = mx.array(np.repeat(np.array(lrs, np.float32), classes))

    def step(state, data, labels, batch, rates):
        weight, bias, *moments = state
        cosine, c1, c2 = mx.split(rates, 3)
        views = data.shape[1]
        x = data[batch].reshape(len(batch) * views, -1)
        logits = (x @ weight.T + bias).reshape(len(batch), views, len(lrs), classes)
        truth = labels[batch][:, None, None, None] == mx.arange(classes)
        slope = ((mx.softmax(logits, axis=-1) - truth) / len(x)).reshape(len(x), -1)
        gradients = slope.T @ x, slope.sum(axis=0)
        first = [BETA1 * m + (1 - BETA1) * g for m, g in zip(moments[:2], gradients, strict=True)]
        second = [BETA2 * v + (1 - BETA2) * g * g for v, g in zip(moments[2:], gradients, strict=True)]
        lr = rate * cosine
        weight = weight * (1 - DECAY * lr[:, None]) - lr[:, None] * first[0] * c1 / (mx.sqrt(second[0] * c2) + EPS)
        bias = bias - lr * first[1] * c1 / (mx.sqrt(second[1] * c2) + EPS)
        return [weight, bias, *first, *second]

    return mx.compile(step)


def augmented_probe(features: Callable[[mx.array, mx.array], list[mx.array]], train: list[Features],
                    pictures: Pictures, rows: np.ndarray, test: list[Features], classes: int, lrs: list[float],
                    seed: int = 0, epochs: int = 60, batch: int = 1000,
                    progress: Progress | None = None) -> list[dict[str, Any]]:
    """The paper-style flavour: a fresh crop and mirror image of every picture in every epoch, features computed anew.

    Several levels are probed at once, as one pass of the encoder gives them all: features(images uint8, key) -> a
    (B, D) of augmented pictures for each; train, test and lrs hold each level's plain cached features, for the
    standardisation and the one look at the end, and the rate that `probe` chose. rows are the training pictures of
    `pictures`. Costs epochs x pictures forward passes.
    """
    scales = [_statistics([t.plain]) for t in train]
    n = len(rows)
    batch = max(1, min(batch, n // 32))
    steps = n // batch
    states = [[mx.zeros(s) for s in ((classes, t.plain.shape[1]), (classes,))] * 3 for t in train]
    updates, every = [_make_step((lr,), classes) for lr in lrs], mx.arange(batch)
    constants = [[mx.array(value) for value in scale] for scale in scales]
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(n)[: steps * batch]
        for part, images in enumerate(pictures.stream(rows[order], batch, threads=4)):
            step = epoch * steps + part
            views = features(mx.array(images), mx.random.key((seed << 32) | step))
            labels = mx.array(train[0].labels[order[part * batch : (part + 1) * batch]].astype(np.int32))
            cosine = 0.5 * (1 + math.cos(math.pi * step / (steps * epochs)))
            rates = mx.array([cosine, 1 / (1 - BETA1 ** (step + 1)), 1 / (1 - BETA2 ** (step + 1))])
            before, states = states, [
                update(state, ((x - mean) * scale)[:, None], labels, every, rates)
                for update, state, x, (mean, scale) in zip(updates, states, views, constants, strict=True)]
            mx.async_eval(states)
            mx.eval(before)  # one step is prepared while the one before it runs
            if progress:
                progress("augmented probe", step + 1, steps * epochs)
    results = []
    for t, state, lr, (mean, scale) in zip(test, states, lrs, scales, strict=True):
        scores = np.array(mx.array((t.plain - mean) * scale) @ state[0].T + state[1])
        found = probe_metrics(scores, t.labels.astype(np.int64))
        results.append({"accuracy": found["top1"], "interval": found["interval"], "top5": found["top5"], "lr": lr,
                        "epochs": epochs})
    return results
