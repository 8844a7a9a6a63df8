"""The order, the split, and that both sources give the same batches."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_hjepa import backend, config
from mlx_hjepa.data import Pictures, batches, dataset, indices, load_dataset, order, steps_per_epoch, validation_split
from mlx_hjepa.run import UserError


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    return Pictures(rng.integers(0, 256, (50, 4, 4, 3), dtype=np.uint8), np.arange(50, dtype=np.int32))


def collect(pictures, source, start, stop, seed=1, batch=8, threads=3):
    return [np.array(images) for images in batches(pictures, source, seed, batch, start, stop, threads)]


def test_order_is_a_permutation_fixed_by_seed_and_epoch():
    assert sorted(order(0, 0, 100)) == list(range(100))
    assert order(5, 3, 8).tolist() == [5, 7, 6, 1, 4, 2, 0, 3]  # for every NumPy and every machine
    assert (order(0, 1, 100) != order(0, 0, 100)).any()
    assert (order(1, 0, 100) != order(0, 0, 100)).any()
    assert (order(1, 0, 100) != order(0, 1, 100)).any()


def test_indices_walk_through_the_epochs():
    assert steps_per_epoch(50, 8) == 6
    epoch = np.concatenate([indices(7, step, 50, 8) for step in range(6, 12)])
    assert (epoch == order(7, 1, 50)[:48]).all()
    with pytest.raises(UserError, match=r"training.batch 51 .* 50 training pictures"):
        indices(0, 0, 50, 51)


def test_both_sources_give_the_pictures_of_the_indices(pictures):
    streamed, resident = collect(pictures, "stream", 0, 20), collect(pictures, "resident", 0, 20)
    assert len(streamed) == len(resident) == 20
    for step, (a, b) in enumerate(zip(streamed, resident, strict=True)):
        assert a.dtype == b.dtype == np.uint8
        assert (a == pictures.images[indices(1, step, 50, 8)]).all()
        assert (a == b).all()


@pytest.mark.parametrize("source", ["stream", "resident"])
def test_resumes_in_the_middle_of_an_epoch(pictures, source):
    whole = collect(pictures, source, 0, 15)
    for start in (4, 6, 11):
        assert all((a == b).all() for a, b in zip(whole[start:], collect(pictures, source, start, 15), strict=True))


def test_stream_is_the_same_in_parts_with_any_threads_and_without_mlx_data(pictures, monkeypatch):
    expected = collect(pictures, "stream", 0, 15)
    assert all((a == b).all() for a, b in zip(expected, collect(pictures, "stream", 0, 15, threads=1), strict=True))
    monkeypatch.setattr("mlx_hjepa.data.source.STREAMED", 20)
    assert all((a == b).all() for a, b in zip(expected, collect(pictures, "stream", 0, 15), strict=True))
    monkeypatch.setattr(dataset, "dx", None)
    assert all((a == b).all() for a, b in zip(expected, collect(pictures, "stream", 0, 15), strict=True))


def test_missing_mlx_data_is_said_once(monkeypatch):
    monkeypatch.setattr(dataset, "dx", None)
    said = []
    load_dataset(config.Data(dataset="digits", source="stream"), say=said.append)
    load_dataset(config.Data(dataset="digits", source="resident"), say=said.append)
    assert sum("mlx-data" in line for line in said) == 1


@pytest.mark.parametrize("source", ["stream", "resident"])
def test_a_stream_left_early_ends(pictures, source, monkeypatch):
    for without in (False, True):
        if without:
            monkeypatch.setattr(dataset, "dx", None)
        stream = batches(pictures, source, 0, 8, 0, 10_000, 2)
        assert next(stream).shape == (8, 4, 4, 3)
        stream.close()


def test_batch_larger_than_the_data_is_refused_at_once(pictures):
    with pytest.raises(UserError, match="lower training"):
        batches(pictures, "stream", 0, 64, 0, 1, 1)


def test_read_refuses_what_is_not_there(pictures):
    assert pictures.read(np.array([49, 0, 49])).shape == (3, 4, 4, 3)
    assert pictures.read(np.array([], int)).shape == (0, 4, 4, 3)
    for wrong in (-1, 50):
        with pytest.raises(IndexError):
            pictures.read(np.array([0, wrong]))


def test_resident_that_does_not_fit_is_refused(pictures, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 40)
    with pytest.raises(UserError, match="source: stream"):
        batches(pictures, "resident", 0, 8, 0, 1, 1).__next__()


@pytest.mark.parametrize(("n", "held", "banked"), [(50_000, 5_000, 10_000), (10**5, 5_000, 10_000),
                                                   (1_437, 143, 1_294)])
def test_bank_and_validation_are_disjoint_and_fixed(n, held, banked):
    bank, validation = validation_split(n, 0)
    assert (len(validation), len(bank)) == (held, banked)
    both = np.concatenate([bank, validation])
    assert len(np.unique(both)) == len(both)
    assert both.min() >= 0
    assert both.max() < n
    assert (np.diff(bank) > 0).all()
    assert (np.diff(validation) > 0).all()
    assert (validation_split(n, 0)[1] == validation).all()
    assert (validation_split(n, 1)[1] != validation).any()


def test_digits(tmp_path):
    digits = load_dataset(config.Data(dataset="digits"), tmp_path)
    assert (digits.name, len(digits.train), len(digits.test), digits.train.shape) == ("digits", 1_437, 360, (8, 8, 3))
    images = np.concatenate([digits.train.images, digits.test.images])
    assert (images.min(), images.max()) == (0, 255)
    assert (images[..., :1] == images).all()
    assert len(np.unique(digits.test.labels)) == len(digits.classes) == 10
    assert digits.fingerprint == "f3f8f1d2ce95e217611b4d455cd8f0e614a2b2418090573e348d9ae7fc8b96f1"
    np.testing.assert_allclose(digits.std, (digits.train.images / 255).std((0, 1, 2)), rtol=1e-12)
    assert next(batches(digits.train, "resident", 0, 64, 0, 1, 1)).dtype == mx.uint8


def test_streaming_leaves_the_blas_alone(pictures):
    """mlx-data's own prefetch sets OpenBLAS to one thread for good, and products round differently from there on."""
    before = backend.blas()
    for _ in range(20):
        list(batches(pictures, "stream", 0, 4, 0, 8, 4))
    assert backend.blas() == before
