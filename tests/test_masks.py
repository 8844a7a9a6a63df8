"""Masks: counts, disjointness, coverage (invariant 6), and what `blocks` promises."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_hjepa.config import Masking
from mlx_hjepa.model.masks import MaskSampler, reading_orders, rectangle_table

GRID = 8


def sampler(**changes):
    values = {"target_tokens": 28, "context_tokens": 28, "target_blocks": 8, **changes}
    return MaskSampler(GRID, Masking(**values))


def draw(masks, pictures=512, seed=0):
    return (np.array(x) for x in masks(pictures, mx.random.key(seed)))


@pytest.mark.parametrize("changes", [{"select": "random", "target_blocks": 4}, {"select": "blocks"},
                                     {"select": "blocks", "overhang": 1}, {"select": "random", "context_tokens": 36},
                                     {"select": "blocks", "context_tokens": 36, "target_blocks": 1}])
def test_counts_are_fixed_and_context_and_targets_never_meet(changes):
    masks = sampler(**changes)
    context, target = draw(masks)
    assert target.shape == (512, 28)
    assert context.shape == (512, masks.masking.context_tokens)
    together = np.sort(np.concatenate([context, target], axis=1), axis=1)
    assert together.min() >= 0
    assert together.max() < GRID * GRID
    assert (np.diff(together, axis=1) > 0).all(), "a token is seen and predicted, or taken twice"


def test_masks_per_image_gives_that_many_different_rows_a_picture():
    context, target = draw(sampler(masks_per_image=4), pictures=8)
    assert context.shape[0] == target.shape[0] == 32
    assert len({tuple(row) for row in np.sort(target, axis=1)}) > 24


def frequencies(masks, pictures=8000):
    context, target = draw(masks, pictures)
    return [np.bincount(x.ravel(), minlength=GRID * GRID).reshape(GRID, GRID) / pictures for x in (context, target)]


@pytest.mark.parametrize(("changes", "rarest"), [
    ({"select": "random", "target_blocks": 4}, 0.08), ({"select": "blocks"}, 0.08),
    ({"select": "blocks", "overhang": 8, "target_blocks": 12}, 0.4)])
def test_frequencies_equal_their_mirror_images_and_no_cell_is_starved(changes, rarest):
    for grid in frequencies(sampler(**changes)):
        error = np.sqrt(2 * grid * (1 - grid) / 8000)
        for mirror in (grid[::-1], grid[:, ::-1], grid[::-1, ::-1]):
            off = np.abs(grid - mirror) / error
            assert (off < 3).mean() > 0.95, "3 standard errors, which one pair in 370 exceeds by chance"
            assert off.max() < 4.5
        assert grid.min() > rarest, "a cell is hardly ever drawn"


def test_rectangles_reach_the_last_row_and_column():
    target = frequencies(sampler(select="blocks"))[1]
    assert target[-1].min() > 0.08
    assert target[:, -1].min() > 0.08


def test_overhang_covers_the_grid_evenly():
    target = frequencies(sampler(select="blocks", overhang=8, target_blocks=12))[1]
    assert target.max() / target.min() < 1.25
    bare = frequencies(sampler(select="blocks"))[1]
    assert bare.max() / bare.min() > 3


def test_blocks_takes_whole_rectangles_in_the_order_drawn():
    masks = sampler(select="blocks", target_tokens=12)
    distance = np.full((1, 8, GRID, GRID), 5)
    distance[0, 0, 1:4, 2:5] = 0  # nine cells, taken whole
    distance[0, 1, 4:8, 0:4] = 0  # the next, cut after three
    noise = mx.random.uniform(shape=(1, 64), key=mx.random.key(1))
    _, target = masks._blocks(mx.array(distance.reshape(1, 8, 64)), noise, mx.array([[0.0]]))
    chosen = np.zeros(64, bool)
    chosen[np.array(target)[0]] = True
    chosen = chosen.reshape(GRID, GRID)
    assert chosen[1:4, 2:5].all()
    assert chosen[4, 0:3].all(), "reading order 0 takes the second rectangle row by row"
    assert chosen.sum() == 12


def test_blocks_grows_ring_by_ring_when_rectangles_are_used_up():
    masks = sampler(select="blocks", target_tokens=9, target_blocks=1)
    row, column = np.divmod(np.arange(64), 8)
    distance = np.maximum(abs(row - 3), abs(column - 3)).reshape(1, 1, 64)
    noise = mx.zeros((1, 64))
    _, target = masks._blocks(mx.array(distance), noise, mx.array([[0.3]]))
    assert {divmod(int(c), 8) for c in np.array(target)[0]} == {(r, c) for r in (2, 3, 4) for c in (2, 3, 4)}


def test_random_targets_lie_in_the_union_and_context_outside_it_first():
    masks = sampler(select="random", target_tokens=10, context_tokens=30, target_blocks=1)
    inside = np.zeros(64, bool)
    inside[:20] = True
    distance = np.where(inside, 0, 3).reshape(1, 1, 64).repeat(50, axis=0)
    noise = mx.random.uniform(shape=(50, 64), key=mx.random.key(2))
    context, target = (np.array(x) for x in masks._random(mx.array(distance), noise, None))
    assert (target < 20).all()
    assert (context >= 20).all()


def test_the_same_key_draws_the_same_masks():
    first, again, other = (np.concatenate(list(draw(sampler(), 16, seed)), axis=1) for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()


def test_rectangle_table_keeps_scale_and_aspect():
    table = rectangle_table(14, Masking(scale=(0.15, 0.2), aspect=(0.75, 1.5)))
    area = table.prod(axis=1) / 196
    assert 0.12 < area.min() <= area.max() < 0.24
    ratio = table[:, 1] / table[:, 0]
    assert ratio.min() < 0.85
    assert ratio.max() > 1.3


def test_reading_orders_are_eight_different_permutations():
    orders = reading_orders(4)
    assert len({tuple(o) for o in orders}) == 8
    assert (np.sort(orders, axis=1) == np.arange(16)).all()
