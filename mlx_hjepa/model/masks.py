"""Masks: which tokens the context encoder sees and which the predictor predicts.

Drawn on the accelerator for every picture afresh, with fixed counts, so that every step has one shape. Rectangles are
drawn in order, each with a scale and an aspect of its own, anywhere on the grid, last row and column included.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_hjepa.config import Masking

TABLE = 4096


def rectangle_table(grid: int, masking: Masking) -> np.ndarray:
    """TABLE sizes (height, width) in cells, int32: scale and aspect uniform in their ranges, rounded, at most the grid.

    Made once on the host with a fixed seed, so that sizes are the same on every back-end.
    """
    rng = np.random.Generator(np.random.Philox(key=[TABLE, grid]))
    area = rng.uniform(*masking.scale, TABLE) * grid * grid
    aspect = rng.uniform(*masking.aspect, TABLE)
    height = np.clip(np.round(np.sqrt(area / aspect)), 1, grid)
    width = np.clip(np.round(np.sqrt(area * aspect)), 1, grid)
    return np.stack([height, width], axis=1).astype(np.int32)


def reading_orders(grid: int) -> np.ndarray:
    """The 8 reading orders (flips, transpose) of the grid: (8, N) int32, the place of each cell in that order."""
    cells = np.arange(grid * grid).reshape(grid, grid)
    orders = [flip for table in (cells, cells.T) for flip in (table, table[::-1], table[:, ::-1], table[::-1, ::-1])]
    return np.stack(orders).reshape(8, -1).astype(np.int32)


class MaskSampler:
    """Draws context and target indices by the rules of `config.Masking`."""

    def __init__(self, grid: int, masking: Masking):
        self.grid, self.masking = grid, masking
        self.sizes = rectangle_table(grid, masking)
        self.orders = reading_orders(grid)

    def __call__(self, pictures: int, key: mx.array) -> tuple[mx.array, mx.array]:
        """(context, target) for masks_per_image draws a picture, rows of one picture together:

        int32 (pictures * masks_per_image, context_tokens) and (..., target_tokens), disjoint within a row.
        """
        m, n = self.masking, self.grid * self.grid
        rows = pictures * m.masks_per_image
        draws = mx.random.uniform(shape=(rows, 3 * m.target_blocks + n + 1), key=key)
        boxes, noise, turn = mx.split(draws, [3 * m.target_blocks, 3 * m.target_blocks + n], axis=1)
        distance = self._distance(boxes.reshape(rows, 3, m.target_blocks, 1))
        pick = self._random if m.select == "random" else self._blocks
        return pick(distance, noise, turn)

    def _distance(self, boxes: mx.array) -> mx.array:
        """Chebyshev distance of each cell to each rectangle, (rows, blocks, N), 0 inside it; boxes: uniform numbers."""
        grid = self.grid
        which, y, x = (part.squeeze(1) for part in mx.split(boxes, 3, axis=1))
        height, width = mx.split(mx.array(self.sizes)[(which.squeeze(-1) * TABLE).astype(mx.int32)], 2, axis=-1)
        top, left = self._start(y, height), self._start(x, width)
        row, column = (mx.array(c.reshape(1, 1, -1).astype(np.int32)) for c in np.divmod(np.arange(grid * grid), grid))
        down = mx.maximum(top - row, row - (top + height - 1))
        across = mx.maximum(left - column, column - (left + width - 1))
        return mx.maximum(mx.maximum(down, across), 0)

    def _start(self, draw: mx.array, extent: mx.array) -> mx.array:
        """The first row (column) of rectangles, uniform over all places; up to `overhang` cells, but never all of a
        rectangle, may lie over the border. From overhang = extent - 1 on, every cell is as likely as any other."""
        over = mx.minimum(self.masking.overhang, extent - 1)
        return mx.floor(draw * (self.grid - extent + 1 + 2 * over)).astype(mx.int32) - over

    def _random(self, distance: mx.array, noise: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        """One order: the union's cells at random, then the others at random. Targets are its head, context its tail."""
        m = self.masking
        order = mx.argsort(mx.where(distance.min(axis=1) == 0, noise, noise + 1), axis=1).astype(mx.int32)
        n = order.shape[1]
        target, _, context = mx.split(order, [m.target_tokens, n - m.context_tokens], axis=1)
        return context, target

    def _blocks(self, distance: mx.array, noise: mx.array, turn: mx.array) -> tuple[mx.array, mx.array]:
        """Whole rectangles in the order drawn, the last one needed cut in a reading order; beyond them ring by ring."""
        m, n = self.masking, self.grid * self.grid
        number = mx.arange(m.target_blocks, dtype=mx.int32).reshape(1, -1, 1)
        first = mx.where(distance == 0, number, m.target_blocks - 1 + distance).min(axis=1)
        reading = mx.array(self.orders)[(turn.squeeze(1) * 8).astype(mx.int32)]
        rank = first * n + reading
        target = mx.argsort(rank, axis=1)[:, : m.target_tokens].astype(mx.int32)
        last = mx.take_along_axis(rank, target[:, -1:], axis=1)
        context = mx.argsort(mx.where(rank <= last, 2.0, noise), axis=1)[:, : m.context_tokens].astype(mx.int32)
        return context, target
