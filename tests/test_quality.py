import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_hjepa import metrics
from mlx_hjepa.data.dataset import Pictures
from mlx_hjepa.evaluate import quality as module
from mlx_hjepa.evaluate.features import FrozenEncoder
from mlx_hjepa.evaluate.quality import quality, view_features
from mlx_hjepa.evaluate.subject import Splits, Subject
from mlx_hjepa.model.hjepa import HJEPA
from mlx_hjepa.run import UserError

MEAN, STD = (0.5, 0.5, 0.5), (0.3, 0.3, 0.3)
FLIP_ONLY = {"crop": "none", "flip": True}


def split(n, size=16):
    """n noise pictures, the odd rows of which are the test split."""
    images = np.random.default_rng(0).integers(0, 256, (2 * n, size, size, 3), np.uint8)
    pictures = Pictures(images, (np.arange(2 * n) // 2 % 3).astype(np.int32))
    rows = np.arange(2 * n)
    return Splits(pictures, rows[::2], np.arange(n // 10), pictures, rows[1::2], ["a", "b", "c"], None)


def encoder(config, change=lambda weight: weight):
    weights = HJEPA(config, MEAN, STD).init()[0]
    return FrozenEncoder(config, {name: change(weight) for name, weight in weights.items()}, MEAN, STD)


@pytest.fixture
def subject(tiny_config):
    return Subject("trained", split(40), encoder(tiny_config()))


def test_every_level_has_every_statistic_of_metrics(subject):
    found = quality(subject, pictures=10, views=2)
    assert list(found["by_level"]) == ["last", "levels", "1"]
    for level, key in (("last", "last"), ("levels", "levels"), (1, "1")):
        x, row = subject.features("test", level).plain, found["by_level"][key]
        for name in ("effective_rank", "rankme", "alpha_req", "normalised_std", "uniformity"):
            assert row[name] == getattr(metrics, name)(x), name
        assert row["cosine"] == metrics.pairwise_cosine(x)
        assert row["dim"] == x.shape[1] == (64 if key == "levels" else 32)
        sigma = np.linalg.svd(x - x.mean(axis=0, dtype=np.float64), compute_uv=False)
        assert len(row["spectrum"]) == min(40, x.shape[1])
        np.testing.assert_allclose(row["spectrum"], sigma[:64] / sigma[0], atol=1e-5)
    assert found["pictures"] == 40
    assert found["verdict"] in ("healthy", "weak", "collapsed")
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_spectrum_is_cut_to_sixty_four_values():
    found = quality(Subject("raw", split(100, size=6), None))
    assert len(found["by_level"]["last"]["spectrum"]) == 64
    assert found["by_level"]["last"]["spectrum"][0] == 1


def test_cka_is_symmetric_between_depths(subject):
    found, x = quality(subject, views=0)["cka"], subject.depth_features("test")
    assert found["depths"] == [1, 2]
    cka = metrics.linear_cka(x[:, 0], x[:, 1])
    assert 0 < cka < 1 - 1e-6
    np.testing.assert_allclose(found["matrix"], [[1, cka], [cka, 1]], rtol=1e-9)


def test_views_are_the_runs_own_augmentation_of_the_right_pictures(tiny_config, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 16)  # 40 pictures: the third block is filled up
    s = Subject("trained", split(40), encoder(tiny_config(augment=FLIP_ONLY)))
    views = view_features(s, s.encoder, s.split.test_rows, 6, 0)
    assert views.shape == (40, 6, 32)
    both = np.stack([s.features("test", "last").plain, s.features("test", "last", mirror=True).mirror], axis=1)
    distance = np.abs(views[:, :, None] - both[:, None]).max(axis=3)
    assert distance.min(axis=2).max() < 1e-5  # each view is its own picture, or that in the mirror
    mirrored = distance.argmin(axis=2)
    assert 0.35 < mirrored.mean() < 0.65
    assert 0 < mirrored[0].sum() < 6 or 0 < mirrored[1].sum() < 6  # the views of a picture differ
    assert len(np.unique(mirrored, axis=1).T) == 6  # no two views were drawn alike
    assert (mirrored[:16] != mirrored[16:32]).any()  # nor two blocks


def test_alignment_and_lidar_are_of_the_views(subject):
    found = quality(subject, pictures=25, views=5, seed=3)["views"]
    rows = subject.split.test_rows[np.linspace(0, 39, 25).astype(int)]
    views = view_features(subject, subject.encoder, rows, 5, 3)
    assert found == {"pictures": 25, "views": 5, "lidar": metrics.lidar(views),
                     "alignment": metrics.alignment(views[:, 0], views[:, 1])}
    assert 1 < found["lidar"] < 24
    assert 0 < found["alignment"] < 2
    assert quality(subject, pictures=25, views=5, seed=3)["views"] == found
    assert quality(subject, pictures=25, views=5, seed=4)["views"] != found


def test_the_pictures_of_the_views_are_capped_and_counted(subject):
    said = []
    subject.progress = lambda *step: said.append(step)
    found = quality(subject, views=2)["views"]
    assert (found["pictures"], found["views"]) == (40, 2)
    assert said[-1] == ("trained: views", 80, 80)
    assert (module.PICTURES, module.VIEWS) == (1000, 16)


@pytest.mark.parametrize("case", ["raw pixels", "no augmentation", "one view"])
def test_no_views_where_there_are_none(tiny_config, case):
    config = tiny_config(augment={"crop": "none", "flip": False} if case == "no augmentation" else {})
    s = Subject("raw", split(12), None if case == "raw pixels" else encoder(config))
    found = quality(s, views=1 if case == "one view" else 2)
    assert found["views"] is None
    assert (found["cka"] is None) == (case == "raw pixels")


def test_a_constant_encoder_is_collapsed(tiny_config):
    s = Subject("trained", split(40), encoder(tiny_config(), mx.zeros_like))
    found = quality(s, views=3)
    assert found["verdict"] == "collapsed"
    assert "every picture has the same feature" in found["reason"]
    row = found["by_level"]["last"]
    assert row["effective_rank"] == pytest.approx(1)
    assert row["uniformity"] == pytest.approx(0, abs=1e-5)
    assert row["alpha_req"] is None
    assert row["spectrum"] == [0.0] * 32
    assert found["cka"]["matrix"] == [[0, 0], [0, 0]]
    assert found["views"]["alignment"] == pytest.approx(0, abs=1e-9)
    assert np.isfinite(found["views"]["lidar"])
    json.dumps(found, allow_nan=False)


def test_isotropic_features_are_healthy():
    found = quality(Subject("raw", split(2000, size=4), None))  # 48 independent pixels
    assert found["verdict"] == "healthy"
    row = found["by_level"]["last"]
    assert row["dim"] == 48
    assert row["effective_rank"] > 46
    assert row["normalised_std"] == pytest.approx(0.5, abs=0.03)  # of 0 .. 1: deviation 0.289, root mean square 0.577
    assert 0 <= row["alpha_req"] < 0.3


def test_the_verdict_knows_the_rank_that_few_pictures_can_have():
    found = quality(Subject("raw", split(60), None))  # 768 independent pixels, but 59 directions
    assert found["by_level"]["last"]["effective_rank"] > 50
    assert found["verdict"] == "healthy"
    assert " of 59," in found["reason"]


def test_the_verdict_compares_with_the_untrained_encoder():
    s = Subject("raw", split(300, size=4), None)
    alone = quality(s)
    assert quality(s, untrained=alone)["verdict"] == "healthy"
    last = alone["by_level"]["last"]
    for name in ("effective_rank", "normalised_std"):
        found = quality(s, untrained={"by_level": {"last": last | {name: 2.1 * last[name]}}})
        assert found["verdict"] == "collapsed"
        assert "untrained" in found["reason"]
        assert name.split("_")[1] in found["reason"]
    assert quality(s, untrained={"by_level": {}})["verdict"] == "healthy"


def test_bad_features_are_refused(tiny_config):
    broken = Subject("trained", split(12), encoder(tiny_config(), lambda weight: weight * float("nan")))
    with pytest.raises(UserError, match="feature quality, trained: the features of picture 0 are not finite"):
        quality(broken)
    few = split(12)
    with pytest.raises(UserError, match="2 test pictures; it needs at least 3"):
        quality(Subject("raw", replace(few, test_rows=few.test_rows[:2]), None))
