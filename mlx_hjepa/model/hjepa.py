"""H-JEPA: context encoder, target encoder, predictor, and the loss between them at every level."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_hjepa import backend
from mlx_hjepa.config import Config
from mlx_hjepa.data.augment import augment, normalise
from mlx_hjepa.model.masks import MaskSampler
from mlx_hjepa.model.predictor import Predictor
from mlx_hjepa.model.vit import Encoder, Weights, layer_norm, own_gradient, patchify

INIT_STEP, HEALTH_STEP = 2**32 - 1, 2**32 - 2  # places in the key space that no training step reaches
SLICES = 64
BLOCK = 64  # steps


def key_of(seed: int, step: int) -> mx.array:
    """The random key of a step, a function of (seed, step) alone: a resumed run draws what it would have drawn."""
    return mx.random.key((seed << 32) | step)


class Ahead:
    """Numbers that a step needs as a small array, BLOCK steps' made at once: on CUDA making one waits for the device.

    row: a step -> its numbers.
    """

    def __init__(self, row: Callable[[int], Sequence[float]], dtype: mx.Dtype = mx.float32):
        self.row, self.dtype, self.block = row, dtype, -1

    def __call__(self, step: int) -> mx.array:
        """The row of a step, (numbers,)."""
        block, i = divmod(step, BLOCK)
        if block != self.block:
            rows = [self.row(block * BLOCK + j) for j in range(BLOCK)]
            self.block, self.rows = block, mx.array(rows, dtype=self.dtype)
        return self.rows[i:i + 1].reshape(-1)  # an index would be an array made of the host's numbers


def keys_of(seed: int) -> Ahead:
    """`key_of(seed, step)` for one step after another."""
    return Ahead(lambda step: (seed, step), mx.uint32)


def _smooth_l1(prediction: mx.array, target: mx.array) -> mx.array:
    """Smooth-L1 (Huber 1964, beta 1) in fp32, averaged over all but the levels: (B, n, L, D) twice -> (L,)."""
    distance = mx.abs(prediction.astype(mx.float32) - target.astype(mx.float32))
    return mx.where(distance < 1, 0.5 * distance * distance, distance - 0.5).mean(axis=-1).mean(axis=(0, 1))


def _smooth_l1_vjp(primals, cotangent, _):
    prediction, target = mx.depends(primals, [cotangent])  # made from these again, as in vit._gelu_vjp
    b, n, levels, d = prediction.shape
    slope = mx.clip(prediction.astype(mx.float32) - target.astype(mx.float32), -1, 1)
    gradient = slope * (cotangent.reshape(levels, 1) * (1 / (b * n * d)))
    return gradient.astype(prediction.dtype), mx.zeros_like(target)


smooth_l1 = own_gradient(_smooth_l1, _smooth_l1_vjp)


def side_by_side(function: Callable[..., list[mx.array]], *arrays: mx.array) -> list[mx.array]:
    """function(part, *arrays) -> arrays, all with the batch first: where there are two streams, half of it on each, and
    the halves joined (part 0 and 1); elsewhere the whole, part 0."""
    streams = backend.streams()
    if len(streams) == 1 or any(len(a) % len(streams) for a in arrays):
        return function(0, *arrays)
    parts = []
    for i, stream in enumerate(streams):
        with mx.stream(stream):
            parts.append(function(i, *(mx.split(a, len(streams))[i] for a in arrays)))
    return [mx.concatenate(list(halves)) for halves in zip(*parts, strict=True)]


def gather(x: mx.array, index: mx.array) -> mx.array:
    """x (B, N, D), index (B, k) -> (B, k, D). Whole rows: element by element takes 2.6 times as long on CUDA."""
    b, n, d = x.shape
    return x.reshape(b * n, d)[index + mx.array(np.arange(0, b * n, n, dtype=np.int32)[:, None])]


class HJEPA:
    """What a configuration describes; weights are passed to its functions.

    mean, std: the training pictures' colours, three numbers each on the 0..1 scale.
    """

    def __init__(self, config: Config, mean: tuple[float, ...], std: tuple[float, ...]):
        self.config, self.mean, self.std = config, mean, std
        self.encoder, self.predictor = Encoder(config), Predictor(config)
        self.masks = MaskSampler(config.grid, config.masking)
        self.levels = config.model.levels

    def init(self) -> tuple[Weights, Weights]:
        """Fresh fp32 weights of the context encoder (the target encoder's too) and of the predictor."""
        keys = mx.random.split(key_of(self.config.seed, INIT_STEP), 2)
        return self.encoder.init(keys[0]), self.predictor.init(keys[1])

    def prepare(self, images: mx.array, key: mx.array) -> mx.array:
        """uint8 (B, H, W, 3) -> the augmented, normalised pictures' patches, fp32 (B, N, patch * patch * 3)."""
        x = augment(images, self.config.data.image_size, self.config.augment, key)
        return patchify(normalise(x, self.mean, self.std), self.config.model.patch)

    def targets(self, target: Weights, patches: mx.array) -> list[mx.array]:
        """What is to be predicted at each level, (B, windows, D): the target encoder's output at the level's depth,
        LayerNorm-ed without affine, averaged over its windows in reading order. No gradient."""
        outputs = dict(zip(self.encoder.depths, self.encoder(target, patches, fused=True), strict=True))
        normed = {depth: layer_norm(h) for depth, h in outputs.items()}
        return [mx.stop_gradient(self._pool(normed[level.depth], level.pool)) for level in self.levels]

    def _pool(self, x: mx.array, pool: int) -> mx.array:
        if pool == 1:
            return x
        window = self._window(pool)
        members = (np.arange(window.max() + 1)[:, None] == window).astype(np.float32)
        return mx.array(members / members.sum(axis=1, keepdims=True)).astype(x.dtype) @ x

    def _window(self, pool: int) -> np.ndarray:
        """The window of each place, int32 (N,); where pool does not divide the grid, the last ones are cut."""
        row, column = np.divmod(np.arange(self.config.grid**2), self.config.grid)
        return (row // pool * -(-self.config.grid // pool) + column // pool).astype(np.int32)

    def windows(self, index: mx.array, pool: int) -> mx.array:
        """The window of a level in which each place of the grid lies; int32, the shape of index."""
        return index if pool == 1 else mx.array(self._window(pool))[index]

    def at_targets(self, targets: list[mx.array], wanted: mx.array) -> mx.array:
        """targets: per level (B, windows, D); wanted (B * M, kt) -> (B * M, kt, levels, D)."""
        b = targets[0].shape[0]
        index = wanted.reshape(b, -1)
        rows = [gather(t, self.windows(index, level.pool)) for t, level in zip(targets, self.levels, strict=True)]
        return mx.stack(rows, axis=2).reshape(*wanted.shape, len(rows), -1)

    def predict(self, encoder: Weights, predictor: Weights, patches: mx.array, seen: mx.array, wanted: mx.array,
                key: mx.array | None) -> mx.array:
        """patches (B, N, p); seen (B * M, kc), wanted (B * M, kt) -> predictions (B * M, kt, levels, D).

        The patches seen are gathered before the embedding: what is masked never enters, and pixels need no gradient.
        """
        return self.predictor(predictor, self.context(encoder, patches, seen, key), seen, wanted)

    def context(self, encoder: Weights, patches: mx.array, seen: mx.array, key: mx.array | None) -> list[mx.array]:
        """The context encoder's outputs at the levels' depths, LayerNorm-ed without affine, each (B * M, kc, D)."""
        visible = gather(patches, seen.reshape(patches.shape[0], -1)).reshape(*seen.shape, -1)
        return [layer_norm(h) for h in self.encoder(encoder, visible, seen, key)]


def sigreg(context: list[mx.array], key: mx.array) -> mx.array:
    """How far pictures' features are from an isotropic Gaussian, mean over the depths: SIGReg (Balestriero and LeCun
    2025, arXiv 2511.08544), the Epps-Pulley statistic of SLICES random one-dimensional projections. fp32 scalar.
    Unlike there it is not multiplied by the n features, so that its weight does not grow with batch and masks.

    context: each depth's LayerNorm-ed (n, kc, D). A feature is the mean over its tokens, here centred and scaled to
    unit mean variance, so that its shape counts and not its size.
    """
    z = mx.stack([h.astype(mx.float32).mean(axis=1) for h in context])
    z = z - z.mean(axis=1, keepdims=True)
    z = z * mx.rsqrt(mx.square(z).mean(axis=(1, 2), keepdims=True) + 1e-8)
    directions = mx.random.normal((z.shape[-1], SLICES), key=key)
    x = z @ (directions * mx.rsqrt(mx.square(directions).sum(axis=0)))
    points = np.linspace(0, 3, 17, dtype=np.float32)
    window = np.exp(-(points**2) / 2)
    share = np.full(17, 2 * points[1], np.float32) * window
    share[[0, -1]] /= 2
    angles = x[..., None] * mx.array(points)
    error = mx.square(mx.cos(angles).mean(axis=1) - mx.array(window)) + mx.square(mx.sin(angles).mean(axis=1))
    return (error * mx.array(share)).sum(axis=-1).mean()


def baseline(model: HJEPA, targets: list[mx.array], wanted: mx.array) -> mx.array:
    """Smooth-L1 of the best constant prediction for each level, place and dimension, (levels,) in fp32.

    The constant is the mean over the B pictures given; B / (B - 1) makes it leave-one-out.
    """
    b = targets[0].shape[0]
    values = []
    for target, level in zip(targets, model.levels, strict=True):
        t = target.astype(mx.float32)
        distance = mx.abs((t - t.mean(axis=0, keepdims=True)) * (b / (b - 1)))
        cost = mx.where(distance < 1, 0.5 * distance * distance, distance - 0.5).mean(axis=-1)
        index = model.windows(wanted.reshape(b, -1), level.pool)
        values.append(mx.take_along_axis(cost, index, axis=1).mean())
    return mx.stack(values)
