"""The predictor: a narrow transformer from the context encoder's levels to the target tokens of every level."""

from __future__ import annotations

import mlx.core as mx

from mlx_hjepa.config import Config
from mlx_hjepa.model.vit import EPS, Weights, block, block_weights, linear_weights, norm_weights, positions


class Predictor:
    """The shape of a predictor; its weights come with each call."""

    def __init__(self, config: Config):
        p, m = config.predictor, config.model
        assert m.dim is not None
        self.dim, self.depth, self.heads = p.dim, p.depth, p.dim // p.head_dim
        self.hidden = round(p.dim * m.mlp_ratio)
        self.encoder_dim, self.levels = m.dim, len(m.levels)
        self.sources = len({level.depth for level in m.levels})
        self.positions = positions(config.grid, self.dim)

    def init(self, key: mx.array) -> Weights:
        """Fresh fp32 weights."""
        keys = mx.random.split(key, self.depth + self.sources + 2)
        w: Weights = {}
        for i in range(self.sources):
            w |= linear_weights(keys[self.depth + i], self.encoder_dim, self.dim, f"embed.{i}")
            if i:  # the Linears are summed: one bias is all of theirs
                del w[f"embed.{i}.bias"]
        w["mask_token"] = mx.random.truncated_normal(-2.0, 2.0, (self.dim,), key=keys[-1]) * 0.02
        for i in range(self.depth):
            w |= block_weights(keys[i], self.dim, self.hidden, i + 1, f"blocks.{i}")
        w |= norm_weights(self.dim, "norm")
        w |= linear_weights(keys[-2], self.dim, self.levels * self.encoder_dim, "heads")
        return w

    def __call__(self, w: Weights, context: list[mx.array], seen: mx.array, wanted: mx.array) -> mx.array:
        """context: the encoder's LayerNorm-ed outputs, each (B, kc, D); seen (B, kc), wanted (B, kt): places.

        Returns the predictions, (B, kt, levels, D).
        """
        b, kc, kt = *seen.shape, wanted.shape[1]
        place = mx.array(self.positions).astype(w["mask_token"].dtype)
        rows = [h.reshape(b * kc, -1) for h in context]  # a 3-D sum would make addmm a batched product
        x = mx.addmm(w["embed.0.bias"], rows[0], w["embed.0.weight"])
        for i in range(1, self.sources):
            x = mx.addmm(x, rows[i], w[f"embed.{i}.weight"])
        x = mx.concatenate([x.reshape(b, kc, -1) + place[seen], w["mask_token"] + place[wanted]], axis=1)
        for i in range(self.depth):
            x = block(w, f"blocks.{i}", x, self.heads, fused=False)
        x = mx.split(x, [kc], axis=1)[1]  # not a slice: split's gradient is one concatenation, a slice's is a scatter
        x = mx.fast.layer_norm(x, w["norm.weight"], w["norm.bias"], EPS)
        x = mx.addmm(w["heads.bias"], x, w["heads.weight"])
        return x.reshape(b, kt, self.levels, self.encoder_dim)
