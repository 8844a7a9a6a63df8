import json
import time

import numpy as np
import pytest
from scipy.stats import t
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mlx_hjepa.evaluate import Features, few_shot
from mlx_hjepa.run import UserError


def clusters(n, classes=6, dim=16, noise=1.0, seed=0):
    """Random clusters with a common offset and random lengths, so that only the direction tells the class."""
    rng = np.random.default_rng(seed)
    centres = 3 * np.random.default_rng(99).standard_normal((classes, dim))
    labels = rng.permutation(np.arange(n) % classes)
    lengths = rng.uniform(0.2, 5, (n, 1))
    return (lengths * (centres[labels] + noise * rng.standard_normal((n, dim)) + 0.5)).astype(np.float32), labels


def noise(n, classes, dim=16, seed=0):
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32), np.arange(n) % classes


def bank(pair):
    return Features(*pair)


def test_two_separable_clusters_are_told_apart():
    found = few_shot.episodes(*clusters(200, classes=2, noise=0.01), 2, ways=2, episodes=50)
    assert [found["shots"][k]["accuracy"] for k in ("1", "5", "10")] == [1, 1, 1]
    assert found["shots"]["1"]["std"] == 0
    assert found["shots"]["1"]["interval"] == [1, 1]


def test_noise_gives_chance_within_the_interval():
    for ways in (2, 5):
        for result in few_shot.episodes(*noise(2000, 10), 10, ways=ways, seed=1)["shots"].values():
            low, high = result["interval"]
            assert low < 1 / ways < high
            assert high - low < 0.02


def test_shuffled_labels_give_chance():
    x, y = clusters(3000, noise=0.1)
    assert few_shot.episodes(x, y, 6, episodes=100)["shots"]["5"]["accuracy"] > 0.99
    mixed = np.random.default_rng(5).permutation(y)
    assert few_shot.episodes(x, mixed, 6)["shots"]["5"]["accuracy"] == pytest.approx(0.2, abs=0.015)


def test_a_constant_encoder_scores_exactly_chance():
    result = few_shot.episodes(np.full((300, 8), 0.3, np.float32), np.arange(300) % 6, 6, episodes=20)["shots"]["5"]
    assert result["accuracy"] == pytest.approx(0.2, abs=1e-12)
    assert result["std"] == pytest.approx(0, abs=1e-12)


def reference(x, rows, shots, queries):
    """One episode after another, in float64, by the definition."""
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    for episode in rows:
        centroids = np.array([unit[way[:shots]].sum(axis=0) for way in episode])
        centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
        yield np.mean([np.argmax(centroids @ unit[row]) == way
                       for way, members in enumerate(episode) for row in members[len(members) - queries:]])


def test_accuracy_and_interval_follow_the_definition():
    x, y = clusters(300, noise=4.0)
    found = few_shot.episodes(x, y, 6, ways=4, shots=(7, 1), queries=3, episodes=37, seed=2)
    rows = few_shot._draw(y, 6, 4, 10, 37, 2)
    assert {k: found[k] for k in ("ways", "queries", "episodes", "seed")} == {"ways": 4, "queries": 3, "episodes": 37,
                                                                              "seed": 2}
    for k in (1, 7):
        each = np.array(list(reference(x, rows, k, 3)))
        assert 0.3 < each.mean() < 0.95
        std = np.sqrt(np.sum((each - each.mean()) ** 2) / 36)
        result, half = found["shots"][str(k)], 1.96 * std / np.sqrt(37)
        assert result["accuracy"] == pytest.approx(each.mean())
        assert result["std"] == pytest.approx(std)
        assert result["interval"] == pytest.approx([each.mean() - half, each.mean() + half])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_an_episode_has_different_classes_and_pictures():
    labels = np.random.default_rng(0).permutation(np.arange(200) % 8)
    rows = few_shot._draw(labels, 8, 5, 25, 60, 0)
    drawn = labels[rows]
    assert (drawn == drawn[:, :, :1]).all()
    assert all(len(set(episode)) == 5 for episode in drawn[:, :, 0])
    assert all(len(np.unique(episode)) == 125 for episode in rows)
    assert len(np.unique(rows)) == 200
    assert len({tuple(episode) for episode in drawn[:, :, 0]}) > 50


def test_every_encoder_meets_the_same_episodes():
    x, y = clusters(300, noise=4.0)
    first = few_shot.episodes(x, y, 6, episodes=40)
    wide = np.concatenate([np.zeros_like(x), -2 * x[:, ::-1]], axis=1)  # the same angles in another space
    assert few_shot.episodes(wide, y, 6, episodes=40) == first
    assert few_shot.episodes(x, y, 6, episodes=40, seed=1)["shots"] != first["shots"]


@pytest.mark.parametrize(("change", "message"), [
    ({"ways": 7}, "7-way episodes, but the data set has 6 classes"),
    ({"shots": (1, 40)}, "class 0 has 50 test pictures, but 40 shots and 15 queries take 55"),
    ({"labels": np.arange(300) % 5}, "class 5 has 0 test pictures"),
    ({"labels": np.arange(300) % 7}, "labels from 0 to 6"),
    ({"features": np.full((300, 4), np.nan, np.float32)}, "picture 0 are not finite"),
    ({"shots": ()}, "at least"),
    ({"queries": 0}, "at least"),
    ({"ways": 1}, "at least"),
    ({"episodes": 1}, "at least"),
])
def test_impossible_episodes_are_refused(change, message):
    values = {"features": np.ones((300, 4), np.float32), "labels": np.arange(300) % 6, "classes": 6} | change
    with pytest.raises(UserError, match=message):
        few_shot.episodes(**values)


def test_six_hundred_wide_episodes_are_quick():
    x, y = noise(3000, 10, dim=1152)
    start = time.perf_counter()
    few_shot.episodes(x, y, 10)
    assert time.perf_counter() - start < 6  # 0.3 s alone on two cores


def test_few_labels_of_separable_classes_are_enough():
    pairs = clusters(600, noise=0.01), clusters(120, noise=0.01, seed=1)
    train, test = (Features(x / np.linalg.norm(x, axis=1, keepdims=True), y) for x, y in pairs)
    found = few_shot.few_labels(train, test, 6, (1, 5), draws=3)
    for methods in found["per_class"].values():
        assert methods["centroid"]["accuracies"] == methods["logistic"]["accuracies"] == [1, 1, 1]
    assert found["skipped"] == {}


@pytest.mark.parametrize("data", ["noise", "shuffled", "constant"])
def test_few_labels_find_nothing_where_nothing_is(data):
    train, test = (clusters(n, noise=0.1, seed=s) for n, s in ((600, 0), (3000, 1)))
    if data == "noise":
        train, test = noise(600, 6), noise(3000, 6, seed=1)
    elif data == "shuffled":
        train, test = ((x, np.random.default_rng(2).permutation(y)) for x, y in (train, test))
    else:
        train, test = ((np.ones_like(x), y) for x, y in (train, test))
    for methods in few_shot.few_labels(bank(train), bank(test), 6, (1, 20), draws=3)["per_class"].values():
        for result in methods.values():
            assert result["accuracy"] == pytest.approx(1 / 6, abs=0.025)


def test_all_labels_equal_a_direct_fit(monkeypatch):
    monkeypatch.setattr(few_shot, "ROWS", 40)
    train, test = clusters(90, noise=4.0), clusters(400, noise=4.0, seed=1)
    train[0][40:80, :8] *= 20  # the blocks differ in deviation
    found = few_shot.few_labels(bank(train), bank(test), 6, (15,), draws=2)["per_class"]["15"]
    scaler = StandardScaler().fit(train[0].astype(np.float64))
    model = LogisticRegression(C=10 / 16, max_iter=1000).fit(scaler.transform(train[0]), train[1])
    expected = model.score(scaler.transform(test[0]), test[1])
    assert 0.4 < expected < 0.95
    assert found["logistic"]["accuracies"] == pytest.approx([expected] * 2, abs=0.003)  # rows in another order
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x, _ in (train, test)]
    centroids = np.array([unit[0][train[1] == c].mean(axis=0) for c in range(6)])
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    expected = np.mean((unit[1] @ centroids.T).argmax(axis=1) == test[1])
    assert found["centroid"]["accuracies"] == pytest.approx([expected] * 2, abs=1e-9)


def test_the_interval_over_draws_is_students():
    train, test = bank(clusters(300, noise=4.0)), bank(clusters(200, noise=4.0, seed=1))
    found = few_shot.few_labels(train, test, 6, (1, 3), draws=4, seed=3)
    for result in (r for methods in found["per_class"].values() for r in methods.values()):
        each = np.array(result["accuracies"])
        assert len(set(each)) > 1
        assert result["accuracy"] == pytest.approx(each.mean())
        assert result["std"] == pytest.approx(each.std(ddof=1))
        assert result["interval"] == pytest.approx(t.interval(0.95, 3, each.mean(), each.std(ddof=1) / 2))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert few_shot.few_labels(train, test, 6, (1, 3), draws=4, seed=3) == found
    assert few_shot.few_labels(train, test, 6, (1, 3), draws=4, seed=4)["per_class"] != found["per_class"]
    alone = few_shot.few_labels(train, test, 6, (3,), draws=4, seed=3)
    assert alone["per_class"]["3"] == found["per_class"]["3"]  # other numbers of labels change nothing


def test_logistic_regression_sees_standardised_features_and_the_centroid_directions():
    (x, y), (queries, truth) = clusters(300, noise=4.0), clusters(200, noise=4.0, seed=1)

    def score(train, test):
        return few_shot.few_labels(bank((train, y)), bank((test, truth)), 6, (5,))["per_class"]["5"]

    first, scale = score(x, queries), np.geomspace(1e-3, 1e3, 16, dtype=np.float32)
    stretched = score(x * scale + scale, queries * scale + scale)
    assert stretched["logistic"]["accuracy"] == pytest.approx(first["logistic"]["accuracy"], abs=0.01)
    rng = np.random.default_rng(0)
    longer = score(*(v * rng.uniform(0.01, 100, (len(v), 1)).astype(np.float32) for v in (x, queries)))
    assert longer["centroid"]["accuracies"] == first["centroid"]["accuracies"]


def test_more_labels_than_a_class_has_are_skipped_and_named():
    x, y = clusters(300)
    keep = np.flatnonzero((y != 4) | (np.cumsum(y == 4) <= 7))
    train, test = bank((x[keep], y[keep])), bank(clusters(100, seed=1))
    found = few_shot.few_labels(train, test, 6, (1, 7, 8, 50), draws=2)
    assert list(found["per_class"]) == ["1", "7"]
    assert found["skipped"] == {k: "class 4 has only 7 training pictures" for k in ("8", "50")}
    with pytest.raises(UserError, match="class 4 has only 7 training pictures, too few for 8 labels a class"):
        few_shot.few_labels(train, test, 6, (8, 50), draws=2)


def test_impossible_few_labels_are_refused():
    train, test = bank(clusters(300)), bank(clusters(100, seed=1))
    with pytest.raises(UserError, match="class 6 has only 0 training pictures"):
        few_shot.few_labels(train, test, 7)
    with pytest.raises(UserError, match="labels from 0 to 5"):
        few_shot.few_labels(train, test, 5)
    with pytest.raises(UserError, match="width 16, test features 3"):
        few_shot.few_labels(train, Features(test.plain[:, :3], test.labels), 6)
    for change in ({"draws": 1}, {"per_class": ()}, {"per_class": (0, 1)}):
        with pytest.raises(UserError, match="at least 2 draws, 2 classes and 1 label"):
            few_shot.few_labels(train, test, 6, **change)
