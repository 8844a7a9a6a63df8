"""The optimizer step: against a plain version, its traces, precision, accumulation, bad steps (invariants 1, 3)."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_hjepa import backend
from mlx_hjepa.model import hjepa
from mlx_hjepa.model.hjepa import HJEPA, key_of, sigreg, smooth_l1
from mlx_hjepa.model.vit import own_gradient
from mlx_hjepa.schedule import Schedule
from mlx_hjepa.train import step as step_module
from mlx_hjepa.train.step import Layout, Step, part, whole

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def step_of(config, precision="fp32", epoch_steps=20):
    return Step(HJEPA(config, MEAN, STD), Schedule(config.training, epoch_steps), precision)


def pictures(n=4, seed=0):
    return mx.array(np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8))


def run(step, steps, start=0, state=None, batch=4):
    state = state or step.initial_state()
    rows = []
    for i in range(start, start + steps):
        weights = [1.0] * len(step.model.levels)
        state, stats = step(state, pictures(batch, i), key_of(0, i), step.scalars(i, weights))
        mx.eval(state.arrays(), stats)
        rows.append(np.array(stats))
    return state, np.stack(rows)


def same(a, b):
    return all((np.array(x) == np.array(y)).all() for x, y in zip(a.arrays(), b.arrays(), strict=True))


def test_target_equals_context_encoder_bit_for_bit_at_step_0(tiny_config):
    step = step_of(tiny_config())
    state = step.initial_state()
    n = step.layout.encoder_size
    assert (np.array(state.target) == np.array(state.parameters[:n])).all()
    state, _ = run(step, 1, state=state)
    assert (np.array(state.target) != np.array(state.parameters[:n])).any(), "they are two buffers"


def test_one_trace_whatever_the_step_and_after_a_resume(tiny_config):
    step = step_of(tiny_config(model={"level_weights": "balanced"}))
    state, _ = run(step, 4)
    copy = type(state)(*(mx.array(np.array(a)) for a in state.arrays()))
    run(step, 3, start=11, state=copy)
    for i in range(2):
        mx.eval(step.health(state, pictures(8, i), key_of(0, i)))
    assert step.traces == {"step": 1, "part": 0, "update": 0, "health": 1}


def plain_steps(config, steps):
    """The same training with leaves in dictionaries, mlx.optimizers.AdamW, and no compilation."""
    model, schedule = HJEPA(config, MEAN, STD), Schedule(config.training, 20)
    encoder, predictor = model.init()
    weights = {f"encoder.{k}": v for k, v in encoder.items()} | {f"predictor.{k}": v for k, v in predictor.items()}
    target, t = dict(encoder), config.training
    groups = [{k for k, v in weights.items() if v.ndim >= 2}, {k for k, v in weights.items() if v.ndim < 2}]
    optimizers = [optim.AdamW(t.lr, list(t.betas), t.eps, decay, bias_correction=True)
                  for decay in (t.weight_decay, 0.0)]
    for i in range(steps):
        augment_key, mask_key, drop_key = mx.random.split(key_of(0, i), 3)
        patches = model.prepare(pictures(4, i), augment_key)
        seen, wanted = model.masks(4, mask_key)
        goal = model.at_targets(model.targets(target, patches), wanted)

        def loss(w, patches=patches, seen=seen, wanted=wanted, goal=goal, drop_key=drop_key):
            guess = model.predict(part(w, "encoder"), part(w, "predictor"), patches, seen, wanted, drop_key)
            context = model.context(part(w, "encoder"), patches, seen, drop_key)
            return smooth_l1(guess, goal).mean() + t.sigreg * sigreg(context, mx.random.split(drop_key)[1])

        gradient = mx.grad(loss)(dict(weights))
        norm = mx.sqrt(sum((g * g).sum() for g in gradient.values()))
        scale = mx.minimum(1, t.clip / (norm + 1e-6))
        for group, optimizer in zip(groups, optimizers, strict=True):
            optimizer.learning_rate = schedule.lr(i)
            clipped = {k: gradient[k] * scale for k in group}
            weights |= optimizer.apply_gradients(clipped, {k: weights[k] for k in group})
        m = schedule.momentum(i)
        target = {k: m * v + (1 - m) * weights[f"encoder.{k}"] for k, v in target.items()}
        mx.eval(weights, target, [o.state for o in optimizers])
    return weights, target


@pytest.mark.parametrize(("clip", "pull"), [(100.0, 0.0), (0.05, 0.0), (100.0, 0.05)])
def test_the_flat_compiled_step_equals_a_plain_one(tiny_config, clip, pull):
    config = tiny_config(training={"clip": clip, "sigreg": pull, "lr": 1e-3, "weight_decay": 0.3, "ema": [0.9, 0.99],
                                   "eps": 1e-6},
                         model={"levels": [1, {"depth": 2, "pool": 2}]})
    step = step_of(config)  # at eps 1e-8 Adam would turn the rounding of keys' biases, whose gradient is 0, into steps
    state, _ = run(step, 5)
    weights, target = plain_steps(config, 5)
    mine, theirs = step.layout.views(state.parameters), step.layout.views(state.target)
    size = np.abs(np.array(state.parameters)).max()
    assert max(np.abs(np.array(mine[k] - w)).max() for k, w in weights.items()) < 1e-5 * size
    assert max(np.abs(np.array(theirs[f"encoder.{k}"] - w)).max() for k, w in target.items()) < 1e-5 * size


@pytest.mark.parametrize("batch", [4, 5])
def test_half_a_batch_on_each_of_two_streams_is_the_same_step(tiny_config, two_cores, batch):
    config = tiny_config(training={"sigreg": 0.05, "eps": 1e-6, "batch": batch}, masking={"masks_per_image": 2},
                         model={"levels": [1, {"depth": 2, "pool": 2}]})
    threads = backend._product_threads(1)  # as inside both_cores: on some processors it decides the last digit
    try:
        one, rows = run(step_of(config), 3, batch=batch)
    finally:
        backend._product_threads(threads)
    with backend.both_cores():
        streams = backend.streams()
        two, others = run(step_of(config), 3, batch=batch)
    assert len(streams) == 2
    assert streams[0] != streams[1]
    assert np.allclose(rows, others, rtol=2e-5)
    assert same(one, two) == (batch == 5), "an odd batch stays in one piece, an even one is summed in two"
    for a, b in zip(one.arrays(), two.arrays(), strict=True):
        assert np.abs(np.array(a) - np.array(b)).max() <= 1e-5 * np.abs(np.array(a)).max()


def test_halves_drop_paths_of_their_own(tiny_config, two_cores, monkeypatch):
    step, keys = step_of(tiny_config(model={"drop_path": 0.5})), []
    state, context = step.initial_state(), step.model.context
    monkeypatch.setattr(step.model, "context", lambda *given: keys.append(given[3].tolist()) or context(*given))
    arguments = (state.parameters, state.target, state.guard, pictures(), key_of(0, 0), step.scalars(0, [1.0] * 2))
    step._gradient(*arguments)
    with backend.both_cores():
        step._gradient(*arguments)
    whole, first, second = keys
    assert whole == first
    assert first != second


def test_a_gradient_of_ones_own_stays_on_its_stream(two_cores):
    used = []

    def backward(x, dy, _):
        used.append(mx.default_stream(mx.cpu))
        return 2 * x * dy

    square = own_gradient(lambda x: x * x, backward)
    with backend.both_cores():
        first, second = backend.streams()
        gradient = mx.grad(lambda x: hjepa.side_by_side(lambda _, part: [square(part)], x)[0].sum())(mx.arange(4.0))
    assert gradient.tolist() == [0, 2, 4, 6]
    assert sorted(map(str, used)) == sorted(map(str, (first, second)))
    assert backend.streams() == [mx.default_stream(mx.cpu)]


def test_ema_moves_after_the_update_by_that_steps_momentum(tiny_config):
    step = step_of(tiny_config(training={"ema": [0.5, 1.0]}))
    before = step.initial_state()
    old = np.array(before.target, np.float64)
    state, _ = run(step, 1, state=before)
    expected = 0.5 * old + 0.5 * np.array(state.parameters, np.float64)[: len(old)]
    assert np.abs(np.array(state.target) - expected).max() < 1e-7


def test_biases_norms_and_tokens_are_not_decayed(tiny_config):
    layout = step_of(tiny_config()).layout
    decayed = layout.decayed()
    for name, (a, b) in layout.places.items():
        assert set(decayed[a:b]) == {int(name.endswith("weight") and "norm" not in name)}, name


def test_layout_packs_and_views_without_loss(tiny_config):
    model = HJEPA(tiny_config(), MEAN, STD)
    layout, weights = Layout(*model.init()), whole(*model.init())
    flat = layout.pack(weights)
    again = layout.views(flat)
    assert set(again) == set(weights)
    assert all((np.array(again[n]) == np.array(w)).all() for n, w in weights.items())
    assert set(layout.views(flat[: layout.encoder_size])) == {f"encoder.{k}" for k in model.init()[0]}


def test_a_step_needs_no_second_copy_of_the_moments(tiny_config):
    step = step_of(tiny_config(model={"dim": 256, "head_dim": 64}))
    state, more = step.initial_state(), []
    for i in range(3):
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        state, stats = step(state, pictures(2), key_of(0, i), step.scalars(i, [1.0, 1.0]))
        mx.eval(state.arrays(), stats)
        mx.synchronize()
        more.append((mx.get_peak_memory() - held) / state.parameters.nbytes)
    assert max(more) < 4  # the gradient twice, the new weights and target; 6 with the moments


def test_accumulation_equals_one_batch_and_traces_each_function_once(tiny_config):
    """With the same parts' gradients: the mean over parts, the EMA moved once."""
    config = tiny_config(training={"accumulation": 2, "batch": 4})
    step, single = step_of(config), step_of(tiny_config(training={"batch": 2}))
    state = step.initial_state()
    scalars = step.scalars(0, [1.0, 1.0])
    keys = mx.random.split(key_of(0, 0), 2)
    halves = [single._gradient(state.parameters, state.target, state.guard, pictures(4)[i * 2 : i * 2 + 2], keys[i],
                               scalars)[0] for i in range(2)]
    p, m, v, t, *_ = single._apply(*state.arrays(), (halves[0] + halves[1]) / 2, mx.zeros((3,)), scalars)
    got, _ = step(state, pictures(4), key_of(0, 0), scalars)
    for mine, theirs in zip(got.arrays()[:4], (p, m, v, t), strict=True):
        assert mx.abs(mine - theirs).max().item() < 1e-6
    run(step, 3)
    assert step.traces == {"step": 0, "part": 1, "update": 1, "health": 0}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_fp32_over_fp32_masters(tiny_config, precision):
    config = tiny_config(training={"lr": 1e-3})
    full, half = step_of(config), step_of(config, precision)
    exact, rows = run(full, 12)
    rough, near = run(half, 12)
    assert {a.dtype for a in rough.arrays()} == {mx.float32}
    assert np.abs(rows[:, 0] - near[:, 0]).max() < 0.01 * rows[:, 0].max()
    moved = np.abs(np.array(exact.parameters) - np.array(full.initial_state().parameters)).max()
    assert np.abs(np.array(exact.parameters) - np.array(rough.parameters)).mean() < 0.1 * moved
    for name in ("first_moment", "second_moment"):  # Adam would not show a gradient that is still scaled
        right, got = np.array(getattr(exact, name)), np.array(getattr(rough, name))
        assert np.abs(got - right).mean() < 0.1 * np.abs(right).max()


def test_a_bad_step_changes_nothing_and_is_counted(tiny_config):
    step = step_of(tiny_config())
    state, _ = run(step, 2)
    broken = type(state)(*state.arrays())
    broken.parameters = state.parameters + mx.where(mx.arange(state.parameters.size) == 7, float("nan"), 0.0)
    after, stats = step(broken, pictures(), key_of(0, 2), step.scalars(2, [1.0, 1.0]))
    for name in ("first_moment", "second_moment", "target"):
        assert (np.array(getattr(after, name)) == np.array(getattr(state, name))).all()
    assert np.array(stats)[2:4].tolist() == [1, 1]
    mended, stats = step(type(state)(state.parameters, *after.arrays()[1:]), pictures(), key_of(0, 3),
                         step.scalars(3, [1.0, 1.0]))
    assert np.array(stats)[2:4].tolist() == [1, 0], "in all, and in a row"
    assert (np.array(mended.parameters) != np.array(state.parameters)).any()


@pytest.mark.parametrize(("slope", "loss"), [(np.nan, 0.5), (np.inf, 0.5), (0.1, np.nan), (0.1, np.inf), (0.1, 0.5)])
def test_a_gradient_or_a_loss_that_is_not_finite_is_enough_to_skip_the_update(tiny_config, slope, loss):
    step = step_of(tiny_config())
    state, _ = run(step, 1)
    gradient = mx.where(mx.arange(state.parameters.size) == 7, slope, 0.01)
    *after, statistics = step._apply(*state.arrays(), gradient, mx.array([loss, 0.5, 0.5]), step.scalars(1, [1.0, 1.0]))
    bad = not np.isfinite([slope, loss]).all()
    assert [(np.array(a) == np.array(b)).all() for a, b in zip(after[:4], state.arrays()[:4], strict=True)] == [bad] * 4
    assert np.array(statistics)[2:4].tolist() == [bad, bad]


def test_fp16_halves_its_loss_scale_after_a_bad_step_and_doubles_it_after_many_good_ones(tiny_config):
    step = step_of(tiny_config(), "fp16")
    guard = mx.array([0.0, 0.0, 1024.0, 1999.0])
    assert np.array(step._guard(guard, mx.array(False))).tolist() == [1, 1, 512, 0]
    assert np.array(step._guard(guard, mx.array(True))).tolist() == [0, 0, 2048, 0]


def test_the_same_seed_and_step_give_the_same_update(tiny_config):
    step = step_of(tiny_config(model={"drop_path": 0.3}))
    first, second = run(step, 3)[0], run(step, 3)[0]
    assert same(first, second)


def test_health_uses_no_update_and_sees_an_untrained_predictor(tiny_config):
    step = step_of(tiny_config())
    state = step.initial_state()
    before = [np.array(a) for a in state.arrays()]
    loss, base, cosine = (np.array(x) for x in step.health(state, pictures(32), key_of(0, 1)))
    assert loss.shape == base.shape == cosine.shape == (2,)
    assert (loss > base).all()
    assert (np.abs(cosine) < 0.6).all()
    assert all((np.array(a) == b).all() for a, b in zip(state.arrays(), before, strict=True))


def test_level_weights_sum_to_one_and_steer_the_gradient(tiny_config):
    step = step_of(tiny_config())
    assert np.array(step.scalars(0, [1.0, 3.0]))[5:].tolist() == [0.25, 0.75]
    state = step.initial_state()
    only, _ = step._gradient(state.parameters, state.target, state.guard, pictures(), key_of(0, 0),
                             step.scalars(0, [1.0, 1e-9]))
    head = step.layout.views(only)["predictor.heads.bias"]
    assert mx.abs(head[32:]).max().item() < 1e-7 < mx.abs(head[:32]).max().item()


def test_the_cosine_is_per_token_and_averaged_by_level():
    x = mx.random.normal((3, 4, 2, 8), key=mx.random.key(0))
    turned = mx.concatenate([2 * x[:, :, :1], -x[:, :, 1:]], axis=2)
    assert np.allclose(np.array(step_module._cosine(x, turned)), [1, -1], atol=1e-5)
