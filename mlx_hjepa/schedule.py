"""Learning rate, weight decay and EMA momentum as functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_hjepa.config import Training


@dataclass(frozen=True)
class Schedule:
    """The values that belong to a step, which counts updates from 0 over the whole run.

    lr: linear from lr/warm-up steps to lr over the warm-up, then half a cosine to min_lr at the last step.
    weight decay: a cosine ramp from weight_decay to weight_decay_end (I-JEPA, Assran et al. 2023, section A.1).
    momentum: linear over all steps from ema[0] to ema[1] (the same).
    """

    training: Training
    steps_per_epoch: int

    @property
    def total(self) -> int:
        return self.training.epochs * self.steps_per_epoch

    @property
    def warmup(self) -> int:
        return round(self.training.warmup_epochs * self.steps_per_epoch)

    def lr(self, step: int) -> float:
        t = self.training
        if step < self.warmup:
            return t.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.total - 1 - self.warmup)
        return t.min_lr + (t.lr - t.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def weight_decay(self, step: int) -> float:
        start = self.training.weight_decay
        end = start if self.training.weight_decay_end is None else self.training.weight_decay_end
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * self._done(step)))

    def momentum(self, step: int) -> float:
        start, end = self.training.ema
        return start + (end - start) * self._done(step)

    def _done(self, step: int) -> float:
        return step / max(1, self.total - 1)
