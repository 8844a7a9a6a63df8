"""Targets, hierarchy, loss, and that nothing leaks (invariants 1 and 2)."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_hjepa.model.hjepa import BLOCK, HJEPA, Ahead, baseline, gather, key_of, keys_of, sigreg, smooth_l1
from mlx_hjepa.model.vit import layer_norm

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
LEVELS = [1, {"depth": 2, "pool": 2}]


def model_of(config):
    model = HJEPA(config, MEAN, STD)
    return model, *model.init()  # mx.grad fills tracers into the dictionary it is given: pass it a copy


def pictures(n=4):
    return mx.array(np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8))


def masked(model, n, key):
    return model.prepare(pictures(n), key_of(0, 1)), *model.masks(n, key)


@pytest.mark.parametrize("masks", [1, 3])
def test_pixels_outside_the_context_never_change_encoder_or_predictor(tiny_config, masks):
    model, encoder, predictor = model_of(tiny_config(masking={"masks_per_image": masks}))
    patches, seen, wanted = masked(model, 4, mx.random.key(0))
    places = np.array(seen).reshape(4, masks, -1)
    for m in range(masks):
        changed = np.array(patches)
        for b in range(4):
            outside = np.setdiff1d(np.arange(16), places[b, m])
            changed[b, outside] += 100
        rows = mx.array(np.arange(4) * masks + m)
        before, after = (model.predict(encoder, predictor, x, seen, wanted, None)[rows]
                         for x in (patches, mx.array(changed)))
        assert (np.array(before) == np.array(after)).all(), "a masked pixel reached the predictor"
        inside = np.array(patches)
        inside[:, places[0, m, 0]] += 1
        other = model.predict(encoder, predictor, mx.array(inside), seen, wanted, None)[rows]
        assert (np.array(before)[0] != np.array(other)[0]).any()


def test_masks_of_one_picture_are_separate_passes(tiny_config):
    model, encoder, predictor = model_of(tiny_config(masking={"masks_per_image": 2}))
    patches, seen, wanted = masked(model, 4, mx.random.key(1))
    together = model.predict(encoder, predictor, patches, seen, wanted, None)
    for m in range(2):
        alone = model.predict(encoder, predictor, patches, seen[m::2], wanted[m::2], None)
        assert mx.abs(together[m::2] - alone).max().item() < 1e-5
    targets = model.targets(encoder, patches)
    goals = model.at_targets(targets, wanted)
    assert mx.abs(goals[1::2] - model.at_targets(targets, wanted[1::2])).max().item() == 0


def test_targets_are_normed_pooled_over_the_grid_and_taken_at_the_places_wanted(tiny_config):
    model, encoder, _ = model_of(tiny_config(model={"levels": LEVELS}))
    patches, _, wanted = masked(model, 4, mx.random.key(2))
    first, second = model.targets(encoder, patches)
    one, two = model.encoder(encoder, patches)
    assert mx.abs(first - layer_norm(one)).max().item() < 1e-6
    pooled = np.array(layer_norm(two)).reshape(4, 2, 2, 2, 2, 32).mean(axis=(2, 4)).reshape(4, 4, 32)
    assert np.abs(np.array(second) - pooled).max() < 1e-5
    goals = np.array(model.at_targets([first, second], wanted))
    for b, place in enumerate(np.array(wanted)[:, 0]):
        window = place // 4 // 2 * 2 + place % 4 // 2
        assert np.abs(goals[b, 0, 1] - pooled[b, window]).max() < 1e-5
        assert np.abs(goals[b, 0, 0] - np.array(first)[b, place]).max() < 1e-6


def test_a_pool_that_does_not_divide_the_grid_cuts_its_last_windows(tiny_config):
    model, encoder, _ = model_of(tiny_config(model={"levels": [1, {"depth": 2, "pool": 3}]}))
    patches = masked(model, 4, mx.random.key(2))[0]
    pooled = np.array(model.targets(encoder, patches)[1])
    normed = np.array(layer_norm(model.encoder(encoder, patches)[1])).reshape(4, 4, 4, 32)
    parts = slice(0, 3), slice(3, 4)
    expected = [normed[:, r, c].mean(axis=(1, 2)) for r in parts for c in parts]
    assert np.abs(pooled - np.stack(expected, axis=1)).max() < 1e-5


def test_two_levels_of_one_depth_share_the_predictors_source(tiny_config):
    levels = [{"depth": 2, "pool": 1}, {"depth": 2, "pool": 2}]
    model, encoder, predictor = model_of(tiny_config(model={"levels": levels}))
    patches, seen, wanted = masked(model, 4, mx.random.key(3))
    assert model.predictor.sources == 1
    assert model.predict(encoder, predictor, patches, seen, wanted, None).shape == (4, 4, 2, 32)


def test_the_predictor_is_told_where_each_token_it_sees_comes_from(tiny_config):
    model, encoder, predictor = model_of(tiny_config())
    patches, seen, wanted = masked(model, 4, mx.random.key(6))
    context = model.context(encoder, patches, seen, None)
    plain = model.encoder(encoder, gather(patches, seen), seen)
    assert all(mx.array_equal(normed, layer_norm(h)) for normed, h in zip(context, plain, strict=True))
    told = model.predictor(predictor, context, seen, wanted)
    turned = mx.array(np.roll(np.array(seen), 1, axis=1))  # the same places, each said of another token
    moved = mx.abs(model.predictor(predictor, context, turned, wanted) - told).max().item()
    rolled = model.predictor(predictor, [mx.roll(h, 1, axis=1) for h in context], turned, wanted)
    assert moved > 100 * mx.abs(rolled - told).max().item(), "tokens are a set: their order alone tells nothing"
    assert moved > 1e-3


def test_smooth_l1_and_its_gradient():
    rng = np.random.default_rng(0)
    guess, goal = (rng.normal(size=(5, 3, 2, 8)).astype(np.float32) * 2 for _ in range(2))
    distance = np.abs(guess - goal)
    expected = np.where(distance < 1, distance**2 / 2, distance - 0.5).mean(axis=(0, 1, 3))
    assert np.abs(np.array(smooth_l1(mx.array(guess), mx.array(goal))) - expected).max() < 1e-6
    weights = mx.array([0.3, 0.7])
    slope = mx.grad(lambda g: (smooth_l1(g, mx.array(goal)) * weights).sum())(mx.array(guess))
    exact = np.clip(guess - goal, -1, 1) * np.array([0.3, 0.7]).reshape(2, 1) / (5 * 3 * 8)
    assert np.abs(np.array(slope) - exact).max() < 1e-8


def test_no_gradient_reaches_the_targets(tiny_config):
    model, encoder, predictor = model_of(tiny_config(model={"levels": LEVELS}))
    patches, seen, wanted = masked(model, 4, mx.random.key(4))

    def loss(target):
        goal = model.at_targets(model.targets(target, patches), wanted)
        return smooth_l1(model.predict(encoder, predictor, patches, seen, wanted, None), goal).sum()

    assert all(not g.any().item() for g in mx.grad(loss)(dict(encoder)).values())


def test_gradient_reaches_every_trained_weight(tiny_config):
    model, encoder, predictor = model_of(tiny_config(model={"levels": LEVELS}))
    patches, seen, wanted = masked(model, 4, mx.random.key(5))
    goal = model.at_targets(model.targets(encoder, patches), wanted)
    shifted = [{k: v + 0.02 * mx.random.normal(v.shape, key=mx.random.key(i)) for i, (k, v) in enumerate(w.items())}
               for w in (encoder, predictor)]
    gradients = mx.grad(lambda w: smooth_l1(model.predict(*w, patches, seen, wanted, None), goal).sum())(shifted)
    still = [k for part in gradients for k, g in part.items() if not mx.abs(g).max().item() > 1e-9]
    assert still == []


def test_baseline_is_the_best_constant_for_each_place_leaving_the_picture_out(tiny_config):
    model, *_ = model_of(tiny_config(model={"levels": LEVELS}))
    rng = np.random.default_rng(0)
    targets = [rng.normal(size=(9, n, 32)) * 0.8 for n in (16, 4)]
    wanted = np.stack([rng.permutation(16)[:4] for _ in range(9)]).astype(np.int32)
    got = np.array(baseline(model, [mx.array(t.astype(np.float32)) for t in targets], mx.array(wanted)))
    window = np.arange(16) // 4 // 2 * 2 + np.arange(16) % 4 // 2
    for level, (target, place) in enumerate(zip(targets, (np.arange(16), window), strict=True)):
        values = []
        for b in range(9):
            others = np.delete(target, b, axis=0).mean(axis=0)
            distance = np.abs(target[b] - others)
            cost = np.where(distance < 1, distance**2 / 2, distance - 0.5).mean(axis=-1)
            values.append(cost[place[wanted[b]]])
        assert got[level] == pytest.approx(np.mean(values), rel=1e-4)


def test_keys_differ_between_seeds_and_steps():
    keys = {tuple(np.array(key_of(seed, step)).tolist()) for seed in range(4) for step in range(50)}
    assert len(keys) == 200


def features(z):
    return [layer_norm(mx.array(z[:, None].astype(np.float32)))]


def test_sigreg_knows_an_isotropic_gaussian_whatever_its_place_and_size():
    z = np.random.default_rng(0).normal(size=(512, 32))
    found = [float(sigreg(features(v), key_of(0, 0))) for v in (z, 5 * z + 3, z * np.linspace(1, 0.02, 32),
                                                                z[:, :1] @ z[:1] + 0.01 * z)]
    assert found[0] < 1.5 / 512  # the statistic of 512 true draws
    assert float(sigreg(features(z + 10 * z[:1]), key_of(0, 0))) < 1.5 / 512  # what LayerNorm makes small
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[0] < found[2] / 2 < found[3] / 20


def test_sigreg_pulls_features_apart():
    z = mx.array((np.random.default_rng(0).normal(size=(256, 16)) * np.linspace(1, 0.1, 16)).astype(np.float32))
    slope = mx.grad(lambda z, key: sigreg([layer_norm(z[:, None])], key))
    before = float(sigreg([layer_norm(z[:, None])], key_of(0, 2)))
    for i in range(150):
        z = z - 256 * slope(z, key_of(1, i))
        mx.eval(z)
    assert float(sigreg([layer_norm(z[:, None])], key_of(0, 2))) < before / 2


def test_keys_made_ahead_are_those_of_their_steps():
    keys = keys_of(2**31 - 1)
    for step in (0, 1, BLOCK - 1, BLOCK, 3, 2**31):
        np.testing.assert_array_equal(keys(step), key_of(2**31 - 1, step))


def test_rows_are_made_once_a_block():
    asked = []
    ahead = Ahead(lambda step: asked.append(step) or [step, 0.5])
    assert [np.array(ahead(step)).tolist() for step in (0, 1, BLOCK, BLOCK + 2)] == [[s, 0.5] for s in (0, 1, 64, 66)]
    assert asked == list(range(2 * BLOCK))
