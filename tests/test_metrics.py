import math
import re
import time

import numpy as np
import pytest

from mlx_hjepa import metrics

rng = np.random.default_rng(0)
SKEWED = (rng.standard_normal((400, 24)) * np.geomspace(1, 0.01, 24) + 0.7).astype(np.float32)


def entropy_rank(sigma, eps=0.0):
    p = sigma / sigma.sum() + eps
    return math.exp(-np.sum(p * np.log(p)))


def centred(x):
    x = x.astype(np.float64)
    return x - x.mean(axis=0)


@pytest.mark.parametrize("x", [SKEWED, SKEWED[:15]], ids=["tall", "wide"])
def test_ranks_and_spectrum_equal_a_direct_svd(x):
    sigma = np.linalg.svd(centred(x), compute_uv=False)
    kept = sigma[sigma > 1e-6 * sigma[0]]
    np.testing.assert_allclose(metrics.singular_spectrum(x), np.where(sigma > 1e-6 * sigma[0], sigma, 0), rtol=1e-4)
    assert metrics.effective_rank(x) == pytest.approx(entropy_rank(kept), rel=1e-4)
    raw = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    assert metrics.rankme(x) == pytest.approx(entropy_rank(raw, 1e-7), rel=1e-4)
    assert metrics.rankme(x) < 0.9 * metrics.effective_rank(x)  # the common mean is a direction of its own: not centred


def test_isotropic_features_have_full_rank():
    x = np.random.default_rng(1).standard_normal((4000, 16)).astype(np.float32)
    assert metrics.effective_rank(x) == pytest.approx(16, rel=0.01)
    assert metrics.normalised_std(x) == pytest.approx(1, rel=0.02)
    assert metrics.alpha_req(x) == pytest.approx(0, abs=0.2)
    cosines = metrics.pairwise_cosine(x)
    assert cosines["mean"] == pytest.approx(0, abs=0.01)
    assert cosines["std"] == pytest.approx(1 / 4, rel=0.02)
    assert -1 <= cosines["min"] < cosines["p5"] < cosines["median"] < cosines["p95"] < cosines["max"] <= 1


def test_rank_one_features_have_rank_one():
    x = np.outer(np.linspace(-1, 1, 300), np.arange(1, 21)).astype(np.float32)
    assert metrics.effective_rank(x) == pytest.approx(1, abs=1e-6)
    assert metrics.rankme(x) == pytest.approx(1, abs=1e-3)
    assert metrics.alpha_req(x) is None
    assert metrics.verdict(metrics.effective_rank(x), metrics.normalised_std(x), 20)[0] == "collapsed"


def test_two_clusters_have_the_known_values():
    x = np.zeros((100, 4), np.float32)
    x[:50, 0], x[50:, 1] = 3.0, 0.5  # two orthogonal directions; the lengths must not matter where L2 is taken
    same, across = 2 * (50 * 49 / 2), 50 * 50
    expected = math.log((same + across * math.exp(-4)) / (same + across))
    assert metrics.uniformity(x) == pytest.approx(expected, rel=1e-6)
    assert metrics.pairwise_cosine(x)["mean"] == pytest.approx(same / (same + across), rel=1e-6)
    assert metrics.normalised_std(x) == pytest.approx((0.5 + 0.5 + 0 + 0) / 4 * 2)
    assert metrics.effective_rank(x) == pytest.approx(1, abs=1e-6)  # centred, two points span a line
    assert metrics.alignment(x, np.roll(x, 50, axis=0)) == pytest.approx(2)
    assert metrics.alignment(x, 7 * x) == pytest.approx(0)


@pytest.mark.parametrize("x", [np.full((50, 8), 0.3), np.zeros((50, 8)), np.tile(rng.standard_normal(8), (50, 1))],
                         ids=["equal", "zero", "one row"])
@pytest.mark.parametrize("rounding", [0.0, 5e-8])
def test_constant_features_degenerate_without_nan(x, rounding):
    x = (x * (1 + rounding * rng.uniform(-1, 1, x.shape))).astype(np.float32)
    assert metrics.effective_rank(x) == pytest.approx(1)
    assert metrics.rankme(x) == pytest.approx(1, abs=1e-4)
    assert metrics.normalised_std(x) < 1e-5
    assert metrics.alpha_req(x) is None
    assert metrics.uniformity(x) == pytest.approx(-4 if not x.any() else 0, abs=1e-5)
    assert np.isfinite(metrics.lidar(x.reshape(10, 5, 8)))
    assert metrics.linear_cka(x, SKEWED[:50]) == 0
    assert metrics.verdict(metrics.effective_rank(x), metrics.normalised_std(x), 8)[0] == "collapsed"


def test_alpha_req_recovers_a_power_law():
    basis = np.linalg.qr(np.random.default_rng(2).standard_normal((600, 121)))[0]
    basis -= basis.mean(axis=0)
    basis = np.linalg.qr(basis)[0][:, :120]
    x = basis * np.arange(1, 121) ** -0.6  # sigma ~ i^-0.6, eigenvalues ~ i^-1.2
    assert metrics.alpha_req(x) == pytest.approx(1.2, rel=1e-6)
    head = x.copy()
    head[:, :4] *= 50
    head[:, 100:] *= 0.01
    assert metrics.alpha_req(head) == pytest.approx(1.2, rel=1e-6)  # indices 1 to 4 and beyond 100 are not fitted


def test_linear_cka_equals_hsic_and_is_invariant():
    x, y = SKEWED, np.tanh(SKEWED[:, :7] @ rng.standard_normal((7, 11)))
    h = np.eye(400) - 1 / 400
    k, m = h @ (x.astype(np.float64) @ x.T.astype(np.float64)) @ h, h @ (y @ y.T) @ h
    hsic = np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m))
    assert metrics.linear_cka(x, y) == pytest.approx(hsic, rel=1e-4)
    turn = np.linalg.qr(rng.standard_normal((24, 24)))[0]
    assert metrics.linear_cka(x, 3 * x @ turn + 1) == pytest.approx(1, rel=1e-6)


def test_lidar_equals_its_formula():
    views = rng.standard_normal((40, 1, 6)) * np.geomspace(2, 0.2, 6) + 0.3 * rng.standard_normal((40, 8, 6))
    means = views.mean(axis=1)
    between = np.cov(means.T, bias=True)
    within = np.mean([np.cov(v.T, bias=True) for v in views], axis=0) + 1e-4 * np.eye(6)
    values, vectors = np.linalg.eigh(within)
    root = vectors / np.sqrt(values) @ vectors.T
    expected = entropy_rank(np.linalg.eigvalsh(root @ between @ root), 1e-8)
    assert metrics.lidar(views) == pytest.approx(expected, rel=1e-4)
    assert metrics.lidar(views[:4]) <= 3.01  # at most n - 1


def test_wilson_interval_has_known_values():
    assert metrics.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert metrics.wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert metrics.wilson_interval(20, 20)[1] == 1
    with pytest.raises(ValueError, match="no proportion"):
        metrics.wilson_interval(3, 2)


def test_probe_metrics_by_hand():
    scores = np.array([[3, 2, 1, 0, -1, -2, -9], [0, 1, 2, 3, 4, 5, 6], [0, 9, 0, 0, 0, 0, 0],
                       [-np.inf, 1, *5 * [-np.inf]]])
    found = metrics.probe_metrics(scores, np.array([5, 6, 1, 0]))
    assert found["top1"] == 0.5
    assert found["top5"] == 0.5  # rank 6 is out; -inf is no vote, though only one class beats it
    assert found["predictions"].tolist() == [0, 6, 1, 1]
    assert found["confusion"][5, 0] == found["confusion"][0, 1] == found["confusion"][6, 6] == 1
    np.testing.assert_array_equal(found["per_class"], [0, 1, np.nan, np.nan, np.nan, 0, 1])
    assert found["interval"] == metrics.wilson_interval(2, 4)


def test_verdicts():
    assert metrics.verdict(130, 0.7, 384)[0] == "healthy"
    assert metrics.verdict(30, 0.7, 384)[0] == "weak"
    assert metrics.verdict(130, 0.05, 384)[0] == "weak"
    assert metrics.verdict(5, 0.7, 384)[0] == "collapsed"
    assert metrics.verdict(130, 5e-4, 384) == ("collapsed", "normalised std 0.0005 is under 0.001: every picture has "
                                               "the same feature")
    assert metrics.verdict(60, 0.3, 384, random=(130, 0.5))[0] == "collapsed"
    assert metrics.verdict(60, 0.2, 384, random=(80, 0.5))[0] == "collapsed"
    assert metrics.verdict(70, 0.3, 384, random=(130, 0.5))[0] == "healthy"


def test_every_statistic_names_its_source():
    for function in (metrics.singular_spectrum, metrics.effective_rank, metrics.rankme, metrics.normalised_std,
                     metrics.alpha_req, metrics.uniformity, metrics.alignment, metrics.pairwise_cosine,
                     metrics.linear_cka, metrics.lidar, metrics.wilson_interval):
        assert re.search(r"(19|20)\d\d", function.__doc__), function.__name__


def test_ten_thousand_features_are_quick_and_repeatable():
    x = np.random.default_rng(3).standard_normal((10_000, 384)).astype(np.float32)
    start = time.process_time()
    rank = metrics.effective_rank(x)
    assert time.process_time() - start < 2  # of processor time; 0.4 s on two cores
    assert rank == metrics.effective_rank(x)
    assert metrics.uniformity(x) == metrics.uniformity(x)
