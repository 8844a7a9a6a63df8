"""Your own pictures: `train/<class>/*` (and `test/<class>/*` or `val/`), or any folder of unlabelled ones.

Every file is checked once, before an order is drawn, because mlx-data decodes a JPEG that was cut to grey without a
word and a grey PNG to a red one. The verdicts are kept in the cache with a digest of each file, which is checked again
when its size or time changes. A JPEG that ends as it should but is damaged inside cannot be told from a sound one. EXIF
orientation is ignored.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mlx_hjepa import config
from mlx_hjepa.data.dataset import Dataset, Pictures, Say, dx, moments, read_ahead, taken
from mlx_hjepa.run import UserError, write_atomically

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
UNREAD = (".tif", ".tiff", ".heic", ".heif", ".avif", ".jfif", ".jp2", ".jxl")
SHOWN = 3  # names in a message
SAMPLED = 2_000  # pictures that mean and deviation are taken over
VERSION = 2  # of the saved index
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
FAST, PILLOW = "mlx-data", "pillow"  # the verdicts on a sound file: who decodes it; any other verdict is what is wrong


class Entry(NamedTuple):
    path: str  # relative to data.root
    size: int
    mtime_ns: int
    digest: str  # of its bytes
    verdict: str


class Files(Pictures):
    """One split in files. `read` and `stream` resize the smaller side to image_size, bilinear, and crop the centre.

    What a file gives never depends on the batch it is in: its decoder is fixed when it is indexed.
    """

    def __init__(self, root: Path, entries: list[Entry], labels: np.ndarray | None, data: config.Data):
        self.root = root
        self.entries = entries
        self.labels = labels
        self.names = [entry.path for entry in entries]
        self.shape = (data.image_size, data.image_size, 3)
        self.threads = data.threads

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, indices: np.ndarray) -> np.ndarray:
        indices = self.checked(indices)
        pictures = np.empty((len(indices), *self.shape), np.uint8)
        start = 0
        for part in self.stream(indices, 32, self.threads):
            pictures[start:start + len(part)] = part
            start += len(part)
        return pictures

    def stream(self, indices: np.ndarray, batch: int, threads: int) -> Iterator[np.ndarray]:
        """As Pictures.stream. Raises UserError, with the names, when files changed or vanished since the index."""
        indices = self.checked(indices)
        fast = any(entry.verdict == FAST for entry in self.entries)
        read = partial(taken, self._buffer) if fast else self._read_slowly
        decoded = read_ahead(read, indices, batch, threads)
        for start in range(0, len(indices), batch):
            part = indices[start:start + batch]
            try:
                images = next(decoded)
            except (RuntimeError, UserError) as error:
                self._refuse_changes(part)
                raise UserError(f"a picture cannot be decoded: {error}. Remove it and run again") from None
            self._refuse_changes(part)
            yield images

    def _refuse_changes(self, indices: np.ndarray) -> None:
        changed = [self.entries[i].path for i in indices if _changed(self.root, self.entries[i])]
        if changed:
            raise UserError(f"{self.root}: changed or vanished since the start: {_list('picture', changed)}.\n"
                            "Start again when the folder is at rest")

    def _read_slowly(self, indices: np.ndarray) -> np.ndarray:
        return np.stack([_decode(self.root / self.entries[i].path, self.shape[0]) for i in indices])

    @cached_property
    def _buffer(self) -> Any:
        """mlx-data decodes the sound files; what it cannot is put in afterwards, in place of its smallest one."""
        stand_in = min((entry for entry in self.entries if entry.verdict == FAST), key=lambda entry: entry.size)
        slow = any(entry.verdict == PILLOW for entry in self.entries)
        samples = []
        for i, entry in enumerate(self.entries):
            path = (entry if entry.verdict == FAST else stand_in).path
            sample = {"image": os.fsencode(self.root / path)}
            samples.append({**sample, "slow": i if entry.verdict == PILLOW else -1} if slow else sample)
        size = self.shape[0]
        buffer = dx.buffer_from_vector(samples).load_image("image")
        buffer = buffer.image_resize_smallest_side("image", size).image_center_crop("image", size, size)
        return buffer.sample_transform(self._put_in) if slow else buffer

    def _put_in(self, sample: dict[str, Any]) -> dict[str, Any]:
        if sample["slow"] >= 0:
            sample["image"] = _decode(self.root / self.entries[int(sample["slow"])].path, self.shape[0])
        return sample


def _changed(root: Path, entry: Entry) -> bool:
    try:
        stat = os.stat(f"{root}/{entry.path}")
    except OSError:
        return True
    return (stat.st_size, stat.st_mtime_ns) != (entry.size, entry.mtime_ns)


def _decode(path: Path, size: int) -> np.ndarray:
    """uint8 (size, size, 3) by Pillow; equal to mlx-data's to within rounding. Alpha is dropped."""
    try:
        with Image.open(path) as opened:
            wide = opened.mode.startswith("I")  # 16-bit grey, which convert would clip
            picture = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8)) if wide else opened
            picture = picture.convert("RGB")
        w, h = picture.size
        scale = size / min(w, h)
        w, h = round(w * scale), round(h * scale)
        left, top = (w - size) // 2, (h - size) // 2
        resized = picture.resize((w, h), Image.Resampling.BILINEAR)
        return np.array(resized.crop((left, top, left + size, top + size)))
    except Exception as error:  # a decoder may raise anything on a file that was changed under it
        raise UserError(f"{path} ({error})") from None


def load(data: config.Data, cache: Path, say: Say) -> Dataset:
    """Find and check the pictures under data.root. The name is always "folder"; the fingerprint is over the index."""
    root = Path(data.root or "").expanduser().resolve()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder. Point data.root, or --root, at the folder of pictures")
    paths = _find(root, say)
    index = cache / "folders" / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.json"
    saved = _saved(index)
    entries = _inspect_all(root, paths, saved["files"], data.threads, say)
    if [list(entry) for entry in entries] != list(saved["files"].values()):
        saved = {"files": {entry.path: list(entry) for entry in entries}, "moments": {}}
        _save(index, saved, say)
    sound = [entry for entry in entries if entry.verdict in (FAST, PILLOW)]
    corrupt = _refuse_corrupt([entry for entry in entries if entry.verdict not in (FAST, PILLOW)], data, say)
    train, test, classes = _split(root, sound, data)
    fingerprint = hashlib.sha256()
    for entry in sound:
        fingerprint.update(os.fsencode(entry.path) + f"\0{entry.digest}\n".encode())
    key = f"{fingerprint.hexdigest()} {data.image_size}"
    if key not in saved["moments"]:
        chosen = np.unique(np.linspace(0, len(train) - 1, min(SAMPLED, len(train))).astype(int))
        saved["moments"][key] = moments(train.read(part) for part in np.array_split(chosen, -(-len(chosen) // 64)))
        _save(index, saved, say)
    mean, std = (tuple(values) for values in saved["moments"][key])
    note = None if classes else f"{root}: no train/<class>/ folders, so the pictures have no labels and are not probed"
    return Dataset("folder", classes, train, test, fingerprint.hexdigest(), note, mean, std, corrupt)


def _find(root: Path, say: Say) -> list[str]:
    """Paths relative to `root`, sorted: in train/ and in test/ or val/, or anywhere when there is no train/. Says what
    other pictures lie among them."""
    tops = [root]
    if (root / "train").is_dir():
        tops = [root / "train", *[root / name for name in ("test", "val") if (root / name).is_dir()][:1]]
    paths: list[str] = []
    others: list[str] = []
    for top in tops:
        before = len(paths)
        for folder, inner, files in os.walk(top):
            inner[:] = [name for name in inner if not name.startswith(".")]
            inside = os.path.relpath(folder, root)
            for name in sorted(name for name in files if not name.startswith(".")):
                for found, suffixes in ((paths, SUFFIXES), (others, UNREAD)):
                    if name.lower().endswith(suffixes):
                        found.append(os.path.normpath(f"{inside}/{name}"))
        if len(paths) == before:
            raise UserError(f"{top}: no pictures here. Expected {', '.join(SUFFIXES)} files, as train/<class>/* or "
                            "without labels in any folders")
    if others:
        say(f"passed over {_list('picture', others)} (read are {', '.join(SUFFIXES)})")
    return sorted(paths)


def _split(root: Path, sound: list[Entry], data: config.Data) -> tuple[Files, Files | None, list[str]]:
    """Training pictures, test pictures, names of the classes (none when unlabelled)."""
    has_train = (root / "train").is_dir()
    parts = {entry.path: entry.path.split("/") for entry in sound}
    train = [entry for entry in sound if not has_train or parts[entry.path][0] == "train"]
    test = [entry for entry in sound if has_train and parts[entry.path][0] != "train"]
    if not train:
        raise UserError(f"{root}: no sound training picture is left")
    loose = [entry.path for entry in train + test if len(parts[entry.path]) == 2]
    if not has_train or len(loose) == len(sound):
        return Files(root, train, None, data), Files(root, test, None, data) if test else None, []
    classes = sorted({parts[entry.path][1] for entry in train if len(parts[entry.path]) > 2})
    number = {name: i for i, name in enumerate(classes)}
    strays = loose + [entry.path for entry in test if parts[entry.path][1] not in number]
    if strays:
        raise UserError(f"{root}: in no class folder of train/: {_list('picture', strays)}.\n"
                        "Every picture belongs into train/<class>/ or test/<class>/, or none does")
    labelled = [Files(root, split, np.array([number[parts[entry.path][1]] for entry in split], np.int32), data)
                for split in (train, test) if split]
    return labelled[0], labelled[1] if test else None, classes


def _refuse_corrupt(corrupt: list[Entry], data: config.Data, say: Say) -> tuple[str, ...]:
    names = tuple(entry.path for entry in corrupt)
    if names and data.on_corrupt == "error":
        named = _list("corrupt picture", [f"{entry.path} ({entry.verdict})" for entry in corrupt])
        every = " (mlx-hjepa data --on-corrupt skip lists them all)" if len(names) > SHOWN else ""
        raise UserError(f"{data.root}: {named}.\n"
                        f"Remove them, or leave them out: data.on_corrupt: skip, or data --on-corrupt skip{every}")
    if names:
        say(f"left out {_list('corrupt picture', names)}")
    return names


def _list(what: str, names: Sequence[str]) -> str:
    """The count and the first three."""
    return f"{len(names):,} {what}{'s' * (len(names) > 1)}: {', '.join(names[:SHOWN])}{' ...' * (len(names) > SHOWN)}"


def _inspect_all(root: Path, paths: list[str], saved: dict[str, list], threads: int, say: Say) -> list[Entry]:
    """A verdict on every file; those whose size and time are as saved are not opened."""
    entries, unknown = {}, []
    for path in paths:
        known = saved.get(path)
        if known and not _changed(root, entry := Entry(*known)):
            entries[path] = entry
        else:
            unknown.append(path)
    if len(unknown) > 1_000:
        say(f"checking {len(unknown):,} pictures in {root}, once")
    with ThreadPoolExecutor(threads) as pool:
        entries.update(zip(unknown, pool.map(lambda path: _entry(root, path), unknown), strict=True))
    return [entries[path] for path in paths]


def _entry(root: Path, path: str) -> Entry:
    try:
        stat = os.stat(root / path)
    except OSError as error:
        return Entry(path, 0, 0, "", error.strerror or str(error))
    return Entry(path, stat.st_size, stat.st_mtime_ns, *_inspect(root / path))


def _inspect(path: Path) -> tuple[str, str]:
    """The digest of a file's bytes; FAST or PILLOW for a sound file, else what is wrong with it.

    A JPEG with its end marker is sound if its header is; any other file must decode whole. mlx-data takes what it
    gives three channels for (not grey or WebP), Pillow the rest.
    """
    digest = ""
    try:
        content = path.read_bytes()
        digest, jpeg = hashlib.blake2b(content, digest_size=16).hexdigest(), content.startswith(JPEG_START)
        with Image.open(io.BytesIO(content)) as picture:
            if not (jpeg and content.endswith(JPEG_END)):
                picture.load()
            w, h = picture.size
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... on damage
        return digest, " ".join(re.sub(r"<_io\.BytesIO[^>]*>", "file", str(error)).split()) or type(error).__name__
    if dx is None or jpeg:
        return digest, PILLOW if dx is None else FAST
    try:
        decoded = dx.buffer_from_vector([{"image": os.fsencode(path)}]).load_image("image")[0]["image"]
    except RuntimeError:
        return digest, PILLOW
    return digest, FAST if decoded.shape == (h, w, 3) else PILLOW


def _saved(index: Path) -> dict[str, dict]:
    """What was saved about this folder; nothing when the decoder was another one or the file is unreadable."""
    try:
        saved = json.loads(index.read_text())
        if saved["version"] == VERSION and saved["mlx_data"] == (dx is not None):
            return {"files": saved["files"], "moments": saved["moments"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {"files": {}, "moments": {}}


def _save(index: Path, saved: dict[str, dict], say: Say) -> None:
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(index, json.dumps({"version": VERSION, "mlx_data": dx is not None, **saved}))
    except OSError as error:
        say(f"{index}: not written ({error.strerror}), so the pictures will be checked again next time")
