"""Is the run learning or collapsing? Feature statistics of held-out pictures, and the collapse alarm."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mlx_hjepa import metrics

ADVICE = ("In a new run lower training.lr by 3x, raise training.ema's start (0.996 or more), keep training.clip at 1. "
          "The checkpoint with the best online k-NN is kept: --checkpoint best")
SMALLEST_BASELINE, SMALLEST_STD = 1e-3, 1e-3


def statistics(features: np.ndarray) -> dict[str, list[float]]:
    """features (n, depths, D) -> the normalised std, RankMe and effective rank of each depth."""
    each = [features[:, i] for i in range(features.shape[1])]
    return {
        "std": [metrics.normalised_std(f) for f in each],
        "rankme": [metrics.rankme(f) for f in each],
        "effective_rank": [metrics.effective_rank(f) for f in each],
    }


@dataclass
class Alarm:
    """The collapse alarm: two checks running on which the deepest features fell under half of this run's own value at
    step 0, in normalised std or in effective rank, or that std under 1e-3, or a level's baseline under 1e-3."""

    reference: dict[str, float] = field(default_factory=dict)
    strikes: int = 0

    def check(self, health: dict[str, Any]) -> str | None:
        """The reason when the alarm goes, else None. The first call, at step 0, sets the reference."""
        now = {name: health[name][-1] for name in ("std", "effective_rank")}
        if not self.reference:
            self.reference = now
        reasons = [f"{name.replace('_', ' ')} {value:.3g}, at step 0 {self.reference[name]:.3g}"
                   for name, value in now.items() if value < 0.5 * self.reference[name]]
        if now["std"] < SMALLEST_STD:
            reasons.append(f"std {now['std']:.2g}")
        if min(health["baseline"]) < SMALLEST_BASELINE:
            reasons.append(f"baseline {min(health['baseline']):.2g}: a constant predicts the targets")
        self.strikes = self.strikes + 1 if reasons else 0
        return "; ".join(reasons) if self.strikes >= 2 else None

    def dump(self) -> dict[str, Any]:
        return asdict(self)
