"""H-JEPA, a hierarchical joint-embedding predictive architecture, trained and evaluated with MLX.

    import mlx_hjepa as hj
    model = hj.load("results/vit_small_100ep")       # newest checkpoint, target encoder
    z = model.features(images)                       # uint8 (B, H, W, 3) -> float32 (B, D)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from . import backend

backend.prepare()  # before MLX is imported: it decides which BLAS the CPU back-end gets

if TYPE_CHECKING:
    from mlx_hjepa.evaluate.features import FrozenEncoder

__version__ = "0.1.0"


def load(path: str, encoder: Literal["target", "context"] = "target", checkpoint: str = "latest") -> FrozenEncoder:
    """The encoder of a run's folder, or of a published one under docs/results; see evaluate.features.load."""
    from mlx_hjepa.evaluate.features import load as read

    return read(path, encoder, checkpoint)
