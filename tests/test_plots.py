import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import TINY
from PIL import Image

from mlx_hjepa.cli import main
from mlx_hjepa.config import build
from mlx_hjepa.evaluate.features import load
from mlx_hjepa.model.vit import layer_norm, patchify
from mlx_hjepa.plots.model import attention_of, draw, nearest, only, unpatchify
from mlx_hjepa.run import Run
from mlx_hjepa.train import trainer

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = build({**TINY, "training": {**TINY["training"], "epochs": 1},
                    "masking": {**TINY["masking"], "masks_per_image": 2}})
    run = Run.create(config, tmp_path_factory.mktemp("plots"))
    assert trainer.train(config, run)
    return run


def test_what_is_not_shown_is_grey_and_the_rest_is_the_picture():
    shown = only(IMAGES.astype(np.float32), np.array([[0, 5], [15, 3], [7, 7]]), 4)
    assert (shown[0, :4, :4] == IMAGES[0, :4, :4]).all()
    assert (shown[0, 4:8, 4:8] == IMAGES[0, 4:8, 4:8]).all()
    assert (shown[1, 12:, 12:] == IMAGES[1, 12:, 12:]).all()
    assert [(s == 128).all(-1).sum() for s in shown] == pytest.approx([16 * 14, 16 * 14, 16 * 15], abs=2)


def test_patches_are_put_together_again():
    assert (unpatchify(np.array(patchify(mx.array(IMAGES), 4)), 4) == IMAGES).all()


def test_the_nearest_is_found_whatever_all_targets_have_in_common():
    rows = np.array([[1, 0, 0], [3, 0.6, 0], [-1, 0, 0], [-3, -0.6, 0]], np.float32)
    common = np.array([0, 0, 100], np.float32)
    assert (nearest(3 * rows[[0, 2]] + common, rows + common) == [0, 2]).all()  # plain cosines would say 1 and 3


def test_the_attention_shown_is_the_encoders(run):
    frozen = load(run.folder)
    probabilities = attention_of(frozen, IMAGES)
    assert probabilities.shape == (3, 2, 16, 16)
    assert probabilities.sum(axis=-1) == pytest.approx(1, abs=1e-5)
    w, p = frozen.weights, f"blocks.{frozen.encoder.depth - 1}"
    before, whole = frozen.encoder(w, frozen.patches(mx.array(IMAGES)), fused=True)
    y = mx.fast.layer_norm(before, w[f"{p}.norm1.weight"], w[f"{p}.norm1.bias"], 1e-6)
    v = (y @ w[f"{p}.attn.qkv.weight"] + w[f"{p}.attn.qkv.bias"])[..., 64:].reshape(3, 16, 2, 16).transpose(0, 2, 1, 3)
    out = (mx.array(probabilities) @ v).transpose(0, 2, 1, 3).reshape(3, 16, 32)
    x = before + out @ w[f"{p}.attn.proj.weight"] + w[f"{p}.attn.proj.bias"]
    y = mx.fast.layer_norm(x, w[f"{p}.norm2.weight"], w[f"{p}.norm2.bias"], 1e-6)
    h = y @ w[f"{p}.mlp.fc1.weight"] + w[f"{p}.mlp.fc1.bias"]
    h = 0.5 * h * (1 + mx.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    x = x + h @ w[f"{p}.mlp.fc2.weight"] + w[f"{p}.mlp.fc2.bias"]
    assert np.array(layer_norm(x)) == pytest.approx(np.array(layer_norm(whole)), abs=1e-4)


def test_every_picture_is_drawn(run):
    files = draw(run, say=lambda text: None)
    assert [file.name for file in files] == ["curves.png", "masks.png", "attention.png", "predictions.png",
                                             "embedding.png"]
    for file in files:
        assert file.parent == run.folder / "plots"
        assert np.array(Image.open(file).convert("L")).std() > 5


def test_the_command_names_what_it_wrote(run, tmp_path):
    result = CliRunner().invoke(main, ["plot", str(run.folder)])
    assert (result.exit_code, str(run.folder / "plots" / "predictions.png") in result.stdout) == (0, True)
    shutil.copytree(run.folder, tmp_path / "bare", ignore=shutil.ignore_patterns("checkpoints", "plots"))
    bare = CliRunner().invoke(main, ["plot", str(tmp_path / "bare")])
    assert (bare.exit_code, [Path(line).name for line in bare.stdout.splitlines()[1:]]) == (0, ["curves.png"])
    missing = CliRunner().invoke(main, ["plot", str(tmp_path / "none")])
    assert (missing.exit_code, "none" in missing.stderr) == (2, True)
