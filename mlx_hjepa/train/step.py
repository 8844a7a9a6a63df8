"""One optimizer step as one compiled function of (state, batch, key, scalars).

Parameters, moments and target weights live in one flat fp32 buffer each, so that the gradient's norm, each moment, the
weights, the EMA and the cast to half precision are a kernel each. The loss is differentiated with respect to views of
the buffer, and the gradients are concatenated once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hjepa.model.hjepa import HJEPA, Ahead, baseline, side_by_side, sigreg, smooth_l1
from mlx_hjepa.model.vit import Weights
from mlx_hjepa.schedule import Schedule

DTYPES = {"fp32": mx.float32, "bf16": mx.bfloat16, "fp16": mx.float16}
FIRST_SCALE, GROWTH_STEPS, LARGEST_SCALE = 2.0**15, 2000.0, 2.0**24  # fp16 loss scaling, as torch's GradScaler
STATISTICS = ("loss", "grad_norm", "bad", "bad_in_a_row", "loss_scale")  # the losses of the levels follow


class Layout:
    """Where each weight lies in the flat buffer: the encoder first, decayed before undecayed inside each part."""

    def __init__(self, encoder: Weights, predictor: Weights):
        named = whole(encoder, predictor)
        self.names = sorted(named, key=lambda n: (n.startswith("predictor."), named[n].ndim < 2))
        self.shapes = {n: named[n].shape for n in self.names}
        ends = np.cumsum([named[n].size for n in self.names])
        self.places = {n: (int(e) - named[n].size, int(e)) for n, e in zip(self.names, ends, strict=True)}
        self.size = int(ends[-1])
        self.encoder_size = sum(v.size for v in encoder.values())

    def pack(self, leaves: Weights) -> mx.array:
        """Named arrays -> the flat buffer."""
        return mx.concatenate([leaves[n].reshape(-1) for n in self.names if n in leaves])

    def views(self, flat: mx.array) -> Weights:
        """The flat buffer -> views by name. A buffer of the encoder's size gives the encoder's."""
        return {n: flat[a:b].reshape(self.shapes[n]) for n, (a, b) in self.places.items() if b <= flat.size}

    def decayed(self) -> np.ndarray:
        """uint8 (size,): 1 where weight decay applies. Biases, norms and tokens are not decayed."""
        return np.concatenate([np.full(int(np.prod(s)), len(s) >= 2, np.uint8) for s in self.shapes.values()])


def whole(encoder: Weights, predictor: Weights) -> Weights:
    """Both parts' weights, under `encoder` and `predictor`."""
    return {f"encoder.{n}": w for n, w in encoder.items()} | {f"predictor.{n}": w for n, w in predictor.items()}


def part(weights: Weights, name: str) -> Weights:
    """The weights under `encoder` or `predictor`, without that prefix."""
    return {n.removeprefix(f"{name}."): w for n, w in weights.items() if n.startswith(f"{name}.")}


@dataclass
class State:
    """Everything a step changes. All fp32 and flat; guard: bad steps in a row, in all, loss scale, good steps."""

    parameters: mx.array
    first_moment: mx.array
    second_moment: mx.array
    target: mx.array
    guard: mx.array

    def arrays(self) -> list[mx.array]:
        return [self.parameters, self.first_moment, self.second_moment, self.target, self.guard]


class Step:
    """The compiled step of a model; `traces` counts how often a function's body ran in Python."""

    def __init__(self, model: HJEPA, schedule: Schedule, precision: str):
        self.model, self.schedule, self.training = model, schedule, model.config.training
        self.precision, self.dtype = precision, DTYPES[precision]
        self.layout = Layout(*model.init())
        self.decayed = mx.array(self.layout.decayed())
        self.traces = {"step": 0, "part": 0, "update": 0, "health": 0}
        self._level_weights: list[float] = []
        self._whole: Any = mx.compile(self._step)
        self._part: Any = mx.compile(self._accumulate)
        self._update: Any = mx.compile(self._finish)
        self._health: Any = mx.compile(self._check)

    def initial_state(self) -> State:
        """Step 0: the target encoder is an exact copy of the context encoder."""
        p = self.layout.pack(whole(*self.model.init()))
        scale = FIRST_SCALE if self.precision == "fp16" else 1.0
        state = State(p, mx.zeros_like(p), mx.zeros_like(p), p[: self.layout.encoder_size] + 0,
                      mx.array([0.0, 0.0, scale, 0.0]))
        mx.eval(state.arrays())
        return state

    def scalars(self, step: int, level_weights: list[float]) -> mx.array:
        """What changes from step to step: lr, weight decay, EMA momentum, the two bias corrections of Adam (Kingma and
        Ba 2014, algorithm 1) and the weights of the levels, which sum to 1."""
        if level_weights != self._level_weights:
            self._level_weights = list(level_weights)
            self._scalars = Ahead(partial(self._row, level_weights=self._level_weights))
        return self._scalars(step)

    def _row(self, step: int, level_weights: list[float]) -> list[float]:
        s, (b1, b2) = self.schedule, self.training.betas
        lr, total = s.lr(step), sum(level_weights)
        corrections = [lr / (1 - b1 ** (step + 1)), (1 - b2 ** (step + 1)) ** -0.5]
        return [lr, s.weight_decay(step), s.momentum(step), *corrections, *(w / total for w in level_weights)]

    def __call__(self, state: State, images: mx.array, key: mx.array, scalars: mx.array) -> tuple[State, mx.array]:
        """One update. images: uint8 (batch, H, W, 3). Returns the new state and the statistics, both unevaluated."""
        parts = self.training.accumulation
        if parts == 1:
            *arrays, statistics = self._whole(*state.arrays(), images, key, scalars)
            return State(*arrays), statistics
        keys, pictures = mx.random.split(key, parts), images.reshape(parts, -1, *images.shape[1:])
        gradient = mx.zeros_like(state.parameters)
        losses = mx.zeros((len(self.model.levels) + 1,))
        for i in range(parts):
            gradient, losses = self._part(state.parameters, state.target, state.guard, gradient, losses, pictures[i],
                                          keys[i], scalars)
            mx.eval(gradient, losses)
        *arrays, statistics = self._update(*state.arrays(), gradient, losses, scalars)
        return State(*arrays), statistics

    def _step(self, p, m, v, t, guard, images, key, scalars):
        self.traces["step"] += 1
        gradient, losses = self._gradient(p, t, guard, images, key, scalars)
        return self._apply(p, m, v, t, guard, gradient, losses, scalars)

    def _accumulate(self, p, t, guard, gradient, losses, images, key, scalars):
        self.traces["part"] += 1
        g, part_losses = self._gradient(p, t, guard, images, key, scalars)
        share = 1 / self.training.accumulation
        return gradient + g * share, losses + part_losses * share

    def _finish(self, p, m, v, t, guard, gradient, losses, scalars):
        self.traces["update"] += 1
        return self._apply(p, m, v, t, guard, gradient, losses, scalars)

    def _gradient(self, p, t, guard, images, key, scalars):
        """The scaled loss's gradient, flat fp32, and (loss, loss of each level)."""
        model, layout = self.model, self.layout
        augment_key, mask_key, drop_key = mx.random.split(key, 3)
        patches = model.prepare(images, augment_key).astype(self.dtype)
        seen, wanted = model.masks(images.shape[0], mask_key)
        target = part(layout.views(t.astype(self.dtype)), "encoder")
        goal = model.at_targets(side_by_side(lambda _, x: model.targets(target, x), patches), wanted)
        weights, scale = scalars[5:], guard[2]

        def loss(leaves):
            def outputs(i, patches, seen, wanted):
                context = model.context(part(leaves, "encoder"), patches, seen, drop_key + i if i else drop_key)
                return [model.predictor(part(leaves, "predictor"), context, seen, wanted), *context]

            guess, *context = side_by_side(outputs, patches, seen, wanted)
            levels = smooth_l1(guess, goal)
            total = (levels * weights).sum()
            share = self.training.sigreg
            driven = total + share * sigreg(context, mx.random.split(drop_key)[1]) if share else total
            return driven * scale, mx.concatenate([total[None], levels])

        (_, losses), gradients = mx.value_and_grad(loss)(layout.views(p.astype(self.dtype)))
        return layout.pack(gradients).astype(mx.float32), losses

    def _apply(self, p, m, v, t, guard, gradient, losses, scalars):
        """Clip, AdamW (Loshchilov and Hutter 2017, algorithm 2), EMA. Where gradient or loss is not finite, only the
        guard moves.

        MLX gives an input's memory to the result of a kernel that has but one: `depends` keeps the updates apart, which
        would be fused into one kernel of several results with new memory for each.
        """
        lr, decay, momentum, rate, spread = mx.split(scalars[:5], 5)
        norm = _norm(gradient) / guard[2]
        good = mx.isfinite(norm) & mx.isfinite(losses[0])
        factor = mx.minimum(1.0, self.training.clip / (norm + 1e-6)) / guard[2]
        b1, b2 = self.training.betas
        m = mx.where(good, b1 * m + (1 - b1) * factor * gradient, m)
        v = mx.where(good, b2 * v + (1 - b2) * factor * factor * (gradient * gradient), v)
        m, v = mx.depends([m, v], [norm])
        new = p * (1 - lr * decay * self.decayed) - rate * m / (mx.sqrt(v) * spread + self.training.eps)
        p = mx.where(good, new, p)
        t = mx.where(good, momentum * t + (1 - momentum) * p[: self.layout.encoder_size], t)
        guard = self._guard(guard, good)
        statistics = mx.concatenate([mx.stack([losses[0], norm, guard[1], guard[0], guard[2]]), losses[1:]])
        return p, m, v, t, guard, statistics

    def _guard(self, guard: mx.array, good: mx.array) -> mx.array:
        """Count bad steps; in fp16 halve the loss scale after one and double it after GROWTH_STEPS good ones."""
        row, bad, scale, since = (guard[i] for i in range(4))
        row, bad = mx.where(good, 0.0, row + 1), bad + mx.where(good, 0.0, 1.0)
        if self.precision == "fp16":
            since = mx.where(good, since + 1, 0.0)
            grow = since >= GROWTH_STEPS
            scale = mx.where(good, mx.where(grow, mx.minimum(scale * 2, LARGEST_SCALE), scale), scale / 2)
            since = mx.where(grow, 0.0, since)
        return mx.stack([row, bad, scale, since])

    def health(self, state: State, images: mx.array, key: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """(loss, baseline, cosine of prediction and target), (levels,) each, on at least 256 pictures, no update."""
        return self._health(state.parameters, state.target, images, key)

    def _check(self, p, t, images, key):
        self.traces["health"] += 1
        model, views = self.model, self.layout.views
        augment_key, mask_key = mx.random.split(key, 2)
        patches = model.prepare(images, augment_key).astype(self.dtype)
        seen, wanted = model.masks(images.shape[0], mask_key)
        leaves = views(p.astype(self.dtype))
        targets = model.targets(part(views(t.astype(self.dtype)), "encoder"), patches)
        guess = model.predict(part(leaves, "encoder"), part(leaves, "predictor"), patches, seen, wanted, None)
        goal = model.at_targets(targets, wanted)
        return smooth_l1(guess, goal), baseline(model, targets, wanted), _cosine(guess, goal)


def _norm(flat: mx.array) -> mx.array:
    """The Euclidean norm, summed in two stages: one long fp32 sum loses digits on the CPU back-end."""
    width = next(w for w in (1024, 256, 64, 16, 4, 1) if flat.size % w == 0)
    return mx.sqrt((flat * flat).reshape(-1, width).sum(axis=1).sum())


def _cosine(guess: mx.array, goal: mx.array) -> mx.array:
    a, b = guess.astype(mx.float32), goal.astype(mx.float32)
    lengths = mx.sqrt((a * a).sum(-1) * (b * b).sum(-1)) + 1e-12
    return ((a * b).sum(-1) / lengths).mean(axis=(0, 1))
