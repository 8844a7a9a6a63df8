"""Augmentation against Pillow and by hand."""

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_hjepa.config import Augment
from mlx_hjepa.data.augment import augment, interpolation, jitter, normalise, resample, resize

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)


def settings(**changes):
    return Augment(**{"crop": "none", "flip": False, **changes})


@pytest.mark.parametrize("size", [12, 24, 30, 6, 5])
def test_resize_is_pillows_bilinear(size):
    got = np.array(resize(mx.array(PICTURES), size))
    for picture, mine in zip(PICTURES, got, strict=True):
        theirs = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR), np.float32)
        assert np.abs(mine - theirs).max() <= 1.01, "Pillow rounds to whole grey levels"


def test_a_crop_is_pillows_resize_of_the_box():
    start, extent = mx.array([[2.0]]), mx.array([[7.0]])
    weights = interpolation(start, extent, 14, 12)
    got = np.array(resample(mx.array(PICTURES[:1].astype(np.float32)), weights, weights))[0]
    box = Image.fromarray(PICTURES[0]).resize((14, 14), Image.Resampling.BILINEAR, box=(2, 2, 9, 9))
    assert np.abs(got[2:-2, 2:-2] - np.asarray(box, np.float32)[2:-2, 2:-2]).max() <= 1.01


def test_no_crop_and_no_flip_change_nothing():
    got = augment(mx.array(PICTURES), 12, settings(), mx.random.key(0))
    assert (np.array(got) == PICTURES).all()


@pytest.mark.parametrize("crop", ["none", "pad", "random_resized"])
def test_flip_mirrors_about_half_of_the_pictures(crop):
    many = mx.array(np.repeat(PICTURES[:1], 400, axis=0))
    plain = np.array(augment(many, 12, settings(crop=crop, pad=0, scale=(1, 1), aspect=(1, 1), flip=True),
                             mx.random.key(1)))
    mirrored = np.array([np.abs(p - PICTURES[0, :, ::-1]).max() < 1e-3 for p in plain])
    upright = np.array([np.abs(p - PICTURES[0]).max() < 1e-3 for p in plain])
    assert (mirrored ^ upright).all()
    assert 140 < mirrored.sum() < 260


def test_pad_crop_shifts_by_whole_pixels_and_fills_with_black():
    white = mx.array(np.full((300, 12, 12, 3), 255, np.uint8))
    got = np.array(augment(white, 12, settings(crop="pad", pad=3), mx.random.key(2)))
    assert set(np.unique(got.round(3))) == {0, 255}
    rows = (got[:, :, 6, 0] > 0).sum(axis=1)
    columns = (got[:, 6, :, 0] > 0).sum(axis=1)
    assert set(rows) == set(columns) == {9, 10, 11, 12}


def test_random_resized_crop_draws_for_every_picture_afresh_and_stays_in_range():
    many = mx.array(np.repeat(PICTURES[:1], 200, axis=0))
    got = np.array(augment(many, 12, settings(crop="random_resized", scale=(0.3, 1.0)), mx.random.key(3)))
    assert got.min() >= 0
    assert got.max() <= 255.01
    assert len(np.unique(got[:, 5, 5, 0].round(3))) > 150


def test_jitter_is_per_picture_bounded_and_off_at_zero():
    grey = np.full((300, 4, 4, 3), 100, np.float32)
    got = np.array(jitter(mx.array(grey), 1.0, mx.random.key(4)))
    level = got.mean(axis=(1, 2, 3))
    assert 58 < level.min() < 75, "brightness changes by at most 0.4"
    assert 125 < level.max() < 142
    assert np.abs(got - got.mean(axis=(1, 2, 3), keepdims=True)).max() < 1.5, "grey stays grey whatever the hue"
    colours = np.repeat(PICTURES[:1], 300, axis=0)
    shifted = np.array(jitter(mx.array(colours.astype(np.float32)), 1.0, mx.random.key(5)))
    assert np.abs(shifted - colours).mean() > 5
    off = augment(mx.array(colours), 12, settings(jitter=0), mx.random.key(5))
    assert (np.array(off) == colours).all()


def test_the_same_key_draws_the_same_pictures():
    changes = settings(crop="random_resized", flip=True, jitter=0.5)
    first, again, other = (np.array(augment(mx.array(PICTURES), 12, changes, mx.random.key(k))) for k in (7, 7, 8))
    assert (first == again).all()
    assert np.abs(first - other).mean() > 1


def test_normalise_gives_zero_mean_and_unit_variance():
    x = PICTURES.astype(np.float32)
    mean, std = (tuple(v / 255) for v in (x.mean(axis=(0, 1, 2)), x.std(axis=(0, 1, 2))))
    got = np.array(normalise(mx.array(x), mean, std))
    assert np.abs(got.mean(axis=(0, 1, 2))).max() < 1e-4
    assert np.abs(got.std(axis=(0, 1, 2)) - 1).max() < 1e-4
