"""Folders of pictures: what is found, what is refused, and that no file is ever decoded wrongly in silence."""

import os

import numpy as np
import pytest
from PIL import Image

from mlx_hjepa import config
from mlx_hjepa.data import batches, dataset, describe, folder, load_dataset
from mlx_hjepa.run import UserError

SIZE = 16
needs_mlx_data = pytest.mark.skipif(folder.dx is None, reason="no mlx-data here")


def blocks(seed, h=24, w=40):
    """A picture that survives JPEG: 8 x 8 blocks of one colour."""
    colours = np.random.default_rng(seed).integers(0, 256, (h // 8, w // 8, 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(8, 0).repeat(8, 1))


@pytest.fixture
def root(tmp_path):
    """train/{cat,dog ü} with four JPEGs each, test/{cat,dog ü} with one, and files that are none of our business."""
    root = tmp_path / "pictures"
    for split, count in (("train", 4), ("test", 1)):
        for c, name in enumerate(("cat", "dog ü")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                blocks(10 * c + i).save(root / split / name / f"{i}.jpg", quality=95)
    (root / "train" / "cat" / "._0.jpg").write_bytes(b"Finder's")
    (root / "train" / "notes.txt").write_text("no picture")
    return root


@pytest.fixture
def load(root, tmp_path):
    def load(say=lambda line: None, **data):
        values = {"dataset": "folder", "root": str(root), "image_size": SIZE, "threads": 2, **data}
        return load_dataset(config.Data(**values), tmp_path / "cache", say)
    return load


def expected(path):
    """What `read` promises, by Pillow: the smaller side to SIZE, bilinear, the centre."""
    picture = Image.open(path).convert("RGB")
    w, h = (round(side * SIZE / min(picture.size)) for side in picture.size)
    left, top = (w - SIZE) // 2, (h - SIZE) // 2
    return np.asarray(picture.resize((w, h), Image.Resampling.BILINEAR))[top:top + SIZE, left:left + SIZE].astype(int)


def assert_pictures_are_right(root, pictures):
    for name, image in zip(pictures.names, pictures.read(np.arange(len(pictures))), strict=True):
        assert np.abs(image - expected(root / name)).max() <= 4, name  # JPEG decoders differ in rounding


def test_classes_labels_and_pictures(root, load):
    data = load()
    assert data.classes == ["cat", "dog ü"]
    assert data.train.names == [f"train/{name}/{i}.jpg" for name in data.classes for i in range(4)]
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4
    assert data.test.labels.tolist() == [0, 1]
    assert (data.train.labels.dtype, data.train.shape, data.name) == (np.int32, (SIZE, SIZE, 3), "folder")
    assert_pictures_are_right(root, data.train)
    scaled = data.train.read(np.arange(8)) / 255
    np.testing.assert_allclose(data.mean, scaled.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(data.std, scaled.std((0, 1, 2)), rtol=1e-9)
    with pytest.raises(IndexError):
        data.train.read(np.array([-1]))
    facts = describe(data)
    assert (facts["train"], facts["test"], facts["corrupt"], facts["labelled"]) == (8, 2, [], True)


def test_unlabelled_pictures_in_any_folders(root, load, tmp_path):
    (root / "train").rename(root / "holiday")
    said = []
    data = load(said.append)
    assert (data.train.labels, data.test, data.classes, len(data.train)) == (None, None, [], 10)
    assert said == [data.note]
    assert "no labels" in data.note


def test_val_is_taken_for_the_test_set(root, load):
    (root / "test").rename(root / "val")
    assert load().test.names[0] == "val/cat/0.jpg"


def odd_files(root):
    """Sound pictures that mlx-data decodes to one channel, or not at all, or whose name misleads."""
    target = root / "train" / "cat"
    blocks(50).convert("L").save(target / "grey.png")
    blocks(51).convert("1").save(target / "bit.png")
    blocks(52).convert("LA").save(target / "grey_alpha.png")
    blocks(53).convert("P").save(target / "palette.png")
    blocks(54).convert("RGBA").save(target / "alpha.png")
    blocks(55).convert("L").save(target / "grey.jpg")
    blocks(56).save(target / "lossless.webp", lossless=True)
    blocks(57).save(target / "misnamed.png", format="JPEG", quality=95)
    blocks(58).save(target / "b.bmp")
    blocks(59).save(target / "no_end.jpg", quality=95)
    raw = (target / "no_end.jpg").read_bytes()
    (target / "no_end.jpg").write_bytes(raw + b"\0\0\0")  # padded by its writer: sound


def test_every_sound_format_is_decoded_right(root, load):
    odd_files(root)
    data = load()
    assert len(data.train) == 18
    assert_pictures_are_right(root, data.train)


def test_sixteen_bit_grey_is_scaled_not_clipped(root, load):
    values = np.tile(np.linspace(0, 65000, SIZE).astype(np.uint16), (SIZE, 1))
    Image.fromarray(values).save(root / "train" / "cat" / "deep.png")
    data = load()
    image = data.train.read(np.array([data.train.names.index("train/cat/deep.png")]))[0]
    assert (image == (values >> 8)[..., None]).all()


def test_a_picture_never_depends_on_its_batch(root, load):
    odd_files(root)
    data = load()
    alone = np.concatenate([data.train.read(np.array([i])) for i in range(18)])
    assert (data.train.read(np.arange(18)[::-1])[::-1] == alone).all()
    for threads in (1, 3):
        streamed = list(batches(data.train, "stream", 0, 6, 1, 7, threads))
        resident = list(batches(data.train, "resident", 0, 6, 1, 7, threads))
        assert all((np.array(a) == np.array(b)).all() for a, b in zip(streamed, resident, strict=True))


@needs_mlx_data
def test_without_mlx_data_pillow_gives_nearly_the_same(root, load, monkeypatch):
    odd_files(root)
    fast = load()
    monkeypatch.setattr(dataset, "dx", None)
    monkeypatch.setattr(folder, "dx", None)
    said = []
    slow = load(said.append)
    assert any("mlx-data has no wheel" in line for line in said)
    assert slow.fingerprint == fast.fingerprint
    assert_pictures_are_right(root, slow.train)
    assert len(list(batches(slow.train, "stream", 0, 6, 0, 4, 2))) == 4


def damage(root):
    target = root / "train" / "cat"
    raw = (target / "0.jpg").read_bytes()
    (target / "cut.jpg").write_bytes(raw[:-60])  # inside the scan: mlx-data would give grey rows
    (target / "empty.jpg").write_bytes(b"")
    (target / "text.png").write_text("not a picture")
    blocks(60).save(target / "cut.png")
    (target / "cut.png").write_bytes((target / "cut.png").read_bytes()[:-30])
    return {f"train/cat/{name}" for name in ("cut.jpg", "empty.jpg", "text.png", "cut.png")}


def test_corrupt_pictures_stop_the_run_by_default(root, load):
    damage(root)
    with pytest.raises(UserError, match=r"4 corrupt pictures: train/cat/cut\.jpg \(.*truncated") as caught:
        load()
    assert "on_corrupt: skip" in str(caught.value)
    assert "data --on-corrupt skip lists them all" in str(caught.value)


def test_corrupt_pictures_are_left_out_counted_and_named(root, load):
    bad = damage(root)
    said = []
    data = load(said.append, on_corrupt="skip")
    assert set(data.corrupt) == bad
    assert len(data.train) == 8
    assert set(describe(data)["corrupt"]) == bad
    assert len(said) == 1
    assert said[0].startswith("left out 4 corrupt pictures: train/cat/cut.jpg, train/cat/cut.png, ")


def test_an_unchanged_folder_is_not_checked_again(root, load, monkeypatch):
    damage(root)
    first = load(on_corrupt="skip")
    opened = []
    inspect = folder._inspect
    monkeypatch.setattr(folder, "_inspect", lambda path: opened.append(path.name) or inspect(path))
    monkeypatch.setattr(folder, "moments", lambda batches: pytest.fail("measured again"))
    again = load(on_corrupt="skip")
    assert opened == []
    assert (again.fingerprint, again.corrupt, again.mean) == (first.fingerprint, first.corrupt, first.mean)
    monkeypatch.undo()
    monkeypatch.setattr(folder, "_inspect", lambda path: opened.append(path.name) or inspect(path))
    blocks(99).save(root / "train" / "cat" / "cut.jpg")
    mended = load(on_corrupt="skip")
    assert opened == ["cut.jpg"]
    assert len(mended.train) == 9
    assert mended.fingerprint != first.fingerprint


def test_the_fingerprint_is_of_what_the_files_hold(root, load):
    first, file = load().fingerprint, root / "train" / "cat" / "2.jpg"
    os.utime(file, ns=(1, 1))
    assert load().fingerprint == first
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(2, 2))
    assert file.stat().st_size == stat.st_size
    assert load().fingerprint != first


def test_a_damaged_index_is_made_anew(root, load, tmp_path):
    first = load()
    [index] = (tmp_path / "cache" / "folders").iterdir()
    index.write_text('{"version": 1, "mlx_da')
    assert load().fingerprint == first.fingerprint


@pytest.mark.parametrize("change", ["vanish", "cut", "replace"])
def test_a_file_that_changes_during_the_run_is_named(root, load, change):
    data = load()
    victim = root / "train" / "cat" / "2.jpg"
    if change == "vanish":
        victim.unlink()
    elif change == "cut":
        victim.write_bytes(victim.read_bytes()[:-200])
    else:
        os.utime(victim, ns=(1, 1))
    with pytest.raises(UserError, match=r"changed or vanished since the start: 1 picture: train/cat/2\.jpg\."):
        list(batches(data.train, "stream", 0, 4, 0, 2, 2))


@pytest.mark.parametrize(("make", "message"), [
    (lambda root: None, "no such folder"),
    (lambda root: root.mkdir(), "no pictures here"),
    (lambda root: (root / "train" / "cat").mkdir(parents=True), "no pictures here"),
])
def test_nothing_there(tmp_path, make, message):
    root = tmp_path / "nothing"
    make(root)
    with pytest.raises(UserError, match=message):
        load_dataset(config.Data(dataset="folder", root=str(root)), tmp_path / "cache")


def test_an_empty_test_folder_is_an_error(root, load):
    for file in (root / "test").rglob("*.jpg"):
        file.unlink()
    with pytest.raises(UserError, match="test: no pictures here"):
        load()


@pytest.mark.parametrize("stray", ["train/loose.png", "test/bird/0.png"])
def test_strays_among_classes_are_refused(root, load, stray):
    (root / stray).parent.mkdir(exist_ok=True)
    blocks(1).save(root / stray)
    with pytest.raises(UserError, match=f"in no class folder of train/: 1 picture: {stray}"):
        load()


def test_pictures_of_kinds_that_are_not_read_are_told(root, load):
    for name in ("b.HEIC", ".hidden.tiff"):
        (root / "train" / "cat" / name).touch()
    said = []
    load(said.append)
    assert said == ["passed over 1 picture: train/cat/b.HEIC (read are .jpg, .jpeg, .png, .bmp, .gif, .webp)"]
