"""The encoder against a plain NumPy version, its dtypes, its initial weights, drop path."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_hjepa.model import vit
from mlx_hjepa.model.vit import Encoder, gelu, patchify, pooled_features, positions


def images(n=3, size=16):
    return mx.array(np.random.default_rng(0).normal(size=(n, size, size, 3)).astype(np.float32))


def reference(w, x, heads, depth):
    """The same network in float64 NumPy, written out."""
    w = {k: np.array(v, np.float64) for k, v in w.items()}

    def norm(h, scale=1.0, shift=0.0):
        centred = h - h.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + shift

    outputs = []
    for i in range(depth):
        p = f"blocks.{i}"
        y = norm(x, w[f"{p}.norm1.weight"], w[f"{p}.norm1.bias"]) @ w[f"{p}.attn.qkv.weight"] + w[f"{p}.attn.qkv.bias"]
        b, n, d = x.shape
        q, k, v = y.reshape(b, n, 3, heads, d // heads).transpose(2, 0, 3, 1, 4)
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(d // heads)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = (scores / scores.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(b, n, d)
        x = x + y @ w[f"{p}.attn.proj.weight"] + w[f"{p}.attn.proj.bias"]
        y = norm(x, w[f"{p}.norm2.weight"], w[f"{p}.norm2.bias"]) @ w[f"{p}.mlp.fc1.weight"] + w[f"{p}.mlp.fc1.bias"]
        y = y * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + y @ w[f"{p}.mlp.fc2.weight"] + w[f"{p}.mlp.fc2.bias"]
        outputs.append(x)
    return outputs


@pytest.mark.parametrize("fused", [False, True])
def test_the_encoder_equals_a_plain_version(tiny_config, fused):
    encoder = Encoder(tiny_config())
    w = encoder.init(mx.random.key(0))
    w = {k: v + 0.05 * mx.random.normal(v.shape, key=mx.random.key(i)) for i, (k, v) in enumerate(w.items())}
    patches = patchify(images(), 4)
    x = np.array(patches, np.float64) @ np.array(w["patch_embed.proj.weight"], np.float64)
    x = x + np.array(w["patch_embed.proj.bias"], np.float64) + positions(4, 32)
    for mine, theirs in zip(encoder(w, patches, fused=fused), reference(w, x, 2, 2), strict=True):
        assert np.abs(np.array(mine) - theirs).max() < 2e-5 * np.abs(theirs).max()


def test_gelu_and_its_gradient():
    x = mx.array(np.linspace(-8, 8, 401).astype(np.float32))
    exact = np.array(x, np.float64)
    inner = math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3)
    assert np.abs(np.array(gelu(x)) - 0.5 * exact * (1 + np.tanh(inner))).max() < 2e-6
    slope = 0.5 * (1 + np.tanh(inner)) + 0.5 * exact / np.cosh(inner)**2 * math.sqrt(2 / math.pi) * (
        1 + 3 * 0.044715 * exact**2)
    got = mx.grad(lambda v: gelu(v).sum())(x)
    assert np.abs(np.array(got) - slope).max() < 5e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 2e-6), (mx.bfloat16, 2e-2)])
@pytest.mark.parametrize(("n", "heads", "dim"), [(7, 2, 16), (28, 3, 64), (64, 1, 64)])
def test_attention_and_its_gradient(dtype, tolerance, n, heads, dim):
    keys = mx.random.split(mx.random.key(0))
    x = mx.random.normal((2, n, 3 * heads * dim), key=keys[0]).astype(dtype)
    dy = mx.random.normal((2, n, heads * dim), key=keys[1]).astype(dtype)

    def plain(x):
        q, k, v = (part.reshape(2, n, heads, dim).transpose(0, 2, 1, 3) for part in mx.split(x, 3, axis=-1))
        scores = mx.softmax(q @ k.transpose(0, 1, 3, 2) * dim**-0.5, axis=-1)
        return (scores @ v).transpose(0, 2, 1, 3).reshape(2, n, -1)

    def both(attend, x, dy):
        return mx.compile(lambda x: mx.vjp(attend, [x], [dy]))(x)

    (y,), (dx,) = both(lambda x: vit._attend(heads)(x)[0], x, dy)
    (expected,), (slope,) = both(plain, x.astype(mx.float32), dy.astype(mx.float32))
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    for got, right in ((y, expected), (dx, slope)):
        assert mx.abs(got - right).max().item() < tolerance * mx.abs(right).max().item()


@pytest.mark.parametrize("value", [-300.0, 300.0])
def test_gelu_is_finite_far_out_in_half_precision(value):
    for dtype in (mx.float16, mx.bfloat16):
        x = mx.array([value], dtype)
        assert gelu(x).item() == max(value, 0)
        assert mx.grad(lambda v: gelu(v).sum())(x).item() == float(value > 0)


def test_patchify_takes_squares_in_reading_order():
    x = mx.arange(2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
    patches = np.array(patchify(x, 4))
    assert patches.shape == (2, 4, 48)
    assert (patches[1, 1] == np.array(x)[1, 0:4, 4:8].reshape(-1)).all()
    assert (patches[0, 2] == np.array(x)[0, 4:8, 0:4].reshape(-1)).all()


def test_positions_tell_every_place_apart():
    table = positions(8, 32)
    assert table.shape == (64, 32)
    gaps = np.linalg.norm(table[:, None] - table[None], axis=-1) + np.eye(64)
    assert gaps.min() > 0.1
    assert np.abs(table).max() <= 1


def test_a_finer_grid_lies_where_the_trained_one_does():
    table, finer = positions(2, 16), positions(6, 16, 2)
    middle = finer.reshape(6, 6, 16)[1::3, 1::3].reshape(4, 16)  # three tokens a side where there was one
    np.testing.assert_allclose(middle, table, atol=1e-6)
    np.testing.assert_array_equal(positions(2, 16, 2), table)


def test_a_subset_of_tokens_gets_its_own_positions(tiny_config):
    encoder = Encoder(tiny_config())
    w = encoder.init(mx.random.key(0))
    patches = patchify(images(2), 4)
    order = mx.array(np.stack([np.random.default_rng(i).permutation(16) for i in range(2)]).astype(np.int32))
    shuffled = mx.take_along_axis(patches, order[..., None], axis=1)
    for whole, part in zip(encoder(w, patches), encoder(w, shuffled, order), strict=True):
        expected = mx.take_along_axis(whole, order[..., None], axis=1)
        assert mx.abs(expected - part).max().item() < 1e-5


def test_nothing_in_half_precision_is_promoted(tiny_config, monkeypatch):
    seen = []

    class Recorder:
        def __getattr__(self, name):
            return getattr(mx, name)

        def addmm(self, c, a, b, **kwargs):
            seen.extend([c.dtype, a.dtype, b.dtype])
            return mx.addmm(c, a, b, **kwargs)

    monkeypatch.setattr(vit, "mx", Recorder())
    encoder = Encoder(tiny_config(model={"drop_path": 0.5}))
    w = {k: v.astype(mx.bfloat16) for k, v in encoder.init(mx.random.key(0)).items()}
    index = mx.array(np.tile(np.arange(6, dtype=np.int32), (3, 1)))
    outputs = encoder(w, patchify(images(), 4)[:, :6], index, mx.random.key(1))
    assert {h.dtype for h in outputs} | set(seen) == {mx.bfloat16}
    assert pooled_features(outputs).dtype == mx.float32


def test_pooled_features_are_the_mean_of_normed_tokens(tiny_config):
    encoder = Encoder(tiny_config())
    outputs = encoder(encoder.init(mx.random.key(0)), patchify(images(), 4))
    got = np.array(pooled_features(outputs))
    h = np.array(outputs[1], np.float64)
    normed = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    assert got.shape == (3, 2, 32)
    assert np.abs(got[:, 1] - normed.mean(1)).max() < 1e-5


def test_initial_weights(tiny_config):
    w = {k: np.array(v) for k, v in Encoder(tiny_config()).init(mx.random.key(0)).items()}
    bound = 32**-0.5
    assert np.abs(w["blocks.0.attn.qkv.weight"]).max() <= bound
    assert w["blocks.0.attn.qkv.weight"].std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert w["patch_embed.proj.weight"].std() == pytest.approx(48**-0.5 / math.sqrt(3), rel=0.05)
    for layer in (1, 2):
        scaled = w[f"blocks.{layer - 1}.attn.proj.weight"].std() * math.sqrt(2 * layer)
        assert scaled == pytest.approx(bound / math.sqrt(3), rel=0.06)
    assert not any(v.any() for k, v in w.items() if k.endswith("bias"))


def test_drop_path_keeps_the_mean_and_drops_whole_pictures(tiny_config):
    encoder = Encoder(tiny_config(model={"drop_path": 0.5}))
    first, second = encoder._drops(4000, mx.float32, mx.random.key(0))[1]
    assert set(np.unique(np.array(first))) == {0.0, 2.0}
    assert np.array(second).mean() == pytest.approx(1, abs=0.07)
    assert np.array(encoder._drops(4000, mx.float32, mx.random.key(0))[0][0]).min() == 1, "the rate rises from 0"
    assert encoder._drops(4, mx.float32, None) == [None, None]
