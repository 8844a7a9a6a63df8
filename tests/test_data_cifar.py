"""The archives: reading, refusing, downloading and unpacking them, on copies of 20 records a file."""

import dataclasses
import hashlib
import http.server
import io
import tarfile
import threading

import numpy as np
import pytest

from mlx_hjepa import config
from mlx_hjepa.data import cifar, describe, load_dataset
from mlx_hjepa.run import UserError

RECORDS = 20


def quiet(line):
    pass


def small(name):
    """The archive's layout with few records a file."""
    archive = cifar.ARCHIVES[name]
    return dataclasses.replace(archive, train=tuple((file, RECORDS) for file, _ in archive.train),
                               test=tuple((file, RECORDS) for file, _ in archive.test))


def write_records(archive, folder):
    """Random records, every class within bounds; returns the labels of the training files."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    labels = []
    for name, records in archive.train + archive.test:
        raw = rng.integers(0, 256, (records, archive.record), dtype=np.uint8)
        raw[:, :archive.label_bytes] = rng.integers(0, archive.classes, (records, archive.label_bytes))
        raw.tofile(folder / name)
        labels.append(raw[:, archive.label_bytes - 1])
    (folder / archive.class_file).write_text("\n".join(f"name{i}" for i in range(archive.classes)))
    return np.concatenate(labels[:len(archive.train)])


def pack(archive, folder, file, extra=()):
    with tarfile.open(file, "w:gz") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, f"{archive.folder}/{path.name}")
        for name in extra:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(params=["cifar10", "cifar100"])
def unpacked(request, tmp_path, monkeypatch):
    archive = small(request.param)
    monkeypatch.setitem(cifar.ARCHIVES, request.param, archive)
    labels = write_records(archive, tmp_path / "root" / archive.folder)
    return request.param, archive, tmp_path / "root", labels


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """cifar10's archive in a folder of its own, with a member that would escape; the constants name its digest."""
    archive = small("cifar10")
    write_records(archive, tmp_path / "made")
    (tmp_path / "served").mkdir()
    file = tmp_path / "served" / archive.file
    sha256 = pack(archive, tmp_path / "made", file, extra=("../escaped.bin", f"{archive.folder}/surplus.bin"))
    archive = dataclasses.replace(archive, sha256=sha256)
    monkeypatch.setitem(cifar.ARCHIVES, "cifar10", archive)
    return archive, file


@pytest.mark.parametrize("inside", [True, False])
def test_reads_an_unpacked_folder(unpacked, inside, tmp_path):
    name, archive, root, labels = unpacked
    folder = root / archive.folder
    dataset = load_dataset(config.Data(dataset=name, root=str(folder if inside else root)), tmp_path / "cache", quiet)
    assert dataset.name == f"{name}-unverified"
    assert "not checked against the official archive" in dataset.note
    assert len(dataset.train) == RECORDS * len(archive.train)
    assert len(dataset.test) == RECORDS
    assert dataset.train.labels.dtype == np.int32
    assert (dataset.train.labels == labels).all()
    raw = np.fromfile(folder / archive.train[0][0], np.uint8).reshape(RECORDS, -1)
    picture = dataset.train.read(np.array([3]))[0]
    assert picture.shape == (32, 32, 3)
    assert picture[5, 7, 2] == raw[3, archive.label_bytes + 2 * 1024 + 5 * 32 + 7]
    content = b"".join((folder / file).read_bytes() for file, _ in archive.train + archive.test)
    assert dataset.fingerprint == hashlib.sha256(content).hexdigest()
    scaled = dataset.train.images / 255.0
    np.testing.assert_allclose(dataset.mean, scaled.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, scaled.std((0, 1, 2)), rtol=1e-12)
    assert describe(dataset)["classes"][1] == ("automobile" if name == "cifar10" else "name1")


def test_jpeg_copies_are_recognised(unpacked, tmp_path, monkeypatch):
    name, _, root, _ = unpacked
    data = config.Data(dataset=name, root=str(root))
    monkeypatch.setattr(cifar, "JPEG_COPIES", load_dataset(data, tmp_path, quiet).fingerprint)
    said = []
    dataset = load_dataset(data, tmp_path, said.append)
    assert dataset.name == "cifar10-jpeg"
    assert said == [dataset.note]
    assert "JPEG copies" in dataset.note


def test_damaged_files_are_refused(unpacked, tmp_path):
    name, archive, root, _ = unpacked
    data = config.Data(dataset=name, root=str(root))
    file = root / archive.folder / archive.train[-1][0]
    raw = bytearray(file.read_bytes())
    raw[4 * archive.record + archive.label_bytes - 1] = 200
    file.write_bytes(raw)
    with pytest.raises(UserError, match="label 200 in record 4"):
        load_dataset(data, tmp_path, quiet)
    file.write_bytes(raw[:-1])
    with pytest.raises(UserError, match=rf"{file.name} has [\d,]+ bytes, expected"):
        load_dataset(data, tmp_path, quiet)
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name} is missing"):
        load_dataset(data, tmp_path, quiet)


def test_archive_is_checked_unpacked_and_reused(packed, tmp_path):
    archive, file = packed
    cache, said = tmp_path / "cache", []
    dataset = load_dataset(config.Data(root=str(file.parent)), cache, said.append)
    assert (dataset.name, dataset.note) == ("cifar10", None)
    assert len(said) == 1
    expected = {name for name, _ in archive.train + archive.test} | {archive.class_file, cifar.MARKER}
    assert {path.name for path in (cache / archive.folder).iterdir()} == expected
    assert {path.name for path in cache.iterdir()} == {archive.folder}
    assert not list(tmp_path.rglob("escaped.bin"))
    file.unlink()
    assert load_dataset(config.Data(), cache, said.append).name == "cifar10"
    assert len(said) == 1
    assert cifar.cache_problems(cache) == []
    victim = cache / archive.folder / "data_batch_2.bin"
    raw = bytearray(victim.read_bytes())
    raw[100] ^= 1
    victim.write_bytes(raw)
    with pytest.raises(UserError, match="not what was unpacked"):
        load_dataset(config.Data(), cache, quiet)
    assert len(cifar.cache_problems(cache)) == 1
    (cache / archive.folder / cifar.MARKER).unlink()  # as when somebody copied it there
    assert "not checked against the official archive" in cifar.cache_problems(cache)[0]
    victim.write_bytes(raw[:1000])
    assert "has 1,000 bytes" in cifar.cache_problems(cache)[0]


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_archive_with_a_wrong_digest_is_refused(packed, tmp_path, monkeypatch, damage):
    archive, file = packed
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        monkeypatch.setitem(cifar.ARCHIVES, "cifar10", dataclasses.replace(archive, sha256="0" * 64))
    cache = tmp_path / "cache"
    cache.mkdir()
    file = file.rename(cache / file.name)
    with pytest.raises(UserError, match="Delete it and run again"):
        load_dataset(config.Data(), cache, quiet)
    assert cifar.cache_problems(cache)[0].startswith(str(file))
    assert not (cache / archive.folder).exists()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one file, with ranges; `break_at` closes the first connection after so many bytes."""

    content: bytes
    break_at: int
    asked: list

    def do_GET(self):
        asked = self.headers.get("Range")
        self.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if start >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        stop = self.break_at if len(self.asked) == 1 else None
        self.wfile.write(self.content[start:stop])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(packed, monkeypatch):
    archive, file = packed
    Server.content, Server.break_at, Server.asked = file.read_bytes(), len(file.read_bytes()), []
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    archive = dataclasses.replace(archive, url=f"http://127.0.0.1:{server.server_port}/{archive.file}")
    monkeypatch.setitem(cifar.ARCHIVES, "cifar10", archive)
    yield archive
    server.shutdown()
    server.server_close()


def test_broken_download_is_resumed(served, tmp_path):
    cache = tmp_path / "cache"
    Server.break_at = 50_000
    assert load_dataset(config.Data(), cache, quiet).name == "cifar10"
    assert Server.asked == [None, "bytes=50000-"]
    assert {path.name for path in cache.iterdir()} == {served.folder, served.file}


def test_download_of_an_earlier_process_is_resumed(served, tmp_path):
    part = tmp_path / f"{served.file}.part"
    part.write_bytes(Server.content[:70_000])
    assert load_dataset(config.Data(), tmp_path, quiet).name == "cifar10"
    assert Server.asked == ["bytes=70000-"]
    assert not part.exists()


def test_whole_part_is_only_checked(served, tmp_path):
    (tmp_path / f"{served.file}.part").write_bytes(Server.content)
    assert load_dataset(config.Data(), tmp_path, quiet).name == "cifar10"


def test_download_with_a_wrong_digest_is_not_kept(served, tmp_path):
    Server.content = b"<html>Please log in</html>"
    with pytest.raises(UserError, match="nothing was kept"):
        load_dataset(config.Data(), tmp_path / "cache", quiet)
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_network_the_error_says_what_to_do(served, tmp_path, monkeypatch):
    archive = dataclasses.replace(served, url="http://127.0.0.1:9/cifar-10-binary.tar.gz")
    monkeypatch.setitem(cifar.ARCHIVES, "cifar10", archive)
    with pytest.raises(UserError) as caught:
        load_dataset(config.Data(), tmp_path / "cache", quiet)
    message = str(caught.value)
    assert archive.url in message
    assert f"put it into {tmp_path / 'cache'}/" in message
    assert "data.root" in message
    assert message.count("\n") == 1


def test_root_without_the_files_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither data_batch_1\.bin"):
        load_dataset(config.Data(root=str(tmp_path)), tmp_path / "cache", quiet)
