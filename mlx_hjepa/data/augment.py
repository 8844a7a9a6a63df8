"""Augmentation and resizing on the accelerator, inside the compiled step.

A crop with resizing and mirror image is two small batched matrix products: every output pixel is a row of triangle
weights over the input's rows (and columns), which is bilinear interpolation, widened when the picture shrinks.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from mlx_hjepa.config import Augment

LUMA = np.array([[0.299], [0.587], [0.114]], np.float32)  # ITU-R BT.601
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)


def interpolation(start: mx.array, extent: mx.array, size: int, length: int, mirror: mx.array | None = None,
                  fill: bool = False) -> mx.array:
    """Weights (B, size, length) that sample `size` pixels from [start, start + extent) of a line of `length` pixels.

    start, extent: (B, 1) in pixels; mirror: (B, 1) bool, sample from the far end; fill: what lies outside the line
    counts as black instead of the nearest pixel.
    """
    step = extent / size
    place, line = (mx.array(np.arange(n, dtype=np.float32)) for n in (size, length))
    if mirror is not None:
        place = mx.where(mirror, size - 1 - place, place)
    centre = start + (place + 0.5) * step - 0.5
    if not fill:
        centre = mx.clip(centre, 0, length - 1)
    reach = mx.maximum(step, 1.0)[..., None]
    weights = mx.maximum(0, 1 - mx.abs(centre[..., None] - line) / reach)
    return weights if fill else weights / weights.sum(axis=-1, keepdims=True)


def resample(images: mx.array, rows: mx.array, columns: mx.array) -> mx.array:
    """(B, H, W, 3) float32 with weights (B, S, H) and (B, S, W) -> (B, S, S, 3)."""
    b, height, width, _ = images.shape
    size = rows.shape[1]
    x = columns @ images.transpose(0, 2, 1, 3).reshape(b, width, height * 3)
    x = rows @ x.reshape(b, size, height, 3).transpose(0, 2, 1, 3).reshape(b, height, size * 3)
    return x.reshape(b, size, size, 3)


def resize(images: mx.array, size: int) -> mx.array:
    """(B, H, W, 3) of any numbers -> (B, size, size, 3) float32, bilinear, antialiased when shrinking."""
    images = images.astype(mx.float32)
    b, height, width, _ = images.shape
    if (height, width) == (size, size):
        return images
    weights = [interpolation(mx.zeros((1, 1)), mx.full((1, 1), float(n)), size, n) for n in (height, width)]
    rows, columns = (mx.broadcast_to(w, (b, *w.shape[1:])) for w in weights)
    return resample(images, rows, columns)


def augment(images: mx.array, size: int, settings: Augment, key: mx.array) -> mx.array:
    """uint8 (B, H, W, 3) -> float32 (B, size, size, 3) in 0..255: crop, mirror image and colours, drawn per picture."""
    keys = mx.random.split(key, 2)
    x = images.astype(mx.float32)
    b, height, width, _ = x.shape
    u = mx.split(mx.random.uniform(shape=(b, 5), key=keys[0]), 5, axis=1)
    mirror = u[4] < 0.5 if settings.flip else None
    if settings.crop == "random_resized":
        tall, wide = _random_box(u[0], u[1], height, width, settings)
        rows = interpolation(u[2] * (height - tall), tall, size, height)
        columns = interpolation(u[3] * (width - wide), wide, size, width, mirror)
        x = resample(x, rows, columns)
    elif settings.crop == "pad":
        shift = [mx.floor(draw * (2 * settings.pad + 1)) - settings.pad for draw in u[2:4]]
        full = [mx.full((b, 1), float(n)) for n in (height, width)]
        rows = interpolation(shift[0], full[0], size, height, fill=True)
        columns = interpolation(shift[1], full[1], size, width, mirror, fill=True)
        x = resample(x, rows, columns)
    else:
        x = resize(x, size)
        if mirror is not None:
            x = mx.where(mirror[..., None, None], x[:, :, ::-1], x)
    return jitter(x, settings.jitter, keys[1]) if settings.jitter else x


def _random_box(area: mx.array, aspect: mx.array, height: int, width: int, settings: Augment):
    """Height and width of RandomResizedCrop's box (Szegedy et al. 2015), (B, 1): area a share of the picture's,
    uniform; aspect log-uniform; cut to the picture where torchvision draws again."""
    low, high = (math.log(a) for a in settings.aspect)
    share = settings.scale[0] + area * (settings.scale[1] - settings.scale[0])
    ratio = mx.exp(low + aspect * (high - low))
    pixels = share * (height * width)
    return mx.minimum(mx.sqrt(pixels / ratio), height), mx.minimum(mx.sqrt(pixels * ratio), width)


def jitter(x: mx.array, strength: float, key: mx.array) -> mx.array:
    """Brightness, contrast (0.4 s), saturation (0.2 s) and hue (0.1 s), each uniform per picture, in that order.

    The hue turns in the YIQ plane. x: (B, S, S, 3) in 0..255, clipped to that at the end.
    """
    spread = np.array([0.4, 0.4, 0.2, 0.1], np.float32) * strength
    u = mx.random.uniform(-1, 1, (x.shape[0], 4, 1, 1), key=key) * mx.array(spread.reshape(1, 4, 1, 1))
    u = mx.split(u, 4, axis=1)
    x = x * (1 + u[0])
    grey = x @ mx.array(LUMA)
    mean = grey.mean(axis=(1, 2), keepdims=True)
    x = mean + (x - mean) * (1 + u[1])
    grey = x @ mx.array(LUMA)
    x = grey + (x - grey) * (1 + u[2])
    angle = u[3].reshape(-1, 1, 1) * (2 * math.pi)
    cos, sin = mx.cos(angle), mx.sin(angle)
    one, zero = mx.ones_like(cos), mx.zeros_like(cos)
    turn = mx.concatenate([one, zero, zero, zero, cos, -sin, zero, sin, cos], axis=1).reshape(-1, 3, 3)
    matrix = mx.array(np.linalg.inv(YIQ)) @ turn @ mx.array(YIQ)
    x = (x.reshape(x.shape[0], -1, 3) @ matrix.transpose(0, 2, 1)).reshape(x.shape)
    return mx.clip(x, 0, 255)


def normalise(x: mx.array, mean: tuple[float, ...], std: tuple[float, ...]) -> mx.array:
    """0..255 -> zero mean and unit variance a channel; mean and std on the 0..1 scale, of the training pictures."""
    scale = 1 / (255 * np.array(std, np.float32))
    return x * mx.array(scale) - mx.array(np.array(mean, np.float32) * 255 * scale)
