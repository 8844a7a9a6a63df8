"""Fine-tuning has a real gradient, chooses on the validation pictures alone, and learns digits."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_hjepa.config import Data, Training
from mlx_hjepa.data import Dataset, Pictures, load_dataset
from mlx_hjepa.evaluate import fine_tune as module
from mlx_hjepa.evaluate.features import FrozenEncoder
from mlx_hjepa.evaluate.fine_tune import Recipe, Tuning, fine_tune, mixing, smoothed_cross_entropy
from mlx_hjepa.evaluate.subject import splits
from mlx_hjepa.model.vit import Encoder, positions
from mlx_hjepa.run import UserError
from mlx_hjepa.schedule import Schedule


@pytest.fixture(scope="module")
def digits():
    return load_dataset(Data(dataset="digits", image_size=16))


@pytest.fixture
def encoder(tiny_config, digits):
    config = tiny_config(augment={"flip": False})
    return FrozenEncoder(config, Encoder(config).init(mx.random.key(7)), digits.mean, digits.std)


@pytest.fixture
def tunings(monkeypatch):
    """The Tuning of each fine_tune call, in order."""
    made = []

    class Recorded(Tuning):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(module, "Tuning", Recorded)
    return made


def tuning(encoder, layer_decay=1.0, scratch=False, mix=False, clip=None, **training):
    values = {"epochs": 1, "batch": 16, "lr": 1e-3, "warmup_epochs": 0, "weight_decay": 0, "betas": (0.9, 0.999),
              "precision": "fp32", **training}
    recipe = Recipe(1, values["lr"], layer_decay, mix, clip)
    return Tuning(encoder, 10, Schedule(Training(**values), 4), recipe, scratch, 0, False)


def moved(tuning, digits, steps=1):
    """What `steps` updates add to each weight."""
    before = {name: np.array(w) for name, w in tuning.weights().items()}
    for step in range(steps):
        part = slice(16 * step, 16 * step + 16)
        tuning.update(mx.array(digits.train.images[part]), mx.array(digits.train.labels[part]))
    return {name: np.array(w) - before[name] for name, w in tuning.weights().items()}


def test_the_gradient_reaches_every_weight(encoder, digits):
    change = moved(tuning(encoder), digits)
    assert set(change) == {*encoder.weights, "head.weight", "head.bias"}
    for name, difference in change.items():
        share = np.mean(difference != 0)
        assert share > (0.3 if "qkv.bias" in name else 0.9), name  # a key's bias has no gradient: softmax cancels it


def test_the_step_goes_down_the_loss_of_its_batch(encoder, digits, monkeypatch):
    monkeypatch.setattr(module, "DROP_PATH", 0.0)
    learning, images, labels = tuning(encoder), mx.array(digits.train.images[:16]), mx.array(digits.train.labels[:16])
    monkeypatch.setattr(learning, "augment", learning.augment.model_copy(update={"crop": "none", "jitter": 0.0}))
    scores = mx.array(learning.scores(digits.train, np.arange(16)))
    expected = smoothed_cross_entropy(scores, labels[None], mx.ones((1, 16))).item()
    losses = [learning.update(images, labels).item() for _ in range(4)]
    assert losses[0] == pytest.approx(expected, rel=1e-5)  # what is trained is what is scored
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.01


def test_layer_wise_decay_scales_the_update_of_early_blocks(encoder, digits):
    whole, scaled = moved(tuning(encoder), digits), moved(tuning(encoder, layer_decay=0.5), digits)
    below = {"head.weight": 0, "head.bias": 0, "patch_embed.proj.weight": 3, "patch_embed.proj.bias": 3}
    for name in whole:
        layers = below[name] if name in below else 2 - int(name.split(".")[1])
        np.testing.assert_allclose(scaled[name], whole[name] * 0.5**layers, rtol=1e-2, atol=2e-7, err_msg=name)


def test_weight_decay_is_for_matrices(encoder, digits):
    without, decayed = moved(tuning(encoder), digits), moved(tuning(encoder, weight_decay=0.5), digits)
    start = tuning(encoder).weights()
    for name in without:
        pull = -1e-3 * 0.5 * np.array(start[name]) if start[name].ndim == 2 else 0
        np.testing.assert_allclose(decayed[name] - without[name], pull, atol=1e-6, err_msg=name)


def test_clipping_shortens_a_gradient_over_its_limit_and_no_other(encoder, digits):
    first = {}
    for clip in (None, 1e3, 0.01):
        learning = tuning(encoder, clip=clip)
        moved(learning, digits)
        first[clip] = np.array(learning.moments[0]) / (1 - 0.9)  # the gradient
    np.testing.assert_array_equal(first[1e3], first[None])
    norm = np.linalg.norm(first[None])
    assert norm > 0.1
    np.testing.assert_allclose(first[0.01], first[None] * (0.01 / norm), rtol=1e-4, atol=1e-9)


def test_bf16_computes_in_bf16_and_keeps_fp32_masters(encoder, digits, monkeypatch):
    half, seen, pool = tuning(encoder, precision="bf16"), [], module.pooled_features
    monkeypatch.setattr(module, "pooled_features", lambda outputs: seen.append(outputs[0].dtype) or pool(outputs))
    change, exact = moved(half, digits), moved(tuning(encoder), digits)
    assert seen == [mx.bfloat16, mx.float32]
    assert {half.parameters.dtype, *(m.dtype for m in half.moments)} == {mx.float32}
    assert max(np.abs(c).max() for c in change.values()) < 1.001e-3  # lr; nothing was rounded to bf16
    agree = [np.mean(np.sign(change[n]) == np.sign(exact[n])) for n in change if n.endswith("weight")]
    assert np.mean(agree) > 0.9


def test_scratch_forgets_the_encoder(encoder):
    fresh, kept = tuning(encoder, scratch=True).weights(), tuning(encoder).weights()
    for name, weight in encoder.weights.items():
        np.testing.assert_array_equal(kept[name], weight)
        assert fresh[name].shape == weight.shape
    assert not np.array_equal(fresh["blocks.1.mlp.fc1.weight"], encoder.weights["blocks.1.mlp.fc1.weight"])


def test_smoothed_cross_entropy():
    rng = np.random.default_rng(0)
    logits, share = rng.standard_normal((6, 4)), rng.random(6)
    labels = np.array([[0, 3, 1, 1, 2, 0], [1, 3, 0, 2, 2, 1]])
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    own, other = (log_p[np.arange(6), classes] for classes in labels)
    expected = -np.mean(0.9 * (share * own + (1 - share) * other) + 0.1 * log_p.mean(axis=1))
    arrays = (mx.array(logits.astype(np.float32)), mx.array(labels), mx.array(np.stack([share, 1 - share]), mx.float32))
    assert smoothed_cross_entropy(*arrays).item() == pytest.approx(expected)


def test_mixing_pastes_rectangles_or_blends():
    own = np.array(mixing(2000, 16, mx.random.key(0)))[..., 0]
    blended = np.ptp(own, axis=(1, 2)) == 0
    inside = (own > 0) & (own < 1)
    assert np.mean(inside.any(axis=(1, 2))) == pytest.approx(0.5, abs=0.05)
    assert blended[inside.any(axis=(1, 2))].all()
    assert own[inside.any(axis=(1, 2)), 0, 0].mean() == pytest.approx(0.5, abs=0.03)
    for picture in own[~blended]:  # the pasted part is a whole rectangle
        rows, columns = (picture == 0).any(axis=1), (picture == 0).any(axis=0)
        assert (picture == 0).sum() == rows.sum() * columns.sum()
        assert all(np.ptp(np.flatnonzero(line)) + 1 == line.sum() for line in (rows, columns))
    whole = own[~inside.any(axis=(1, 2))]
    assert 0.25 < np.mean(whole == 0) < 0.5  # half, less what the border cuts off


def test_a_mixed_picture_counts_for_both_its_classes(encoder, digits, monkeypatch):
    monkeypatch.setattr(module, "DROP_PATH", 0.0)
    images, labels, losses = mx.array(digits.train.images[:16]), mx.array(digits.train.labels[:16]), []
    for share in (1.0, 0.0, 0.5):  # nothing, then everything, then half is the picture before it
        monkeypatch.setattr(module, "mixing", lambda batch, size, key, share=share: mx.full((batch, 1, 1, 1), share))
        learning = tuning(encoder, mix=True)
        monkeypatch.setattr(learning, "augment", learning.augment.model_copy(update={"crop": "none", "jitter": 0.0}))
        losses.append(learning.update(images, labels).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[2] - losses[0]) > 1e-3


def shuffled(dataset):
    labels = np.random.default_rng(0).permutation(dataset.train.labels)
    values = {**vars(dataset), "train": Pictures(dataset.train.images, labels)}
    return Dataset(**values)


def test_digits_are_learnt_and_shuffled_labels_are_not(encoder, digits, tunings):
    split, before = splits(digits, 0), {n: np.array(w) for n, w in encoder.weights.items()}
    found = fine_tune(encoder, split, False, epochs=10, lr=6e-3, layer_decay=1.0, precision="fp32")
    assert found["accuracy"] > 0.4
    assert found["interval"][0] < found["accuracy"] < found["interval"][1]
    assert found["accuracy"] < found["top5"] <= 1
    assert (found["trained_on"], found["held_out"]) == (1437 - 143, 143)
    assert tunings[0].traces == 1
    assert tunings[0].step == 10 * (1294 // 40)
    assert found["epoch"] == 1 + int(np.argmax(found["validation"]))
    held = split.train_rows[split.validation]  # the weights kept are those of the chosen epoch
    kept = np.mean(tunings[0].scores(split.train, held).argmax(axis=1) == digits.train.labels[held])
    assert kept == max(found["validation"])
    np.testing.assert_allclose([np.abs(np.array(encoder.weights[n]) - w).max() for n, w in before.items()], 0)
    chance = fine_tune(encoder, splits(shuffled(digits), 0), False, 5, lr=6e-3, layer_decay=1.0, precision="fp32")
    assert chance["accuracy"] == pytest.approx(0.1, abs=0.08)


def test_the_epoch_is_chosen_on_validation_and_the_test_set_seen_once(encoder, digits, tunings, monkeypatch):
    split, trained_on, scored, parameters = splits(digits, 0, 200), [], [], []
    held, stream = split.train_rows[split.validation], Pictures.stream

    def streamed(self, indices, batch, threads):
        trained_on.extend(indices)
        return stream(self, indices, batch, threads)

    def scores(self, pictures, rows):
        """Right on a share of the pictures: 1/2, all, then 1/2 again in later epochs."""
        scored.append(pictures)
        parameters.append(np.array(self.parameters))
        right = np.eye(10)[pictures.labels[rows]]
        return right if len(scored) == 2 else np.where(np.arange(len(rows))[:, None] % 2, right, 1 - right)

    monkeypatch.setattr(Pictures, "stream", streamed)
    monkeypatch.setattr(Tuning, "scores", scores)
    data = encoder.config.data.model_copy(update={"source": "stream"})
    encoder.config = encoder.config.model_copy(update={"data": data})
    found = fine_tune(encoder, split, False, epochs=4, precision="fp32")
    assert found["validation"] == [0.5, 1.0, 0.5, 0.5]
    assert found["epoch"] == 2
    assert [p is digits.test for p in scored] == [False] * 4 + [True]
    np.testing.assert_array_equal(parameters[4], parameters[1])
    assert len(trained_on) == 4 * (180 // 5) * 5
    assert not set(trained_on) & set(held)
    assert set(trained_on) | set(held) == set(split.train_rows)


def test_defaults_and_settings(encoder, digits):
    split = splits(digits, 0, 100)
    tuned, scratch = (fine_tune(encoder, split, True, epochs=1, scratch=s)["settings"] for s in (False, True))
    assert (module.FINE_TUNE.epochs, module.SCRATCH.epochs) == (100, 200)
    assert (tuned["layer_decay"], scratch["layer_decay"]) == (0.75, 1.0)
    assert (tuned["mix"], scratch["mix"]) == (True, False)
    assert (tuned["lr"], scratch["lr"]) == (1e-3, 5e-4)
    assert (tuned["clip"], scratch["clip"]) == (None, 1.0)
    assert tuned["augment"] == scratch["augment"]
    assert tuned["augment"]["flip"]  # as asked, whatever the run did
    other = fine_tune(encoder, split, False, epochs=1, lr=2e-3, layer_decay=0.5)["settings"]
    assert (other["lr"], other["layer_decay"], other["augment"]["flip"]) == (2e-3, 0.5, False)


def test_another_size_makes_other_tokens_and_the_runs_own_the_same(encoder, digits, tunings):
    split = splits(digits, 0, 200)
    same, own, larger = (fine_tune(encoder, split, False, epochs=1, precision="fp32", size=s) for s in (None, 16, 24))
    assert [f["settings"]["size"] for f in (same, own, larger)] == [None, None, 24]
    assert same["loss"] == own["loss"] != larger["loss"]
    dim = encoder.dim
    for made, table in zip(tunings, (positions(4, dim), positions(4, dim), positions(6, dim, 4)), strict=True):
        np.testing.assert_array_equal(made.encoder.positions, table)
    trained, seen = tunings[2], digits.test.read(np.arange(5))
    patches = trained._frozen.patches(mx.array(seen))
    assert patches.shape == (5, 36, 48)
    scores = trained.scores(digits.test, np.arange(5))  # scored as it was trained: at 24 pixels, in the finer grid
    weights = trained.weights()
    feature = module.pooled_features(trained.encoder(weights, patches)[-1:])[:, 0]
    np.testing.assert_allclose(scores, np.array(feature @ weights["head.weight"] + weights["head.bias"]), atol=1e-4)


def test_mistakes_are_named(encoder, digits):
    wrong = Dataset(**{**vars(digits), "classes": digits.classes[:5]})
    with pytest.raises(UserError, match="labels from 0 to 9; the data set has 5 classes"):
        fine_tune(encoder, splits(wrong, 0), False, epochs=1)
    with pytest.raises(UserError, match="too few to hold some out"):
        fine_tune(encoder, splits(digits, 0, 8), False, epochs=1)
    broken = FrozenEncoder(encoder.config, {n: w * np.nan for n, w in encoder.weights.items()}, digits.mean, digits.std)
    with pytest.raises(UserError, match="the loss of epoch 1 is not finite"):
        fine_tune(broken, splits(digits, 0, 100), False, epochs=2, precision="fp32")


def test_resident_pictures_are_the_streamed_ones(digits):
    rows = np.arange(0, 400, 3)
    streamed, resident = (list(module._batches(digits.train, rows, 5, 2, 16, Data(dataset="digits", source=source)))
                          for source in ("stream", "resident"))
    assert len(streamed) == len(resident) == len(rows) // 16
    for one, other in zip(streamed, resident, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(streamed[0][1], streamed[1][1])
