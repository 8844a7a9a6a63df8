"""Features of pictures from a frozen encoder: whole pictures, no mask, no augmentation, fp32."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_hjepa import backend
from mlx_hjepa.config import Config
from mlx_hjepa.data.augment import normalise, resize
from mlx_hjepa.data.dataset import Pictures
from mlx_hjepa.model.hjepa import HJEPA, side_by_side
from mlx_hjepa.model.vit import Encoder, Weights, patchify, pooled_features
from mlx_hjepa.run import Run, UserError, read_arrays

BATCH = 256


class FrozenEncoder:
    """An encoder with its weights, for evaluation.

    A picture's feature at a depth is the mean over tokens of the LayerNorm-ed output there. `depths` are those that
    are computed: the levels', and with `last_four` the last four blocks' too; `levels` are the levels' alone.
    `size`: pixels a side that pictures are brought to, by default the configuration's.
    """

    def __init__(self, config: Config, weights: Weights, mean: tuple[float, ...], std: tuple[float, ...],
                 last_four: bool = False, size: int | None = None):
        self.config, self.weights, self.mean, self.std = config, weights, mean, std
        self.size, self.encoder = size or config.data.image_size, Encoder(config, size)
        self.levels, self.dim = self.encoder.depths, self.encoder.dim
        if last_four:
            first = max(1, self.encoder.depth - 3)
            self.encoder.depths = sorted({*self.levels, *range(first, self.encoder.depth + 1)})
        self.depths = self.encoder.depths
        self._forward: Any = mx.compile(self._pooled)

    @property
    def digest(self) -> str:
        """SHA-256 of the weights and of how pictures are normalised, in hexadecimal."""
        value = hashlib.sha256(repr((self.mean, self.std)).encode())
        for name in sorted(self.weights):
            value.update(f"{name} {self.weights[name].shape}".encode())
            value.update(np.array(self.weights[name]).tobytes())
        return value.hexdigest()

    def _pooled(self, weights: Weights, images: mx.array) -> mx.array:
        def pooled(_, patches):
            return [pooled_features(self.encoder(weights, patches, fused=True))]

        return side_by_side(pooled, self.patches(images))[0]

    def patches(self, images: mx.array) -> mx.array:
        """uint8 (n, H, W, 3) -> the whole pictures' normalised patches, fp32 (n, N, patch * patch * 3)."""
        x = normalise(resize(images, self.size), self.mean, self.std)
        return patchify(x, self.config.model.patch)

    def depth_features(self, images: np.ndarray, mirror: bool = False) -> np.ndarray:
        """uint8 (n, H, W, 3), all of one size -> float32 (n, depths, D). mirror: of the mirror images."""
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"images must be uint8 (n, H, W, 3), not {images.dtype} {images.shape}")
        out = np.empty((len(images), len(self.depths), self.dim), np.float32)
        with backend.both_cores():
            for start in range(0, len(images), BATCH):
                x = np.ascontiguousarray(images[start : start + BATCH, :, :: -1 if mirror else 1])
                short = min(BATCH, len(images)) - len(x)  # one shape, one trace
                padded = np.concatenate([x, np.zeros((short, *x.shape[1:]), np.uint8)]) if short else x
                out[start : start + len(x)] = np.array(self._forward(self.weights, mx.array(padded)))[: len(x)]
        return out

    def features(self, images: np.ndarray, level: str | int = "levels") -> np.ndarray:
        """uint8 (n, H, W, 3) -> float32 (n, D): `last`, a depth's number, or `levels`, every level's concatenated."""
        return self.select(self.depth_features(np.asarray(images)), level)

    def select(self, features: np.ndarray, level: str | int) -> np.ndarray:
        """(n, depths, D) -> (n, D) of `last` or of one depth, (n, k * D) of `levels` or `last4`."""
        named = {"last": self.levels[-1:], "levels": self.levels, "last4": self.depths[-4:]}
        depths = named.get(str(level)) or [int(level) if str(level).isdigit() else -1]
        if not set(depths) <= set(self.depths):
            raise ValueError(f"level must be 'last', 'levels' or a depth of {self.depths}, not {level!r}")
        return features[:, [self.depths.index(d) for d in depths]].reshape(len(features), len(depths) * self.dim)

    def extract(self, pictures: Pictures, indices: np.ndarray, mirror: bool = False,
                progress: Callable[[int], None] | None = None) -> np.ndarray:
        """Features of a split's pictures, float32 (len(indices), depths, D), read in blocks of bounded memory."""
        out = np.empty((len(indices), len(self.depths), self.dim), np.float32)
        for start in range(0, len(indices), BATCH):
            block = indices[start : start + BATCH]
            images = pictures.read(block)
            if len(block) < BATCH < len(indices):
                images = np.concatenate([images, np.zeros((BATCH - len(block), *images.shape[1:]), np.uint8)])
            out[start : start + len(block)] = self.depth_features(images, mirror)[: len(block)]
            if progress:
                progress(len(block))
        return out


def weights_file(encoder: Literal["target", "context"]) -> str:
    """The file of a checkpoint that holds this encoder."""
    return "target.safetensors" if encoder == "target" else "model.safetensors"


def load(path: str | Path, encoder: Literal["target", "context"] = "target", checkpoint: str = "latest",
         last_four: bool = False) -> FrozenEncoder:
    """The encoder of a run, or of a published folder under docs/results. Raises UserError.

    path: the run's folder, or its name under results/. checkpoint: latest, best, or a checkpoint's folder.
    last_four: compute the last four blocks' features too.
    """
    run = Run.open(path)
    if run.published_weights:
        if encoder != "target":
            raise UserError(f"{run.folder}: only the target encoder was published")
        if checkpoint != "latest":
            raise UserError(f"{run.folder}: published without checkpoints; leave out --checkpoint")
        weights = read_weights(run.checked_shards())
    else:
        file = weights_file(encoder)
        weights = read_weights([run.checkpoint(checkpoint, file) / file])
    weights = {n.removeprefix("encoder."): w for n, w in weights.items() if not n.startswith("predictor.")}
    return frozen(run, weights, last_four)


def frozen(run: Run, weights: Weights, last_four: bool = False) -> FrozenEncoder:
    """Weights checked against the run's configuration. Raises UserError when they are of another model."""
    config, (mean, std) = run.config, _colours(run)
    expected = {n: w.shape for n, w in Encoder(config).init(mx.random.key(0)).items()}
    wrong = [n for n in expected.keys() | weights.keys() if n not in weights or weights[n].shape != expected.get(n)]
    if wrong:
        raise UserError(f"{run.folder}: its weights do not fit its config.yaml, or were written by other code; "
                        f"the first of {len(wrong)} that differ: {min(wrong)}")
    return FrozenEncoder(config, weights, mean, std, last_four)


def random_encoder(run: Run) -> FrozenEncoder:
    """The untrained encoder of the run's own seed, as it was at step 0."""
    mean, std = _colours(run)
    return FrozenEncoder(run.config, HJEPA(run.config, mean, std).init()[0], mean, std)


def _colours(run: Run) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the pictures that the run was trained on. Raises UserError."""
    try:
        dataset = run.environment["dataset"]
        return tuple(dataset["mean"]), tuple(dataset["std"])
    except (KeyError, TypeError):
        raise UserError(f"{run.environment_file}: without the data's mean and std, so written by other code") from None


def read_weights(files: list[Path]) -> Weights:
    """Named arrays of safetensors files, in fp32. Raises UserError for a damaged one."""
    weights = {name: array.astype(mx.float32) for file in files for name, array in read_arrays(file).items()}
    mx.eval(weights)
    return weights
