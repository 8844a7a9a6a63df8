import ast
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from mlx_hjepa import evaluate
from mlx_hjepa.evaluate import Features, linear
from mlx_hjepa.run import UserError

VALIDATION = np.arange(0, 600, 6)


def gaussians(n, seed, classes=4, dim=12):
    """Overlapping classes; one dimension 1,000 times as long as the others, one far from zero, one constant."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((classes, dim))
    labels = rng.integers(0, classes, n)
    x = centres[labels] + 1.2 * rng.standard_normal((n, dim))
    x[:, 0] *= 1000
    x[:, 1] += 300
    x[:, 2] = 5
    return x.astype(np.float32), labels


@pytest.fixture(scope="module")
def sets():
    x, y = gaussians(600, 0)
    noise = np.random.default_rng(5).standard_normal(x.shape).astype(np.float32)
    return Features(x, y, x + 0.1 * noise * x.std(axis=0)), Features(*gaussians(2000, 1))


def logistic(train, test, lr, classes):
    """Accuracy of scikit-learn's logistic regression at the L2 penalty that gives the probe's length of weight."""
    x = train.plain if train.mirror is None else np.concatenate([train.plain, train.mirror])
    y = train.labels if train.mirror is None else np.concatenate([train.labels] * 2)
    mean, std = x.mean(axis=0), np.where(x.std(axis=0) > 1e-3, x.std(axis=0), np.inf)
    rows = mx.array(((x - mean) / std).astype(np.float32))[:, None]
    weight = np.array(linear._fit(rows, mx.array(y.astype(np.int32)), classes, 0, 60, 1000, (lr,))[0])
    length = np.linalg.norm(weight - weight.mean(axis=0))
    fits = [LogisticRegression(C=c, max_iter=2000).fit((x - mean) / std, y) for c in np.geomspace(0.01, 30, 8)]
    fit = min(fits, key=lambda f: abs(np.linalg.norm(f.coef_) - length))
    assert np.linalg.norm(fit.coef_) == pytest.approx(length, rel=0.2)
    return fit.score((test.plain - mean) / std, test.labels)


def test_agrees_with_logistic_regression_on_digits():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order].astype(np.float32), y[order]
    train, test = Features(x[:900], y[:900]), Features(x[900:], y[900:])
    found = linear.probe(train, test, np.arange(0, 900, 9), 10)
    assert found.accuracy == pytest.approx(logistic(train, test, found.lr, 10), abs=0.01)
    assert found.accuracy > 0.9
    assert found.accuracy < found.top5 <= 1
    assert np.mean(found.predictions == test.labels) == found.accuracy == np.trace(found.confusion) / len(test.labels)
    assert found.per_class.shape == (10,)
    assert found.interval[0] < found.accuracy < found.interval[1]


def test_agrees_with_logistic_regression_on_overlapping_classes(sets):
    found = linear.probe(*sets, VALIDATION, 4)
    assert found.accuracy == pytest.approx(logistic(*sets, found.lr, 4), abs=0.01)


def test_the_step_is_adamw_on_the_cross_entropy(monkeypatch):
    """One update of two learning rates at once equals mlx.optimizers' AdamW on each alone, weight decay included."""
    import mlx.nn as nn
    import mlx.optimizers as optim

    rng = np.random.default_rng(0)
    data, labels = mx.array(rng.standard_normal((32, 2, 5)).astype(np.float32)), mx.array(rng.integers(0, 3, 32))
    lrs, steps = (1e-2, 0.3), 4
    assert linear.DECAY == 1e-4
    monkeypatch.setattr(linear, "DECAY", 0.1)  # enough to show in four steps
    update = linear._make_step(lrs, 3)
    state = [mx.zeros((6, 5)), mx.zeros((6,))] + [mx.zeros(s) for s in ((6, 5), (6,))] * 2
    for t in range(1, steps + 1):
        state = update(state, data, labels, mx.arange(32), mx.array([0.5, 1 / (1 - 0.9**t), 1 / (1 - 0.999**t)]))
    x, y = data.reshape(64, 5), mx.repeat(labels, 2)
    for i, lr in enumerate(lrs):
        layer = nn.Linear(5, 3)
        layer.update({"weight": mx.zeros((3, 5)), "bias": mx.zeros((3,))})
        groups = [optim.AdamW(0.5 * lr, betas=[0.9, 0.999], weight_decay=d, bias_correction=True) for d in (0.1, 0.0)]
        optimizer = optim.MultiOptimizer(groups, [lambda path, _: path == "weight"])
        for _ in range(steps):
            loss = nn.value_and_grad(layer, lambda m: nn.losses.cross_entropy(m(x), y, reduction="mean"))
            optimizer.update(layer, loss(layer)[1])
        np.testing.assert_allclose(state[0][3 * i:3 * i + 3], layer.weight, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(state[1][3 * i:3 * i + 3], layer.bias, rtol=1e-3, atol=1e-5)


def test_the_rate_is_chosen_on_the_validation_split_alone(sets):
    train, test = sets
    lrs = (1e-6, 3e-3)
    found = linear.probe(train, test, VALIDATION, 4, epochs=10, lrs=lrs)
    assert found.lr == 3e-3
    assert found.validation_accuracy[1e-6] < found.validation_accuracy[3e-3]
    wrong = Features(test.plain, (test.labels + 1) % 4)  # other test labels must not change the choice
    again = linear.probe(train, wrong, VALIDATION, 4, epochs=10, lrs=lrs)
    assert again.validation_accuracy == found.validation_accuracy
    np.testing.assert_array_equal(again.predictions, found.predictions)
    # a held-out row is not trained on in the search: spoiling its feature leaves the others' scores alone
    spoilt = train.plain.copy()
    spoilt[VALIDATION[0]] *= -1
    moved = linear.probe(Features(spoilt, train.labels, train.mirror), test, VALIDATION, 4, epochs=10, lrs=lrs)
    for lr in lrs:
        assert abs(moved.validation_accuracy[lr] - found.validation_accuracy[lr]) <= 1 / len(VALIDATION) + 1e-9


def test_the_rate_with_the_best_validation_accuracy_is_the_one_fitted(sets):
    lrs = (1e-4, 0.1, 1e5)  # too low, good, and so high that the weights run away
    found = linear.probe(*sets, VALIDATION, 4, epochs=5, lrs=lrs)
    low, good, high = (found.validation_accuracy[lr] for lr in lrs)
    assert good > max(low, high) + 0.05
    assert found.lr == 0.1
    alone = linear.probe(*sets, VALIDATION, 4, epochs=5, lrs=(0.1,))
    np.testing.assert_array_equal(found.predictions, alone.predictions)


def test_the_layer_that_is_tested_has_learnt_the_validation_rows_too(sets):
    train, test = sets
    held = np.flatnonzero(train.labels == 3)  # a class that no other row holds
    found = linear.probe(train, test, held, 4, epochs=10, lrs=(1e-2,))
    assert found.validation_accuracy[1e-2] == 0
    assert found.per_class[3] > 0.5


def test_candidates_do_not_disturb_each_other(sets):
    alone = linear.probe(*sets, VALIDATION, 4, epochs=5, lrs=(1e-3,))
    together = linear.probe(*sets, VALIDATION, 4, epochs=5)
    assert together.validation_accuracy[1e-3] == alone.validation_accuracy[1e-3]


def test_the_mirror_rows_are_used(sets):
    train, test = sets
    lost = Features(train.plain, train.labels, np.roll(train.mirror, 1, axis=0))
    assert linear.probe(lost, test, VALIDATION, 4, epochs=20).accuracy < linear.probe(
        train, test, VALIDATION, 4, epochs=20).accuracy - 0.01


def test_standardisation_uses_all_training_rows(sets):
    x, mirror = sets[0].plain, sets[0].mirror
    mean, scale = linear._statistics([x, mirror])
    rows = np.concatenate([x, mirror]).astype(np.float64)
    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-5)
    assert scale[2] == 0  # a constant dimension
    keep = np.arange(12) != 2
    np.testing.assert_allclose(scale[keep], 1 / rows.std(axis=0)[keep], rtol=1e-4)


def test_equal_seeds_give_equal_results(sets):
    runs = [linear.probe(*sets, VALIDATION, 4, seed=s, epochs=3, lrs=(1e-3,)) for s in (0, 0, 1)]
    assert runs[0].validation_accuracy == runs[1].validation_accuracy
    np.testing.assert_array_equal(runs[0].predictions, runs[1].predictions)
    assert (runs[0].predictions != runs[2].predictions).any()


def test_shuffled_labels_give_chance(sets):
    train, test = sets
    assert linear.probe(train, test, VALIDATION, 4, epochs=20).accuracy > 0.6
    shuffled = Features(train.plain, np.random.default_rng(0).permutation(train.labels), train.mirror)
    assert linear.probe(shuffled, test, VALIDATION, 4, epochs=20).accuracy == pytest.approx(0.25, abs=0.1)


def test_constant_features_give_chance_and_no_nan(sets):
    train, test = (Features(np.full_like(s.plain, 0.3), s.labels) for s in sets)
    found = linear.probe(train, test, VALIDATION, 4, epochs=3)
    assert len(set(found.predictions.tolist())) == 1
    assert found.accuracy < 0.35


def test_mistakes_are_named(sets):
    train, test = sets
    def refused(match, a=train, b=test, indices=VALIDATION, classes=4):
        with pytest.raises(UserError, match=match):
            linear.probe(a, b, indices, classes, epochs=1)
    nan = train.plain.copy()
    nan[40, 3] = np.inf
    refused("training features: the features of picture 40 are not finite", Features(nan, train.labels))
    refused("mirror images.: the features of picture 40", Features(train.plain, train.labels, nan))
    refused("mirror images of shape", Features(train.plain, train.labels, train.mirror[:-1]))
    refused("the data set has 3 classes", classes=3)
    refused("test features: 2000 pictures, but labels of shape", b=Features(test.plain, test.labels[:-1]))
    refused("width 12, test features 11", b=Features(test.plain[:, 1:], test.labels))
    refused("must be different rows in 0 .. 599", indices=np.array([0, 600]))
    refused("must be different rows", indices=np.array([3, 3]))
    refused("must be different rows", indices=np.array([], int))
    refused("nothing is left to train on", indices=np.arange(600))


def test_evaluate_imports_nothing_from_train():
    for file in Path(evaluate.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
                [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else [])
            assert not any(n.startswith("mlx_hjepa.train") for n in names), file


def test_the_augmented_probe_learns_each_level_from_its_own_features():
    digits = load_digits()
    images = np.repeat((digits.images * 15).astype(np.uint8)[..., None], 3, axis=-1)
    rows, test = np.arange(0, 1200), np.arange(1200, len(images))

    def pixels(x, columns):
        return x[..., 0].reshape(len(x), -1)[:, columns].astype(mx.float32 if isinstance(x, mx.array) else np.float32)

    def noisy(x, key, columns):
        found = pixels(x, columns)
        return found + 5 * mx.random.normal(found.shape, key=key)

    whole, part = slice(0, 64), slice(0, 16)
    train, scored = ([Features(pixels(images[r], c), digits.target[r]) for c in (whole, part)] for r in (rows, test))
    pictures = linear.Pictures(images, digits.target.astype(np.int32))
    both = linear.augmented_probe(lambda x, key: [noisy(x, key, c) for c in (whole, part)], train, pictures, rows,
                                  scored, 10, [1e-2, 1e-2], epochs=20)
    assert both[0]["accuracy"] > 0.85 > both[1]["accuracy"] + 0.15 > 0.45
    alone = linear.augmented_probe(lambda x, key: [noisy(x, key, part)], train[1:], pictures, rows, scored[1:],
                                   10, [1e-2], epochs=20)
    assert alone[0]["accuracy"] == pytest.approx(both[1]["accuracy"], abs=0.01)
