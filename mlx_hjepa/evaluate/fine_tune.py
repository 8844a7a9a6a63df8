"""Fine-tuning: every weight of the encoder learns from labels; and the same network from random weights, beside it.

A linear layer reads the headline feature, the mean over tokens of the LayerNorm-ed last output. AdamW, warm-up over a
20th of the epochs, cosine, drop path, label smoothing, crops, mirror images where the run took them, mild colours: the
same for both. Fine-tuning also mixes pictures in pairs, by which training from scratch lost (docs/results.md),
and multiplies the learning rate by 0.75 for each layer down from the head (Clark et al. 2020, ELECTRA; Bao et al. 2021,
BEiT). Training from scratch has half the rate and clips its gradient: with neither, twelve blocks were unstable. The
bank without its validation pictures is learnt from, 45,000 pictures of CIFAR-10's 50,000; the validation pictures
choose the epoch; the test set is looked at once, with that epoch's weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_hjepa import backend
from mlx_hjepa.config import Augment, Data, Training, section
from mlx_hjepa.data import Pictures, batches, order
from mlx_hjepa.data.augment import augment, normalise
from mlx_hjepa.evaluate import check_labels
from mlx_hjepa.evaluate.features import FrozenEncoder
from mlx_hjepa.evaluate.subject import Progress, Splits
from mlx_hjepa.metrics import probe_metrics
from mlx_hjepa.model.hjepa import INIT_STEP, Ahead, key_of, keys_of
from mlx_hjepa.model.vit import Encoder, Weights, linear_weights, patchify, pooled_features
from mlx_hjepa.run import UserError
from mlx_hjepa.schedule import Schedule

DTYPES = {"fp32": mx.float32, "bf16": mx.bfloat16}
DROP_PATH, SMOOTHING = 0.1, 0.1
AUGMENT = Augment(crop="random_resized", scale=(0.5, 1.0), jitter=0.5)


class Recipe(NamedTuple):
    """What differs between the two. layer_decay multiplies the rate, that of the head, for each layer below; clip: the
    gradient's largest norm."""

    epochs: int
    lr: float
    layer_decay: float
    mix: bool
    clip: float | None


FINE_TUNE, SCRATCH = Recipe(100, 1e-3, 0.75, True, None), Recipe(200, 5e-4, 1.0, False, 1.0)


def fine_tune(encoder: FrozenEncoder, split: Splits, flip: bool, epochs: int | None = None, scratch: bool = False,
              seed: int = 0, progress: Progress | None = None, batch: int = 256, lr: float | None = None,
              layer_decay: float | None = None, precision: Literal["auto", "fp32", "bf16"] = "auto",
              size: int | None = None) -> dict[str, Any]:
    """Train the encoder (a copy; `scratch`: its shape alone) with a linear layer on it. Returns plain values for JSON.

    accuracy, interval (Wilson's, 95 %) and top5 on the test set, 0 .. 1; epoch, the chosen one, counted from 1;
    validation and loss by epoch; trained_on and held_out, counts of pictures; seconds; settings.
    flip: mirror images too. epochs, lr and layer_decay: by default FINE_TUNE's or SCRATCH's. batch: at most a 32nd of
    the pictures, so that a small data set still gets enough steps. size: pixels a side, by default the run's, a
    multiple of the patch's; more pixels make more tokens. Raises UserError: labels out of range, no validation
    pictures, a loss that is not finite.
    """
    began, classes = time.monotonic(), len(split.classes)
    usual = SCRATCH if scratch else FINE_TUNE
    recipe = usual._replace(epochs=usual.epochs if epochs is None else epochs, lr=usual.lr if lr is None else lr,
                            layer_decay=usual.layer_decay if layer_decay is None else layer_decay)
    rows, held = _rows(split)
    batch, epochs = max(1, min(batch, len(rows) // 32)), recipe.epochs
    training = section(Training, "fine-tuning", {
        "epochs": epochs, "batch": batch, "lr": recipe.lr, "warmup_epochs": epochs / 20,
        "weight_decay": 0.05, "betas": (0.9, 0.999), "precision": backend.precision(precision)})
    tuning = Tuning(encoder, classes, Schedule(training, len(rows) // batch), recipe, scratch, seed, flip, size)
    name = "from scratch" if scratch else "fine-tuning"
    best, kept, best_epoch, validation, losses = -1.0, tuning.parameters, 0, [], []
    for epoch in range(epochs):
        losses.append(_epoch(tuning, _batches(split.train, rows, seed, epoch, batch, encoder.config.data), progress,
                             name))
        if not np.isfinite(losses[-1]):
            raise UserError(f"{name}: the loss of epoch {epoch + 1} is not finite; the checkpoint may come from a run "
                            "that diverged")
        truth = _labels(split.train)[held]
        validation.append(float(np.mean(tuning.scores(split.train, held).argmax(axis=1) == truth)))
        if validation[-1] > best:
            best, kept, best_epoch = validation[-1], tuning.parameters, epoch + 1
    tuning.parameters = kept
    found = probe_metrics(tuning.scores(split.test, split.test_rows), split.test_labels.astype(np.int64))
    return {"accuracy": found["top1"], "interval": found["interval"], "top5": found["top5"], "epoch": best_epoch,
            "epochs": epochs, "validation": validation, "loss": losses, "trained_on": len(rows), "held_out": len(held),
            "seconds": round(time.monotonic() - began, 1), "settings": tuning.settings}


def _rows(split: Splits) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of split.train to learn from and to choose on. Raises UserError."""
    check_labels(split.train_labels, len(split.train_rows), len(split.classes), "fine-tuning, training pictures")
    check_labels(split.test_labels, len(split.test_rows), len(split.classes), "fine-tuning, test pictures")
    rows = np.delete(split.train_rows, split.validation)
    if not len(rows) or not len(split.validation):
        raise UserError(f"fine-tuning: {len(split.train_rows)} training pictures are too few to hold some out")
    return rows, split.train_rows[split.validation]


def _labels(pictures: Pictures) -> np.ndarray:
    assert pictures.labels is not None
    return pictures.labels


def _batches(pictures: Pictures, rows: np.ndarray, seed: int, epoch: int, batch: int,
             data: Data) -> Iterator[tuple[mx.array, mx.array]]:
    """An epoch over `rows`: uint8 (batch, H, W, 3) and labels (batch,); the tail that fills no batch is dropped.
    Pictures of a folder are streamed, whatever the run did with its own."""
    steps, source = len(rows) // batch, data.source if pictures.names is None else "stream"
    labels = mx.array(_labels(pictures)[rows[order(seed, epoch, len(rows))]])
    images = batches(pictures, source, seed, batch, epoch * steps, (epoch + 1) * steps, data.threads, rows)
    for i, x in enumerate(images):
        yield x, labels[i * batch:(i + 1) * batch]


def _epoch(tuning: Tuning, pairs: Iterator[tuple[mx.array, mx.array]], progress: Progress | None,
           name: str) -> float:
    """Train on an epoch's batches; returns their mean loss."""
    losses: list[mx.array] = []
    for images, labels in pairs:
        losses.append(tuning.update(images, labels))
        if len(losses) > 1:
            mx.eval(losses[-2])  # one step is prepared while the one before it runs
        if progress:
            progress(name, tuning.step, tuning.schedule.total)
    return float(mx.stack(losses).mean())


class Tuning:
    """An encoder with a linear layer on it, while it learns; `traces` counts how often the step ran in Python.

    Weights and moments are flat fp32 buffers, so that AdamW is one kernel; the weights are views of theirs.
    """

    def __init__(self, encoder: FrozenEncoder, classes: int, schedule: Schedule, recipe: Recipe, scratch: bool,
                 seed: int, flip: bool, size: int | None = None):
        self.config, self.schedule, self.recipe = encoder.config, schedule, recipe
        self.scratch, self.seed = scratch, seed
        model = encoder.config.model.model_copy(update={"drop_path": DROP_PATH})
        self.size = size or encoder.config.data.image_size
        self.encoder = Encoder(encoder.config.model_copy(update={"model": model}), self.size)
        self.augment = AUGMENT.model_copy(update={"flip": flip})
        keys = mx.random.split(key_of(seed, INIT_STEP), 2)
        weights = self.encoder.init(keys[0]) if scratch else encoder.weights
        weights = {**weights, **linear_weights(keys[1], encoder.dim, classes, "head")}
        self.shapes = {name: w.shape for name, w in weights.items()}
        self.sizes = {name: w.size for name, w in weights.items()}
        decay = schedule.training.weight_decay
        self.rates = self._spread({n: recipe.layer_decay ** self._height(n) for n in weights})
        self.decays = self._spread({n: decay if w.ndim > 1 else 0 for n, w in weights.items()})
        self.parameters = self._pack(weights)
        self.moments = [mx.zeros_like(self.parameters), mx.zeros_like(self.parameters)]
        self.step, self.traces = 0, 0
        self.keys, self.scalars = keys_of(seed), Ahead(self._scalars)
        self._frozen = FrozenEncoder(encoder.config, encoder.weights, encoder.mean, encoder.std, size=self.size)
        self._compiled: Callable = mx.compile(self._update)

    @property
    def settings(self) -> dict[str, Any]:
        t = self.schedule.training
        chosen = ("batch", "lr", "min_lr", "warmup_epochs", "weight_decay", "betas", "precision")
        other = self.size != self.config.data.image_size
        return {"scratch": self.scratch, "seed": self.seed, **{key: getattr(t, key) for key in chosen},
                "layer_decay": self.recipe.layer_decay, "mix": self.recipe.mix, "clip": self.recipe.clip,
                "drop_path": DROP_PATH, "label_smoothing": SMOOTHING, "size": self.size if other else None,
                "augment": self.augment.model_dump()}

    def weights(self) -> Weights:
        """The weights as they are now, the head's among them."""
        return self._views(self.parameters)

    def update(self, images: mx.array, labels: mx.array) -> mx.array:
        """One step on uint8 (batch, H, W, 3) and labels (batch,); returns its loss, not yet computed."""
        self.parameters, *self.moments, loss = self._compiled(self.parameters, *self.moments, images, labels,
                                                              self.keys(self.step), self.scalars(self.step))
        mx.async_eval(self.parameters, self.moments, loss)
        self.step += 1
        return loss

    def _scalars(self, step: int) -> list[float]:
        """The learning rate and the two bias corrections of Adam."""
        b1, b2 = self.schedule.training.betas
        return [self.schedule.lr(step), 1 / (1 - b1 ** (step + 1)), 1 / (1 - b2 ** (step + 1))]

    def scores(self, pictures: Pictures, rows: np.ndarray) -> np.ndarray:
        """The logits of whole pictures in fp32, (len(rows), classes): no augmentation, no drop path."""
        weights = self.weights()
        self._frozen.weights = {n: w for n, w in weights.items() if not n.startswith("head.")}
        features = self._frozen.extract(pictures, rows)[:, -1]
        return features @ np.array(weights["head.weight"]) + np.array(weights["head.bias"])

    def _update(self, p, m, v, images, labels, key, scalars):
        self.traces += 1
        t, dtype, config = self.schedule.training, DTYPES[self.schedule.training.precision], self.config
        augment_key, drop_key, mix_key = mx.random.split(key, 3)
        x = augment(images, self.size, self.augment, augment_key)
        own = mixing(len(images), self.size, mix_key) if self.recipe.mix else mx.ones((len(images), 1, 1, 1))
        x, labels = x * own + mx.roll(x, 1, 0) * (1 - own), mx.stack([labels, mx.roll(labels, 1)])
        shares = own.mean(axis=(1, 2, 3))
        patches = patchify(normalise(x, self._frozen.mean, self._frozen.std), config.model.patch).astype(dtype)

        def loss(leaves):
            feature = pooled_features(self.encoder(leaves, patches, key=drop_key)[-1:])[:, 0]
            logits = feature @ leaves["head.weight"].astype(mx.float32) + leaves["head.bias"].astype(mx.float32)
            return smoothed_cross_entropy(logits, labels, mx.stack([shares, 1 - shares]))

        value, gradients = mx.value_and_grad(loss)(self._views(p.astype(dtype)))
        g = self._pack(gradients).astype(mx.float32)
        if self.recipe.clip:
            g = g * mx.minimum(1.0, self.recipe.clip / (mx.sqrt((g * g).sum()) + 1e-6))
        (b1, b2), (lr, c1, c2) = t.betas, mx.split(scalars, 3)
        m, v, rate = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g, lr * self.rates
        p = p * (1 - rate * self.decays) - rate * (m * c1) / (mx.sqrt(v * c2) + t.eps)
        return p, m, v, value

    def _height(self, name: str) -> int:
        """Layers between a weight and the head: 0 for the head itself, depth + 1 for the patch embedding."""
        if name.startswith("head."):
            return 0
        return self.encoder.depth - int(name.split(".")[1]) if name.startswith("blocks.") else self.encoder.depth + 1

    def _spread(self, values: dict[str, float]) -> mx.array:
        return mx.array(np.concatenate([np.full(self.sizes[n], value, np.float32) for n, value in values.items()]))

    def _pack(self, leaves: Weights) -> mx.array:
        return mx.concatenate([leaves[n].reshape(-1) for n in self.shapes])

    def _views(self, flat: mx.array) -> Weights:
        ends = [int(end) for end in np.cumsum(list(self.sizes.values()))]
        parts = mx.split(flat, ends[:-1])
        return {n: part.reshape(shape) for part, (n, shape) in zip(parts, self.shapes.items(), strict=True)}


def mixing(batch: int, size: int, key: mx.array) -> mx.array:
    """How much of each pixel is the picture's own, (batch, size, size, 1) in 0 .. 1; the rest is another picture's.

    Drawn per picture: half of the time a rectangle of the other is pasted in (CutMix, Yun et al. 2019), half of the
    time both are blended (mixup, Zhang et al. 2018). The other's share is uniform in 0 .. 1; a rectangle's, before the
    border cuts it.
    """
    share, y, x, kind = mx.split(mx.random.uniform(shape=(batch, 4, 1, 1), key=key), 4, axis=1)
    place = mx.arange(size) + 0.5
    half = mx.sqrt(share) * (size / 2)
    pasted = (mx.abs(place[:, None] - y * size) < half) & (mx.abs(place - x * size) < half)
    return (1 - mx.where(kind < 0.5, pasted, share)).reshape(batch, size, size, 1)


def smoothed_cross_entropy(logits: mx.array, labels: mx.array, shares: mx.array) -> mx.array:
    """Mean cross-entropy of (B, C) logits with (1 - s) one-hot + s / C, s = 0.1 (Szegedy et al. 2015, section 7).

    labels, shares: (L, B), the classes in each picture and how much of it each has, adding up to 1.
    """
    classes = logits.shape[1]
    parts = ((labels[..., None] == mx.arange(classes)) * shares[..., None]).sum(axis=0)
    goal = parts * (1 - SMOOTHING) + SMOOTHING / classes
    return (mx.logsumexp(logits, axis=1) - (goal * logits).sum(axis=1)).mean()
