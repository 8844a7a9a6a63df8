"""Exported weights give the same features in timm and here; a folder's features are those of its pictures."""

import json

import mlx.core as mx
import numpy as np
import pytest
import yaml
from PIL import Image

import mlx_hjepa.evaluate.export as module
from mlx_hjepa.data.augment import normalise
from mlx_hjepa.evaluate.export import embed, embed_folder, export, load_exported
from mlx_hjepa.evaluate.features import load
from mlx_hjepa.model.vit import Encoder
from mlx_hjepa.run import Run, UserError, digest

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


@pytest.fixture
def run(tiny_config, tmp_path):
    """A run with one checkpoint, of an encoder whose every weight is at random, biases and norms too."""
    config = tiny_config(model={"depth": 3, "levels": [1, 3], "mlp_ratio": 2.7},
                         data={"dataset": "cifar10", "root": "/private/path"})
    run = Run.create(config, tmp_path / "results")
    run.environment_file.write_text(json.dumps({"dataset": {"name": "digits", "mean": MEAN, "std": STD}}))
    rng = np.random.default_rng(0)
    shapes = {name: w.shape for name, w in Encoder(config).init(mx.random.key(0)).items()}
    folder = run.checkpoints / "step-000000070"
    folder.mkdir()
    for file in ("target.safetensors", "model.safetensors"):
        weights = {f"encoder.{n}": mx.array(rng.normal(0, 0.3, s).astype(np.float32)) for n, s in shapes.items()}
        mx.save_safetensors(str(folder / file), weights)
    digests = {file.name: digest(file) for file in folder.glob("*.safetensors")}
    (folder / "state.json").write_text(json.dumps({"step": 70, "digests": digests}))
    run.point("latest", folder)
    return run


@pytest.fixture
def images():
    return np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def pictures(tmp_path):
    """Seven PNG files of different sizes in two folders, one of them without a class, and a broken one."""
    root, rng = tmp_path / "pictures", np.random.default_rng(2)
    (root / "deep" / "deeper").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "deep/c.png", "deep/d.png", "deep/deeper/e.png", "z é.png", "y.png")):
        size = (16 + 4 * i, 16, 3) if i % 2 else (16, 16, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(root / name)
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_HJEPA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("encoder", ["target", "context"])
def test_timm_computes_the_same_features(run, images, tmp_path, encoder):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    from safetensors.torch import load_file
    from timm.models.vision_transformer import VisionTransformer

    out, model = export(run, tmp_path / "out", encoder), load(run.folder, encoder)
    config = json.loads((out / "config.json").read_text())
    plain = VisionTransformer(**config["model_args"]).eval()
    plain.load_state_dict(load_file(out / "model.safetensors"))
    created = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    facts = timm.data.resolve_model_data_config(created)
    transform = timm.data.create_transform(**facts)
    x = torch.stack([transform(Image.fromarray(image)) for image in images])
    np.testing.assert_allclose(x.permute(0, 2, 3, 1), normalise(mx.array(images), MEAN, STD), atol=1e-5)
    assert plain.norm.eps == config["mlx_hjepa"]["norm_eps"] == 1e-6
    with torch.no_grad():
        for vit in (plain, created):
            np.testing.assert_allclose(vit(x), model.features(images, "last"), atol=1e-4)
            h = vit.forward_intermediates(x, indices=[d - 1 for d in model.depths], norm=True, output_fmt="NLC",
                                          intermediates_only=True)
            levels = torch.cat([level.mean(1) for level in h], dim=1)
            np.testing.assert_allclose(levels, model.features(images), atol=1e-4)


def test_layouts_are_timms(run, tmp_path):
    """What the test above shows, as far as it can be without timm: names, shapes, and the convolution's pixels."""
    weights, model = mx.load(str(export(run, tmp_path / "out") / "model.safetensors")), load(run.folder)
    block = {"norm1.weight": (32,), "norm1.bias": (32,), "attn.qkv.weight": (96, 32), "attn.qkv.bias": (96,),
             "attn.proj.weight": (32, 32), "attn.proj.bias": (32,), "norm2.weight": (32,), "norm2.bias": (32,),
             "mlp.fc1.weight": (86, 32), "mlp.fc1.bias": (86,), "mlp.fc2.weight": (32, 86), "mlp.fc2.bias": (32,)}
    expected = {f"blocks.{i}.{name}": shape for i in range(3) for name, shape in block.items()}
    expected |= {"pos_embed": (1, 16, 32), "norm.weight": (32,), "norm.bias": (32,),
                 "patch_embed.proj.weight": (32, 3, 4, 4), "patch_embed.proj.bias": (32,)}
    assert {name: w.shape for name, w in weights.items()} == expected
    np.testing.assert_array_equal(weights["norm.weight"], np.ones(32))
    linear = np.array(model.weights["patch_embed.proj.weight"])
    row, column, colour = 1, 3, 2
    np.testing.assert_array_equal(weights["patch_embed.proj.weight"][:, colour, row, column],
                                  linear[(row * 4 + column) * 3 + colour])
    np.testing.assert_array_equal(weights["pos_embed"][0], model.encoder.positions)


def test_an_export_can_be_loaded_here(run, images, tmp_path):
    out, model = export(run, tmp_path / "new" / "out"), load(run.folder)
    again = load_exported(out)
    np.testing.assert_array_equal(again.features(images), model.features(images))
    assert (again.mean, again.std) == (MEAN, STD)
    text = (out / "config.json").read_text()
    assert "/private" not in text
    assert json.loads(text)["mlx_hjepa"]["weights"] == digest(run.checkpoint() / "target.safetensors")
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        load_exported(out)
    mx.save_safetensors(str(out / "model.safetensors"), {"norm.bias": mx.zeros(3)})
    with pytest.raises(UserError, match=r"not the weights that config\.json describes"):
        load_exported(out)
    (out / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(UserError, match="not written by mlx-hjepa export"):
        load_exported(out)


def report(run, **changes):
    score = {"accuracy": 0.8123, "interval": [0.80, 0.82]}
    values = {"encoder": "target", "weights": digest(run.checkpoint() / "target.safetensors"),
              "dataset": {"name": "digits", "train": 1437, "test": 360},
              "rows": {"raw": {"last": {"knn": score}}, "trained": {"last": {"linear": score}, "levels": {}}}}
    run.evaluation.mkdir()
    (run.evaluation / "report.json").write_text(json.dumps(values | changes))


def card(run, out, **options):
    return (export(run, out, **options) / "README.md").read_text()


def test_the_card_has_the_reports_numbers_and_no_others(run, tmp_path):
    text = card(run, tmp_path / "unscored")
    front = yaml.safe_load(text.split("---")[1])
    assert (front["library_name"], front["pipeline_tag"]) == ("mlx", "image-feature-extraction")
    assert "mlx" in front["tags"]
    assert "Not evaluated yet." in text
    assert "digits" in text
    assert "after 70 steps" in text
    report(run)
    text = card(run, tmp_path / "scored")
    assert "| raw | - | 81.23 % (80.00 to 82.00) | - |" in text
    assert "| trained | last | - | 81.23 % (80.00 to 82.00) |" in text
    assert "1,437 training and 360 test pictures" in text
    assert "81.23" not in card(run, tmp_path / "context", encoder="context")
    file = run.evaluation / "report.json"
    file.write_text(file.read_text().replace(digest(run.checkpoint() / "target.safetensors"), "another"))
    assert "81.23" not in card(run, tmp_path / "other")


def test_nothing_is_overwritten_and_nothing_left_half(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    export(run, out)  # an empty folder is no loss
    before = (out / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="already there, and nothing is overwritten"):
        export(run, out)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="already there"):
        export(run, tmp_path / "file")
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    monkeypatch.setattr(module, "_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(run, tmp_path / "half")
    assert not [p for p in tmp_path.iterdir() if "half" in p.name]


def test_embedded_rows_are_the_pictures_features(run, pictures, tmp_path):
    said, seen = [], []
    out = embed_folder(run, pictures, tmp_path / "features.npz", say=said.append, progress=lambda *x: seen.append(x))
    with np.load(out) as found:
        assert (found["level"].item(), found["run"].item()) == ("levels", run.name)
        names, features = found["names"].tolist(), found["features"]
    assert names == ["a.png", "b.png", "deep/c.png", "deep/d.png", "deep/deeper/e.png", "y.png", "z é.png"]
    assert (features.dtype, features.shape) == (np.float32, (7, 64))
    model = load(run.folder)
    for name in ("a.png", "deep/c.png", "y.png"):  # 16 x 16 already: read as they are
        image = np.asarray(Image.open(pictures / name))[None]
        np.testing.assert_allclose(features[names.index(name)], model.features(image)[0], atol=1e-5)
    assert "broken.png" in " ".join(said)
    assert seen[-1] == ("embedding", 7, 7)
    last = embed_folder(run, pictures, tmp_path / "last.npz", level="3", say=said.append)
    np.testing.assert_array_equal(np.load(last)["features"], features[:, 32:])


def test_a_labelled_folder_is_embedded_whole(run, pictures, tmp_path):
    root = tmp_path / "labelled"
    for i, place in enumerate(("train/cat", "train/dog", "test/cat")):
        (root / place).mkdir(parents=True)
        (root / place / f"{i}.png").write_bytes((pictures / "a.png").read_bytes())
    with np.load(embed_folder(run, root, tmp_path / "features.npz")) as found:
        assert found["names"].tolist() == ["train/cat/0.png", "train/dog/1.png", "test/cat/2.png"]
        assert found["features"].shape == (3, 64)


def test_embed_takes_any_pictures(run, images):
    from mlx_hjepa.data import Pictures

    model = load(run.folder)
    np.testing.assert_allclose(embed(model, Pictures(images, None), "last"), model.features(images, "last"), atol=1e-6)


def test_embedding_mistakes_are_named(run, pictures, tmp_path):
    out = tmp_path / "features.npz"
    def refused(match, folder=pictures, target=out, **options):
        with pytest.raises(UserError, match=match):
            embed_folder(run, folder, target, say=lambda line: None, **options)
    refused(r"level 2: choose last, levels, or a depth of \[1, 3\]", level=2)
    refused("no such folder", folder=tmp_path / "nowhere")
    refused("broken.png", on_corrupt="error")
    refused("not a file's name in an existing folder", target=tmp_path / "no" / "features.npz")
    assert not out.exists()
    out.write_bytes(b"mine")
    refused("already there.*--force")
    assert out.read_bytes() == b"mine"
    embed_folder(run, pictures, out, force=True, say=lambda line: None)
    assert np.load(out)["features"].shape == (7, 64)
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]
