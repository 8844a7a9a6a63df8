"""What a configuration's step costs, counted: FLOPs of a picture and numbers of weights; and what names its rows."""

from __future__ import annotations

from typing import Any, NamedTuple

from mlx_hjepa import backend
from mlx_hjepa.config import Config

Row = dict[str, Any]


class Flops(NamedTuple):
    """Floating-point operations that one picture costs in one step; a multiply-add is 2."""

    context: float
    target: float
    predictor: float
    total: float


def flops_per_picture(config: Config) -> Flops:
    """Forward and backward FLOPs of the matrix products: L F(N,d) + M (3 L F(kc,d) + 3 Lp F(kc+kt,dp)), with
    F(n,d) = (8 + 4 ratio) n d^2 + 4 n^2 d, and the patch embeddings, level embeddings and heads.

    Not counted: augmentation, masks, pooling, norms, softmax and the optimizer, together a few per cent.
    """
    m, p, k = config.model, config.predictor, config.masking
    assert m.dim is not None
    assert m.depth is not None
    kc, kt, draws, tokens = k.context_tokens, k.target_tokens, k.masks_per_image, config.grid**2
    patch = 2 * m.patch * m.patch * 3 * m.dim
    embed = 2 * len({level.depth for level in m.levels}) * m.dim * p.dim
    head = 2 * p.dim * len(m.levels) * m.dim

    def block(n: int, dim: int) -> float:
        return (8 * dim + 4 * round(dim * m.mlp_ratio)) * n * dim + 4 * n * n * dim

    target = m.depth * block(tokens, m.dim) + tokens * patch
    context = draws * (3 * m.depth * block(kc, m.dim) + 2 * kc * patch)  # pixels have no gradient: 2, not 3
    predictor = draws * 3 * (p.depth * block(kc + kt, p.dim) + kc * embed + kt * head)
    return Flops(context, target, predictor, context + target + predictor)


def parameters(config: Config) -> tuple[int, int]:
    """Weights of the encoder and of the predictor, biases and norms left out (1 to 2 %)."""
    m, p = config.model, config.predictor
    assert m.dim is not None
    assert m.depth is not None
    encoder = m.depth * (4 * m.dim + 2 * round(m.dim * m.mlp_ratio)) * m.dim + m.patch**2 * 3 * m.dim
    sources = len({level.depth for level in m.levels})
    return encoder, (p.depth * (4 * p.dim + 2 * round(p.dim * m.mlp_ratio)) + (sources + len(m.levels)) * m.dim) * p.dim


def levels_name(config: Config) -> str:
    """`4,8,12`; a level pooled over 2 x 2 windows is written `12/2`, four masks a picture `4,8,12*4`."""
    masks = config.masking.masks_per_image
    levels = ",".join(f"{v.depth}/{v.pool}" if v.pool > 1 else str(v.depth) for v in config.model.levels)
    return f"{levels}*{masks}" if masks > 1 else levels


def key(config: Config) -> Row:
    """What a measurement belongs to, all but the batch size: the first keys of a row."""
    return {"model": f"{config.model.dim}x{config.model.depth}", "levels": levels_name(config),
            "precision": backend.precision(config.training.precision), "image_size": config.data.image_size,
            "gflop": flops_per_picture(config).total / 1e9}
