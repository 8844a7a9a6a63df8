"""The encoder: a pre-norm vision transformer without class token, as functions of a dictionary of weights.

Weights carry timm's VisionTransformer names; a Linear's weight is stored (in, out), the transpose of timm's.
B pictures, n tokens, N = grid * grid tokens of a whole picture, D the width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hjepa.config import Config

EPS = 1e-6
GELU_K = math.sqrt(2 / math.pi)
CUBE = 2 * GELU_K * 0.044715
# tanh(u) = u P(u^2) / Q(u^2) to a few units in the last place of fp32, as in Eigen (Eigen/src/Core/MathFunctionsImpl.h)
TANH_LIMIT = 7.90531110763549805
TANH_P = (4.89352455891786e-03, 6.37261928875436e-04, 1.48572235717979e-05, 5.12229709037114e-08,
          -8.60467152213735e-11, 2.00018790482477e-13, -2.76076847742355e-16)
TANH_Q = (4.89352518554385e-03, 2.26843463243900e-03, 1.18534705686654e-04, 1.19825839466702e-06)

Weights = dict[str, mx.array]


def layer_norm(x: mx.array) -> mx.array:
    """LayerNorm without affine over the last axis; statistics in fp32, result in x's dtype."""
    return mx.fast.layer_norm(x, None, None, EPS)


def own_gradient(forward: Callable, backward: Callable) -> Callable:
    """`forward` with the gradient `backward(primals, cotangents, outputs)`, on the stream where `forward` ran: MLX
    would take the default one."""
    def function(*primals):
        stream = mx.default_stream(mx.default_device())
        made: Any = mx.custom_function(forward)

        @made.vjp
        def gradient(*arguments):
            with mx.stream(stream):
                return backward(*arguments)

        return made(*primals)

    return function


def exact_sigmoid(x: mx.array, square: mx.array) -> mx.array:
    """sigmoid(2k(x + 0.044715 x^3)) of fp32 x, k = sqrt(2/pi)."""
    return mx.sigmoid(x * (2 * GELU_K + CUBE * square))


def _sigmoid(x: mx.array, square: mx.array) -> mx.array:
    """The same. MLX's CPU back-end computes exponentials one by one; it vectorises a quotient of polynomials."""
    if mx.default_device() != mx.cpu:
        return exact_sigmoid(x, square)
    u = mx.clip(x * (GELU_K + CUBE / 2 * square), -TANH_LIMIT, TANH_LIMIT)
    return 0.5 + 0.5 * u * _polynomial(TANH_P, u * u) / _polynomial(TANH_Q, u * u)


def _polynomial(coefficients: tuple[float, ...], x: mx.array) -> mx.array:
    """Horner's scheme; the constant term first."""
    value: Any = coefficients[-1]
    for c in coefficients[-2::-1]:
        value = value * x + c
    return value


def _gelu(x: mx.array) -> mx.array:
    """GELU, tanh form (Hendrycks & Gimpel 2016, section 2), as x * sigmoid(2k(x + 0.044715 x^3)), k = sqrt(2/pi).

    Computed in fp32 inside one kernel. The gradient is made from x again, so that nothing but x is kept for it.
    """
    x32 = x.astype(mx.float32)
    return (x32 * _sigmoid(x32, x32 * x32)).astype(x.dtype)


def _gelu_vjp(x, dy, _):
    x32 = mx.depends(x, dy).astype(mx.float32)  # or mx.compile finds the forward's terms again, and keeps them till now
    square = x32 * x32
    s = _sigmoid(x32, square)
    slope = 1 + x32 * (2 * GELU_K + 3 * CUBE * square) * (1 - s)
    return (s * dy.astype(mx.float32) * slope).astype(x.dtype)  # 11 steps deep, the most that mx.compile fuses


gelu = own_gradient(_gelu, _gelu_vjp)


@cache
def _attend(heads: int) -> Any:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, equation 1) with its gradient: qkv (B, n, 3D) -> (B, n, D).

    One kernel scales q and k by d^-1/4 each and lays every head's rows together; CUDA's products would copy them again
    for each use. That scaled copy and the probabilities are kept for the gradient, as further results. The gradients
    are laid together first and turned once: three turned into one array take four times as long.
    """
    def forward(qkv):
        b, n, width = qkv.shape
        root = (width // 3 // heads) ** -0.25
        factors = mx.array([root, root, 1.0], dtype=qkv.dtype).reshape(3, 1, 1, 1, 1)
        parts = qkv.reshape(b, n, 3, heads, -1).transpose(2, 0, 3, 1, 4) * factors
        q, k, v = (part.squeeze(0) for part in mx.split(parts, 3))
        scores = mx.softmax(q @ k.transpose(0, 1, 3, 2), axis=-1, precise=True)
        return (scores @ v).transpose(0, 2, 1, 3).reshape(b, n, -1), parts, scores

    def backward(qkv, cotangents, outputs):
        (b, n, width), (_, parts, scores) = qkv.shape, outputs
        q, k, v = (part.squeeze(0) for part in mx.split(parts, 3))
        dy = mx.contiguous(cotangents[0].reshape(b, n, heads, -1).transpose(0, 2, 1, 3))
        root = (width // 3 // heads) ** -0.25
        slope = dy @ v.transpose(0, 1, 3, 2)
        ds = scores * (slope - (scores * slope).sum(axis=-1, keepdims=True)) * root
        grads = mx.stack([ds @ k, ds.transpose(0, 1, 3, 2) @ q, scores.transpose(0, 1, 3, 2) @ dy])
        return grads.transpose(1, 3, 0, 2, 4).reshape(b, n, -1)

    return own_gradient(forward, backward)


def attention(w: Weights, prefix: str, x: mx.array, heads: int, fused: bool) -> mx.array:
    """Multi-head self-attention, (B, n, D) -> (B, n, D). `fused` takes MLX's kernel, which has no gradient of its own:
    under value_and_grad it would be computed twice."""
    b, n, d = x.shape
    qkv = mx.addmm(w[f"{prefix}.qkv.bias"], x, w[f"{prefix}.qkv.weight"])
    if fused:
        q, k, v = (part.reshape(b, n, heads, -1).transpose(0, 2, 1, 3) for part in mx.split(qkv, 3, axis=-1))
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=(d // heads) ** -0.5)
        out = out.transpose(0, 2, 1, 3).reshape(b, n, d)
    else:
        out = _attend(heads)(qkv)[0]
    return mx.addmm(w[f"{prefix}.proj.bias"], out, w[f"{prefix}.proj.weight"])


def mlp(w: Weights, prefix: str, x: mx.array) -> mx.array:
    """Linear, GELU, Linear."""
    hidden = gelu(mx.addmm(w[f"{prefix}.fc1.bias"], x, w[f"{prefix}.fc1.weight"]))
    return mx.addmm(w[f"{prefix}.fc2.bias"], hidden, w[f"{prefix}.fc2.weight"])


def block(w: Weights, prefix: str, x: mx.array, heads: int, fused: bool, drop=None) -> mx.array:
    """One pre-norm transformer block. `drop` is None or two (B, 1, 1) factors of the residual branches."""
    first, second = drop if drop is not None else (None, None)
    y = mx.fast.layer_norm(x, w[f"{prefix}.norm1.weight"], w[f"{prefix}.norm1.bias"], EPS)
    y = attention(w, f"{prefix}.attn", y, heads, fused)
    x = x + (y if first is None else y * first)
    y = mx.fast.layer_norm(x, w[f"{prefix}.norm2.weight"], w[f"{prefix}.norm2.bias"], EPS)
    y = mlp(w, f"{prefix}.mlp", y)
    return x + (y if second is None else y * second)


def linear_weights(key: mx.array, inputs: int, outputs: int, name: str, scale: float = 1.0) -> Weights:
    """Weight uniform within scale/sqrt(inputs), as nn.Linear's, and zero bias.

    Its standard deviation is 0.02 at 833 inputs. At the widths trained here a plain 0.02 is too small: pixels drown in
    the positions added to them, and the features reach less than half the effective rank (docs/results.md).
    """
    weight = mx.random.uniform(-1, 1, (inputs, outputs), key=key) * (scale * inputs**-0.5)
    return {f"{name}.weight": weight, f"{name}.bias": mx.zeros((outputs,))}


def norm_weights(dim: int, name: str) -> Weights:
    return {f"{name}.weight": mx.ones((dim,)), f"{name}.bias": mx.zeros((dim,))}


def block_weights(key: mx.array, dim: int, hidden: int, layer: int, prefix: str) -> Weights:
    """One block's weights. Output projections are scaled by 1/sqrt(2 * layer), layer counted from 1 (as in I-JEPA)."""
    keys = mx.random.split(key, 4)
    scale = 1 / math.sqrt(2 * layer)
    return {
        **norm_weights(dim, f"{prefix}.norm1"),
        **linear_weights(keys[0], dim, 3 * dim, f"{prefix}.attn.qkv"),
        **linear_weights(keys[1], dim, dim, f"{prefix}.attn.proj", scale),
        **norm_weights(dim, f"{prefix}.norm2"),
        **linear_weights(keys[2], dim, hidden, f"{prefix}.mlp.fc1"),
        **linear_weights(keys[3], hidden, dim, f"{prefix}.mlp.fc2", scale),
    }


def positions(grid: int, dim: int, trained: int | None = None) -> np.ndarray:
    """Fixed 2-D sin-cos positions, (grid * grid, dim): half the width for the row, half for the column; frequencies
    10000^(-i/(dim/4)) (as in MAE and I-JEPA). `trained`: the grid's side in training, where it was another;
    a token then lies where its middle was there."""
    omega = 10000.0 ** -(np.arange(dim // 4) / (dim / 4))
    places = (np.arange(grid) + 0.5) * ((trained or grid) / grid) - 0.5
    row, column = (axis.reshape(-1, 1) * omega for axis in np.meshgrid(places, places, indexing="ij"))
    return np.concatenate([np.sin(row), np.cos(row), np.sin(column), np.cos(column)], axis=1).astype(np.float32)


def patchify(images: mx.array, patch: int) -> mx.array:
    """(B, S, S, 3) -> (B, N, patch * patch * 3), patches in reading order, pixels row by row, colour last."""
    b, size, _, channels = images.shape
    g = size // patch
    x = images.reshape(b, g, patch, g, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, g * g, patch * patch * channels)


class Encoder:
    """The shape of an encoder; its weights come with each call.

    size: of the pictures' sides in pixels, by default the configuration's.
    """

    def __init__(self, config: Config, size: int | None = None):
        m = config.model
        assert m.dim is not None  # config resolves `size`
        assert m.depth is not None
        self.dim, self.depth, self.heads = m.dim, m.depth, m.dim // m.head_dim
        self.hidden = round(m.dim * m.mlp_ratio)
        self.patch, self.grid = m.patch, size // m.patch if size else config.grid
        self.depths = sorted({level.depth for level in m.levels})
        self.drop_path = m.drop_path
        self.positions = positions(self.grid, self.dim, config.grid)

    def init(self, key: mx.array) -> Weights:
        """Fresh fp32 weights."""
        keys = mx.random.split(key, self.depth + 1)
        w = linear_weights(keys[0], self.patch * self.patch * 3, self.dim, "patch_embed.proj")
        for i in range(self.depth):
            w |= block_weights(keys[i + 1], self.dim, self.hidden, i + 1, f"blocks.{i}")
        return w

    def __call__(self, w: Weights, patches: mx.array, index: mx.array | None = None, key: mx.array | None = None,
                 fused: bool = False) -> list[mx.array]:
        """The outputs of the levels' depths, each (B, n, D) in the weights' dtype.

        patches: (B, n, patch * patch * 3), only those to be seen; index: (B, n) their places in the grid, None for the
        whole picture; key: for drop path, None for none; fused: no gradient will be taken.
        """
        x = self.embed(w, patches, index)
        drops = self._drops(x.shape[0], x.dtype, key)
        outputs = []
        for i in range(self.depth):
            x = block(w, f"blocks.{i}", x, self.heads, fused, drops[i])
            if i + 1 in self.depths:
                outputs.append(x)
        return outputs

    def embed(self, w: Weights, patches: mx.array, index: mx.array | None = None) -> mx.array:
        """What enters the first block, (B, n, D); arguments as above."""
        weight = w["patch_embed.proj.weight"]
        place = mx.array(self.positions).astype(weight.dtype)
        place = place if index is None else place[index]
        return mx.addmm(w["patch_embed.proj.bias"], patches.astype(weight.dtype), weight) + place

    def _drops(self, batch: int, dtype: mx.Dtype, key: mx.array | None) -> list:
        """Stochastic depth (Huang et al. 2016): the rate rises linearly to drop_path at the last block."""
        if key is None or not self.drop_path:
            return [None] * self.depth
        keep = 1 - np.linspace(0, self.drop_path, self.depth, dtype=np.float32).reshape(-1, 1, 1, 1, 1)
        kept = mx.random.uniform(shape=(self.depth, 2, batch, 1, 1), key=key) < mx.array(keep)
        factors = (kept / mx.array(keep)).astype(dtype)
        return [(factors[i, 0], factors[i, 1]) for i in range(self.depth)]


def pooled_features(outputs: list[mx.array]) -> mx.array:
    """What a picture is represented by: the mean over tokens of each depth's LayerNorm-ed output.

    outputs: list of (B, N, D) -> (B, depths, D) in fp32.
    """
    return mx.stack([layer_norm(h.astype(mx.float32)).mean(axis=1) for h in outputs], axis=1)
