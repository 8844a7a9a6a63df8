"""Features of a frozen encoder: exact whatever the blocks, and from the weights that were asked for, or not at all."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY

import mlx_hjepa as hj
from mlx_hjepa import config
from mlx_hjepa.data import Pictures
from mlx_hjepa.data.augment import normalise
from mlx_hjepa.evaluate import features as module
from mlx_hjepa.evaluate.features import FrozenEncoder, load, random_encoder
from mlx_hjepa.model.hjepa import HJEPA
from mlx_hjepa.model.vit import Encoder, patchify
from mlx_hjepa.run import Run, UserError, digest

spec = importlib.util.spec_from_file_location("publish", Path(__file__).parents[1] / "tools" / "publish.py")
publish = importlib.util.module_from_spec(spec)
spec.loader.exec_module(publish)
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
DIM = 32


@pytest.fixture(scope="module")
def settings():
    return config.build({**TINY, "model": {**TINY["model"], "depth": 5, "levels": [1, 3, 5]}})


@pytest.fixture
def run(settings, tmp_path):
    """A run with one checkpoint whose target and context encoder differ; every weight at random, biases too."""
    run = Run.create(settings, tmp_path / "results")
    run.environment_file.write_text(json.dumps({"dataset": {"mean": MEAN, "std": STD}}))
    (run.checkpoints / "step-000000007").mkdir()
    rng, target, model = np.random.default_rng(0), {}, {}
    for name, w in Encoder(settings).init(mx.random.key(0)).items():
        for weights in (target, model):
            weights[f"encoder.{name}"] = mx.array(rng.normal(0, 0.2, w.shape).astype(np.float32))
    replant(run, target, "target.safetensors")
    replant(run, {**model, "predictor.norm.weight": mx.ones(4)}, "model.safetensors")
    run.point("latest", run.checkpoints / "step-000000007")
    return run


def replant(run, weights, name="target.safetensors"):
    """Write weights into the checkpoint as if it had been saved with them."""
    folder = run.checkpoints / "step-000000007"
    mx.save_safetensors(str(folder / name), weights)
    digests = {file.name: digest(file) for file in folder.glob("*.safetensors")}
    (folder / "state.json").write_text(json.dumps({"step": 7, "seconds": 1.0, "digests": digests}))


@pytest.fixture
def images():
    return np.random.default_rng(1).integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)


def by_hand(model, images):
    """Mean over tokens of the LayerNorm-ed output at each depth, block after block in NumPy's own order."""
    x = patchify(normalise(mx.array(images).astype(mx.float32), model.mean, model.std), 4)
    outputs = [np.array(h, np.float64) for h in model.encoder(model.weights, x)]
    normed = [(h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6) for h in outputs]
    return np.stack([h.mean(axis=1) for h in normed], axis=1)


def test_a_feature_is_the_mean_over_tokens_of_the_normed_output(run, images):
    model = load(run.folder)
    found = model.depth_features(images)
    assert (found.dtype, found.shape) == (np.float32, (11, 3, DIM))
    np.testing.assert_allclose(found, by_hand(model, images), atol=2e-5)


def test_the_padding_of_a_short_block_changes_nothing(run, images, monkeypatch):
    model, rows = load(run.folder), np.arange(11)
    whole = model.depth_features(images)
    alone = np.concatenate([model.depth_features(images[i : i + 1]) for i in range(11)])
    monkeypatch.setattr(module, "BATCH", 4)
    blocks, steps = load(run.folder), []
    for found in (alone, blocks.depth_features(images), blocks.extract(Pictures(images, None), rows),
                  blocks.extract(Pictures(images, None), rows, progress=steps.append)):
        np.testing.assert_allclose(found, whole, atol=1e-5)
    assert steps == [4, 4, 3]
    chosen = np.array([9, 2, 2, 5, 0])
    np.testing.assert_allclose(blocks.extract(Pictures(images, None), chosen), whole[chosen], atol=1e-5)


def test_two_cores_encode_half_a_batch_each(run, images, two_cores, monkeypatch):
    sizes, pooled = [], module.pooled_features
    monkeypatch.setattr(module, "pooled_features", lambda outputs: sizes.append(len(outputs[0])) or pooled(outputs))
    found = []
    for cores in ({0, 1}, {0}):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        found.append(load(run.folder).depth_features(images[:4]))
    assert sizes == [2, 2, 4]
    np.testing.assert_allclose(*found, atol=1e-6)


def test_mirror_is_the_flipped_picture(run, images):
    model = load(run.folder)
    flipped = model.depth_features(np.ascontiguousarray(images[:, :, ::-1]))
    np.testing.assert_allclose(model.depth_features(images, mirror=True), flipped, atol=1e-6)
    assert np.abs(flipped - model.depth_features(images)).max() > 1e-2
    found = model.extract(Pictures(images, None), np.arange(11), mirror=True)
    np.testing.assert_allclose(found, flipped, atol=1e-6)


def test_levels_are_chosen_by_name_or_depth(run, images):
    model = load(run.folder, last_four=True)
    assert (model.levels, model.depths) == ([1, 3, 5], [1, 2, 3, 4, 5])
    f = model.depth_features(images)
    for level, places in {"last": [4], "levels": [0, 2, 4], "last4": [1, 2, 3, 4], 3: [2], "4": [3]}.items():
        np.testing.assert_array_equal(model.select(f, level), np.concatenate([f[:, p] for p in places], axis=1))
    np.testing.assert_allclose(model.features(images), model.select(f, "levels"), atol=1e-6)
    assert model.features(images[:0]).shape == (0, model.features(images).shape[1])
    np.testing.assert_allclose(load(run.folder).features(images), model.features(images), atol=1e-6)
    for level in (0, 6, "6", "best", "-1"):
        with pytest.raises(ValueError, match="level must be"):
            model.select(f, level)
    with pytest.raises(ValueError, match=r"a depth of \[1, 3, 5\], not 4"):
        load(run.folder).features(images, 4)


@pytest.mark.parametrize("change", [
    lambda x: x.astype(np.float32), lambda x: x[0], lambda x: x[..., :1], lambda x: x.transpose(0, 3, 1, 2)])
def test_pictures_are_checked(run, images, change):
    with pytest.raises(ValueError, match="images must be uint8"):
        load(run.folder).features(change(images))


def test_pictures_of_another_size_are_resized(run):
    """A picture of one colour per half keeps its features at twice the size, but for the seam."""
    small = np.full((1, 16, 16, 3), 200, np.uint8)
    model = load(run.folder)
    np.testing.assert_allclose(model.features(small.repeat(2, 1).repeat(2, 2)), model.features(small), atol=1e-5)


def test_target_and_context_are_their_own_weights(run, images):
    target, context = load(run.folder), load(run.folder, "context")
    assert target.digest != context.digest
    assert target.digest == load(run.folder).digest
    assert np.abs(target.features(images) - context.features(images)).max() > 0.1
    with pytest.raises(UserError, match="no best checkpoint"):
        load(run.folder, checkpoint="best")


def test_a_published_folder_has_the_features_of_its_run(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "SHARD_BYTES", 20_000)
    folder = tmp_path / "published"
    folder.mkdir()
    for file in (run.config_file, run.environment_file):
        shutil.copy(file, folder)
    publish.write_shards(run.checkpoint() / "target.safetensors", folder / "weights")
    shards = list((folder / "weights").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(w.dtype == mx.bfloat16 for s in shards for w in mx.load(str(s)).values())
    published, own = hj.load(str(folder)), load(run.folder)
    halves = {n: w.astype(mx.bfloat16).astype(mx.float32) for n, w in own.weights.items()}
    exact = FrozenEncoder(own.config, halves, MEAN, STD)
    np.testing.assert_allclose(published.features(images), exact.features(images), atol=1e-6)
    np.testing.assert_allclose(published.features(images), own.features(images), atol=0.05)
    with pytest.raises(UserError, match="only the target encoder was published"):
        load(folder, "context")
    with pytest.raises(UserError, match="published without checkpoints; leave out --checkpoint"):
        load(folder, checkpoint="best")
    shards[0].unlink()
    with pytest.raises(UserError, match=r"safetensors: missing. Fetch the published folder again"):
        load(folder)
    (folder / "weights" / "digests.json").unlink()  # as older publications
    with pytest.raises(UserError, match="do not fit"):
        load(folder)


def test_the_random_encoder_is_that_of_step_0(run, settings):
    expected = HJEPA(settings, MEAN, STD).init()[0]
    found = random_encoder(run).weights
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[n], expected[n]).item() for n in expected)


def test_the_random_encoder_has_the_runs_own_seed(run, settings, tmp_path):
    other = settings.model_copy(update={"seed": 3})
    seeded = Run.create(other, tmp_path / "seeded")
    shutil.copy(run.environment_file, seeded.environment_file)
    found, expected = random_encoder(seeded).weights, HJEPA(other, MEAN, STD).init()[0]
    assert all(mx.array_equal(found[n], expected[n]).item() for n in expected)
    first = random_encoder(run).weights
    drawn = {n for n, w in first.items() if w.ndim == 2}
    assert drawn
    assert not any(mx.array_equal(found[n], first[n]).item() for n in drawn)


# ---------------------------------------------------------------- what must not load


def mistake(run, match, **options):
    with pytest.raises(UserError, match=match) as caught:
        load(run.folder, **options)
    assert len(str(caught.value).splitlines()) <= 2


def test_weights_of_another_model_are_refused(run):
    weights = dict(mx.load(str(run.checkpoint() / "target.safetensors")))
    name = "encoder.blocks.0.attn.qkv.weight"
    assert name in weights
    replant(run, {n: w for n, w in weights.items() if n != name})
    mistake(run, "weights do not fit its config.yaml.*first of 1 that differ: blocks.0.attn.qkv.weight")
    replant(run, {**weights, "encoder.extra": mx.ones(3)})
    mistake(run, "first of 1 that differ: extra")
    replant(run, {**weights, name: weights[name].T})
    mistake(run, "written by other code.*blocks.0.attn.qkv.weight")
    replant(run, {n.removeprefix("encoder."): w for n, w in weights.items()})
    assert load(run.folder)  # published shards of a bare encoder


def test_a_damaged_or_missing_file_is_named(run):
    file = run.checkpoint() / "target.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    mistake(run, r"target\.safetensors: damaged. Use another checkpoint")
    file.unlink()
    mistake(run, r"target\.safetensors: missing")
    (file.parent / "state.json").unlink()
    mistake(run, "not a checkpoint")
    (run.checkpoints / "latest").unlink()
    mistake(run, "no latest checkpoint yet")
    shutil.rmtree(run.checkpoints)
    mistake(run, "its weights are not here")


def test_a_truncated_file_without_a_digest_is_still_told(run, tmp_path):
    """The shards of an older published folder have no digests beside them."""
    publish.write_shards(run.checkpoint() / "target.safetensors", run.folder / "weights")
    (run.folder / "weights" / "digests.json").unlink()
    file = next((run.folder / "weights").iterdir())
    file.write_bytes(file.read_bytes()[:1000])
    mistake(run, r"target-01-of-01\.safetensors: cannot be read")


@pytest.mark.parametrize("content", ["{}", '{"dataset": "cifar10"}', '{"dataset": {"mean": [0, 0, 0]}}', "[]", "cut"])
def test_an_environment_of_other_code(run, content):
    run.environment_file.write_text(content)
    mistake(run, r"environment\.json: (without the data's mean and std, so written by other code|damaged)")
    with pytest.raises(UserError):
        random_encoder(run)
