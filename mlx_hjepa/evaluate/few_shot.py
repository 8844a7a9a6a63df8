"""How far a few labels go: N-way k-shot episodes, and k labels of every class. Nothing is trained but a logistic
regression; all randomness is drawn from the seed and the labels, so that every encoder meets the same pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from mlx_hjepa.evaluate import Features, check_features, check_labels
from mlx_hjepa.evaluate.subject import Progress
from mlx_hjepa.run import UserError

SHOTS = (1, 5, 10)
PER_CLASS = (1, 5, 10, 50)
STRENGTH = 10.0  # C times the width
ROWS = 8192  # standardised at a time, so that no whole bank is copied
BLOCK = 16  # episodes gathered at a time: 18 MB at D = 2304


def episodes(features: np.ndarray, labels: np.ndarray, classes: int, ways: int = 5, shots: Sequence[int] = SHOTS,
             queries: int = 15, episodes: int = 600, seed: int = 0,
             progress: Progress | None = None) -> dict[str, Any]:
    """N-way k-shot episodes on one split, features (N, D), labels (N,) in 0 .. classes - 1.

    An episode draws `ways` classes, and of each its support and `queries` other pictures; a query goes to the centroid
    of highest cosine (the mean of the L2-normalised support; Snell et al. 2017, arXiv 1703.05175, by cosine). The
    queries are the same for every number of shots, and fewer shots are the first of the more. Per number of shots:
    accuracy, its std over episodes and the usual 95 % interval, 1.96 std / sqrt(episodes), not cut to 0 .. 1. It says
    how exactly the episodes measure this split, not how another split would come out.
    Raises UserError when there are too few classes, or pictures in a class.
    """
    check_features(features, "few-shot")
    check_labels(labels, len(features), classes, "few-shot")
    _check_episodes(labels, classes, ways, shots, queries, episodes)
    rows = _draw(labels, classes, ways, max(shots) + queries, episodes, seed)
    unit = _unit(features)
    hits = {k: np.empty(episodes) for k in sorted(set(shots))}
    for start in range(0, episodes, BLOCK):
        block = unit[rows[start:start + BLOCK]]
        for k, found in hits.items():
            centroids = _unit(block[:, :, :k].mean(axis=2))
            cosines = block[:, :, -queries:] @ centroids.transpose(0, 2, 1)[:, None]
            right = cosines.argmax(axis=3) == np.arange(ways)[:, None]
            found[start:start + BLOCK] = right.mean(axis=(1, 2))
        if progress:
            progress("few-shot episodes", start + len(block), episodes)
    return {"ways": ways, "queries": queries, "episodes": episodes, "seed": seed,
            "shots": {str(k): _summary(found, 1.96) for k, found in hits.items()}}


def few_labels(train: Features, test: Features, classes: int, per_class: Sequence[int] = PER_CLASS, draws: int = 5,
               seed: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """k labels of every class from the training bank, scored on the whole test split, over several draws.

    centroid: the class centroid of highest cosine, as in `episodes`. logistic: scikit-learn's LogisticRegression on
    features standardised by every training picture (which takes no labels), C = 10 / D and fixed: standardised rows
    have squared length D, so the penalty is the same at every width. Per k and method: the mean accuracy, its std over
    draws, Student's 95 % interval, not cut to 0 .. 1, which leaves out the test split's own error, and each draw's
    accuracy. Fewer labels are the first of the more. A k that some class cannot give is named in `skipped`, with the
    reason.
    Raises UserError when no k remains.
    """
    train.check(classes, "few labels, training features")
    test.check(classes, "few labels, test features")
    if train.plain.shape[1] != test.plain.shape[1]:
        raise UserError(f"few labels: training features have width {train.plain.shape[1]}, "
                        f"test features {test.plain.shape[1]}")
    members = [np.flatnonzero(train.labels == c) for c in range(classes)]
    skipped = _skipped([len(m) for m in members], per_class, draws)
    generators = [np.random.default_rng([seed, draw]) for draw in range(draws)]
    orders = [[rng.permutation(m) for m in members] for rng in generators]
    scaler = StandardScaler()
    for start in range(0, len(train.plain), ROWS):
        scaler.partial_fit(train.plain[start:start + ROWS])
    unit, scaled = _unit(test.plain), scaler.transform(test.plain)
    strength = STRENGTH / train.plain.shape[1]
    found: dict[str, Any] = {}
    kept = sorted(k for k in set(per_class) if str(k) not in skipped)
    for k in kept:
        guesses: dict[str, list[np.ndarray]] = {"centroid": [], "logistic": []}
        for draw, order in enumerate(orders):
            rows = train.plain[np.concatenate([m[:k] for m in order])]
            guesses["centroid"].append(_by_centroid(rows, unit, classes))
            guesses["logistic"].append(_by_regression(scaler.transform(rows), scaled, classes, strength))
            if progress:
                progress("few labels", len(found) * draws + draw + 1, len(kept) * draws)
        found[str(k)] = {name: _over_draws(guess, test.labels) for name, guess in guesses.items()}
    return {"draws": draws, "seed": seed, "C": strength, "per_class": found, "skipped": skipped}


def _by_centroid(rows: np.ndarray, unit: np.ndarray, classes: int) -> np.ndarray:
    """The class of each of `unit` (Q, D), from as many rows of every class, class after class."""
    centroids = _unit(_unit(rows).reshape(classes, -1, rows.shape[1]).mean(axis=1))
    return (unit @ centroids.T).argmax(axis=1)


def _by_regression(rows: np.ndarray, scaled: np.ndarray, classes: int, strength: float) -> np.ndarray:
    truth = np.repeat(np.arange(classes), len(rows) // classes)
    with threadpool_limits(1):  # its many products are small: 4 times faster on one of two threads, more so of sixteen
        return LogisticRegression(C=strength, max_iter=1000).fit(rows, truth).predict(scaled)


def _over_draws(guesses: list[np.ndarray], labels: np.ndarray) -> dict[str, Any]:
    accuracies = [float(np.mean(guess == labels)) for guess in guesses]
    return {**_summary(np.array(accuracies), float(stdtrit(len(guesses) - 1, 0.975))), "accuracies": accuracies}


def _unit(values: np.ndarray) -> np.ndarray:
    """L2-normalised along the last axis, float32."""
    values = np.asarray(values, np.float32)
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)


def _summary(accuracies: np.ndarray, quantile: float) -> dict[str, Any]:
    mean, std = float(accuracies.mean()), float(accuracies.std(ddof=1))
    half = quantile * std / math.sqrt(len(accuracies))
    return {"accuracy": mean, "std": std, "interval": [mean - half, mean + half]}


def _draw(labels: np.ndarray, classes: int, ways: int, pictures: int, episodes: int, seed: int) -> np.ndarray:
    """Rows of `labels`, (episodes, ways, pictures), all different within an episode."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(labels == c) for c in range(classes)]
    rows = np.empty((episodes, ways, pictures), np.int64)
    for episode in rows:
        for way, chosen in enumerate(rng.choice(classes, ways, replace=False)):
            episode[way] = rng.choice(members[chosen], pictures, replace=False)
    return rows


def _check_episodes(labels: np.ndarray, classes: int, ways: int, shots: Sequence[int], queries: int,
                    episodes: int) -> None:
    if ways < 2 or not shots or min(shots) < 1 or queries < 1 or episodes < 2:
        raise UserError("few-shot: needs at least 2 ways, 1 shot, 1 query and 2 episodes")
    if classes < ways:
        raise UserError(f"few-shot: {ways}-way episodes, but the data set has {classes} classes; use fewer ways")
    sizes = np.bincount(labels, minlength=classes)
    needed, smallest = max(shots) + queries, int(sizes.argmin())
    if sizes[smallest] < needed:
        raise UserError(f"few-shot: class {smallest} has {sizes[smallest]} test pictures, but {max(shots)} shots and "
                        f"{queries} queries take {needed}; use fewer of them, or a larger test split")


def _skipped(sizes: list[int], per_class: Sequence[int], draws: int) -> dict[str, str]:
    """Why a number of labels a class is left out. Raises UserError when every one is."""
    if draws < 2 or len(sizes) < 2 or not per_class or min(per_class) < 1:
        raise UserError("few labels: needs at least 2 draws, 2 classes and 1 label a class")
    smallest = int(np.argmin(sizes))
    skipped = {str(k): f"class {smallest} has only {sizes[smallest]} training pictures"
               for k in per_class if k > sizes[smallest]}
    if len(skipped) == len(set(per_class)):
        raise UserError(f"few labels: class {smallest} has only {sizes[smallest]} training pictures, too few for "
                        f"{min(per_class)} labels a class; use a larger bank, or fewer labels")
    return skipped
