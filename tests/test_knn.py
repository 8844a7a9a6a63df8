import mlx.core as mx
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from mlx_hjepa.evaluate import knn
from mlx_hjepa.run import UserError


def clusters(n, classes=7, dim=20, noise=1.0, seed=0):
    """Random clusters with a common offset, so that cosine and plain products rank differently."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((classes, dim))
    labels = np.arange(n) % classes
    lengths = rng.uniform(0.2, 5, (n, 1))
    return (lengths * (centres[labels] + noise * rng.standard_normal((n, dim)) + 0.5)).astype(np.float32), labels


def test_predictions_equal_scikit_learns():
    x, y = load_digits(return_X_y=True)
    x = (x + 0.1 * np.random.default_rng(0).standard_normal(x.shape)).astype(np.float32)  # whole numbers would tie
    bank, queries = (x[:1200], y[:1200]), (x[1200:], y[1200:])
    ks, temperatures = (1, 5, 20, 200), (0.07, 0.1)
    cosines, rows = knn.nearest(bank[0], queries[0], 200)
    for k in ks:
        for t in temperatures:
            reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute",
                                             weights=lambda d, t=t: np.exp((1 - d) / t)).fit(
                                                 bank[0].astype(np.float64), bank[1])
            shares = reference.predict_proba(queries[0].astype(np.float64))
            scores = knn.votes(cosines[:, :k], bank[1][rows[:, :k]], 10, t)
            np.testing.assert_allclose(scores / scores.sum(1, keepdims=True), shares, atol=2e-5)
            found = knn.knn_accuracy(*bank, *queries, 10, ks, temperatures, headline=(k, t))
            np.testing.assert_array_equal(found.predictions, reference.predict(queries[0].astype(np.float64)))
            assert found.accuracy[k, t] == found.top1 == np.mean(found.predictions == queries[1])


def test_blocks_change_nothing():
    bank, queries = clusters(500)[0], clusters(60, seed=1)[0]
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (bank.astype(np.float64), queries)]
    expected = np.argsort(-(unit[1] @ unit[0].T), axis=1)
    for k in (1, 3, 40):
        for query_block, bank_block in ((1000, 1000), (7, 1000), (1000, 33), (16, 128), (60, 17)):
            cosines, rows = knn.nearest(bank, queries, k, query_block, bank_block)
            np.testing.assert_array_equal(rows, expected[:, :k])
            np.testing.assert_allclose(cosines, np.take_along_axis(unit[1] @ unit[0].T, rows, 1), atol=1e-6)


def test_device_memory_does_not_grow_with_the_bank():
    rng, peaks = np.random.default_rng(0), []
    queries = rng.standard_normal((64, 32)).astype(np.float32)
    for count in (4096, 65536):
        bank = rng.standard_normal((count, 32)).astype(np.float32)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        knn.nearest(bank, queries, 20, query_block=32, bank_block=1024)
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 1.5 * peaks[0] < bank.nbytes / 4


def test_all_ks_come_from_one_pass_and_the_headline_is_always_there():
    bank, queries = clusters(400, noise=2.0), clusters(200, noise=2.0, seed=1)
    together = knn.knn_accuracy(*bank, *queries, 7, ks=(1, 10, 100), temperatures=(0.02, 0.5))
    assert together.headline == (20, 0.07)
    assert together.accuracy[20, 0.07] == together.top1 == np.trace(together.confusion) / 200
    for (k, t), accuracy in together.accuracy.items():
        assert knn.knn_accuracy(*bank, *queries, 7, (k,), (t,), headline=(k, t)).top1 == accuracy
    assert len(set(together.accuracy.values())) > 3
    assert together.top1 < together.top5 <= 1
    assert together.interval[0] < together.top1 < together.interval[1]


def test_temperature_weights_the_nearer_neighbour_more():
    bank = np.array([[1, 0], [1, 1], [1, 1.01], [-1, 0]], np.float32)
    labels = np.array([0, 1, 1, 2])
    query, truth = np.array([[1, 0.05]], np.float32), np.array([0])
    found = knn.knn_accuracy(bank, labels, query, truth, 3, (3,), (0.07, 10.0), headline=(3, 0.07))
    assert found.accuracy == {(3, 0.07): 1.0, (3, 10.0): 0.0}  # near: exp(0.27 / 0.07) outvotes two; flat: two win
    sharp = knn.knn_accuracy(bank, labels, query, truth, 3, (3,), (1e-3,), headline=(3, 1e-3))
    assert sharp.top1 == 1  # exp(s / T) itself would be infinite


def test_a_class_without_a_vote_is_not_in_the_top_five():
    bank, labels = np.eye(3, dtype=np.float32), np.array([0, 1, 2])
    found = knn.knn_accuracy(bank, labels, bank[:1], np.array([1]), 3, (1,), headline=(1, 0.07))
    assert (found.top1, found.top5) == (0, 0)


def test_shuffled_labels_give_chance():
    (bank, labels), queries = clusters(700, 7), clusters(700, 7, seed=1)
    assert knn.knn_accuracy(bank, labels, *queries, 7, (20,)).top1 > 0.9
    shuffled = np.random.default_rng(0).permutation(labels)
    assert knn.knn_accuracy(bank, shuffled, *queries, 7, (20,)).top1 == pytest.approx(1 / 7, abs=0.06)


def test_the_parts_for_tf32_multiply_as_float32():
    x, y = (np.random.default_rng(i).standard_normal((40, 96)).astype(np.float32) for i in (0, 1))
    def tf32(a):  # what the tensor cores keep, by rounding to 10 bits
        bits = a.view(np.uint32)
        return ((bits + 0x0FFF + ((bits >> 13) & 1)) & 0xFFFFE000).astype(np.uint32).view(np.float32).astype(np.float64)
    exact = x.astype(np.float64) @ y.T
    parts = [np.array(knn.split_for_tf32(mx.array(v), q)) for v, q in ((x, True), (y, False))]
    assert np.abs(tf32(parts[0]) @ tf32(parts[1]).T - exact).max() < 1e-5
    assert np.abs(tf32(x) @ tf32(y).T - exact).max() > 1e-3


def test_mistakes_are_named():
    (bank, labels), (queries, truth) = clusters(70), clusters(14, seed=1)
    def refused(match, b=bank, bl=labels, q=queries, ql=truth, classes=7, ks=(5,), headline=(5, 0.07)):
        with pytest.raises(UserError, match=match):
            knn.knn_accuracy(b, bl, q, ql, classes, ks, headline=headline)
    broken = bank.copy()
    broken[33, 2] = np.nan
    refused("picture 33 are not finite", b=broken)
    refused("class 3 has no picture in the bank", bl=np.where(labels == 3, 4, labels))
    refused("class 7 has no picture in the bank", classes=8)
    refused("k 71 with a bank of 70 pictures", ks=(71,))
    refused("k 0 with a bank", ks=(0,))
    refused("temperature 0 must", headline=(5, 0.0))
    refused("labels from 0 to 6; the data set has 6 classes", classes=6)
    refused("labels from -1 to 6", ql=np.where(truth == 0, -1, truth))
    refused("labels must be integers", bl=labels.astype(np.float32))
    refused("70 pictures, but labels of shape", bl=labels[:-1])
    refused("width 20, the queries' 19", q=queries[:, :-1])
    refused("expected .pictures, dimensions.", b=bank[:0], bl=labels[:0])


def test_whitening_finds_classes_that_a_loud_direction_hides():
    rng = np.random.default_rng(0)
    labels = np.arange(600) % 3
    quiet = np.eye(3)[labels] + 0.2 * rng.normal(size=(600, 3))
    features = np.concatenate([50 * rng.normal(size=(600, 2)), quiet, 1 + 0 * quiet], axis=1).astype(np.float32)
    white = knn.whitening(features[:400], 8)
    z = white(features[:400])
    assert z.shape == (400, 5)  # three columns are constant
    assert np.cov(z.T) == pytest.approx(np.eye(5), abs=0.02)
    in_blocks = knn.whitening(features[:400], 8, block=7)
    assert np.abs(in_blocks(features)) == pytest.approx(np.abs(white(features)), abs=1e-3)
    assert z.mean(axis=0) == pytest.approx(0, abs=1e-3)

    def accuracy(view):
        return knn.knn_accuracy(view(features[:400]), labels[:400], view(features[400:]), labels[400:], 3, (20,)).top1
    assert accuracy(white) > 0.95
    assert accuracy(lambda x: x) < 0.6


def test_whitening_keeps_no_more_directions_than_the_bank_can_tell():
    features = np.random.default_rng(0).normal(size=(60, 30)).astype(np.float32)
    assert knn.whitening(features, 30)(features).shape == (60, 6)
    assert knn.whitening(features, 4)(features).shape == (60, 4)
