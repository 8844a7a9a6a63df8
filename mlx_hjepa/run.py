"""A run: its folder under results/, its files, its checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from mlx_hjepa.config import Config, ConfigError
from mlx_hjepa.config import load as load_config

RESULTS = Path("results")
DIGESTS = "digests.json"  # beside published weights: the SHA-256 of each file


class UserError(Exception):
    """A mistake a user can mend, in one or two lines that say what to do."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # a full disk must not keep the half of it
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    value = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value.update(block)
    return value.hexdigest()


class Run:
    """One training's folder. Every file it holds has its path here and nowhere else."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    @property
    def name(self) -> str:
        return self.folder.absolute().name  # that of `.` too

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def environment_file(self) -> Path:
        return self.folder / "environment.json"

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def log_file(self) -> Path:
        return self.folder / "train.log"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation"

    @property
    def published_weights(self) -> list[Path]:
        """The shards of a published run's target encoder, none for a run of one's own."""
        return sorted((self.folder / "weights").glob("*.safetensors"))

    @property
    def published(self) -> bool:
        """Whether this is a folder of docs/results: with published weights, or beside their results.json."""
        listed = not self.checkpoints.exists() and (self.folder.absolute().parent / "results.json").is_file()
        return listed or bool(self.published_weights)

    @property
    def scored(self) -> Path:
        """Where `eval` writes: `evaluation`, or for a published folder, which stays as it is, one under results/."""
        return RESULTS / f"{self.name}-published" / "evaluation" if self.published else self.evaluation

    @property
    def config(self) -> Config:
        return load_config(self.config_file)

    @property
    def environment(self) -> dict[str, Any]:
        return read_json(self.environment_file)

    @classmethod
    def create(cls, config: Config, results: Path = RESULTS) -> Run:
        """A new folder for this configuration; a second run of a name gets -2, -3 ..."""
        results.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            folder = results / (config.name if number == 1 else f"{config.name}-{number}")
            try:
                folder.mkdir()
                break
            except FileExistsError:
                number += 1
        run = cls(folder)
        run.checkpoints.mkdir()
        write_atomically(run.config_file, config.dump())
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run, given its folder or its name under results/. Raises UserError."""
        for folder in (Path(path), RESULTS / path):
            if (folder / "config.yaml").is_file():
                return cls(folder)
        raise UserError(f"{path}: no run here (a run is a folder with a config.yaml, such as results/<name>)")

    @classmethod
    def newest(cls, name: str | None = None, results: Path = RESULTS) -> Run:
        """The run that wrote last; `name` takes only runs of that configuration. Raises UserError."""
        runs = [cls(file.parent) for file in results.glob("*/config.yaml")]
        damaged: ConfigError | None = None
        for run in sorted(runs, key=lambda run: run._written(), reverse=True):
            try:
                if name in (None, run.config.name):
                    return run
            except ConfigError as error:  # it hides no older run
                damaged = damaged or error
        if damaged and name is None:
            raise damaged
        what = f"run named {name}" if name else "run"
        raise UserError(f"no {what} under {results}/ yet. Train one: mlx-hjepa train configs/digits_demo.yaml")

    def _written(self) -> float:
        return max(f.stat().st_mtime for f in (self.config_file, self.metrics_file) if f.exists())

    def checkpoint(self, which: str = "latest", file: str | None = None) -> Path:
        """The folder of a checkpoint: `latest`, `best`, or a path. Raises UserError.

        Its files, or the one to be read, are checked against the digests in its state.json, so that a truncated file
        is told, not read, and the encoder can be scored where the optimizer's state was not kept.
        """
        if which in ("latest", "best"):
            pointer = self.checkpoints / which
            if not self.checkpoints.is_dir():
                raise UserError(f"{self.folder}: its weights are not here, so it can be read but not scored")
            if not pointer.is_file():
                raise UserError(f"{self.folder}: no {which} checkpoint yet. "
                                f"Train on: mlx-hjepa train {self.folder} --resume")
            folder = self.checkpoints / pointer.read_text().strip()
        else:
            folder = Path(which) if Path(which).is_dir() else self.checkpoints / which
        state = folder / "state.json"
        if not state.is_file():
            raise UserError(f"{folder}: not a checkpoint (no state.json)")
        record = read_json(state)
        _check_digests(state, record.get("digests") if isinstance(record, dict) else None, file,
                       f"Use another checkpoint: --checkpoint best, or one of {self.checkpoints}")
        return folder

    def checked_shards(self) -> list[Path]:
        """`published_weights`, checked where digests were published with them. Raises UserError."""
        record = self.folder / "weights" / DIGESTS
        if record.is_file():
            _check_digests(record, read_json(record), None, "Fetch the published folder again")
        return self.published_weights

    def remove_if_empty(self) -> None:
        """Remove the folder of a run that never began, say for want of its data: the newest run is a trained one."""
        begun = self.metrics_file.exists() and self.metrics_file.stat().st_size
        if not begun and not any(self.checkpoints.glob("*")):
            shutil.rmtree(self.folder)

    def point(self, which: str, folder: Path) -> None:
        """Let `latest` or `best` name a checkpoint."""
        write_atomically(self.checkpoints / which, folder.name + "\n")

    def remove_old_checkpoints(self, keep: int) -> None:
        """Remove all but the newest `keep` checkpoints and the best one; and what a killed process left unfinished."""
        best = self.checkpoints / "best"
        spared = {best.read_text().strip()} if best.is_file() else set()
        folders = sorted(self.checkpoints.glob("step-*"))
        for folder in folders[:-keep]:
            if folder.name not in spared:
                shutil.rmtree(folder)
        for folder in self.checkpoints.glob(".step-*.tmp"):
            shutil.rmtree(folder)


def _check_digests(record: Path, digests: Any, only: str | None, advice: str) -> None:
    """Raise UserError unless the files beside `record`, or the one, are those whose digests it holds."""
    if not isinstance(digests, dict) or not digests:
        raise UserError(f"{record}: damaged. {advice}")
    for name in [only] if only else digests:
        path = record.with_name(name)
        if not path.is_file() or digest(path) != digests.get(name):
            raise UserError(f"{path}: {'damaged' if path.is_file() else 'missing'}. {advice}")


def read_json(path: Path) -> Any:
    """A JSON file's value. Raises UserError when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path}: damaged, not JSON") from None


def read_arrays(file: Path) -> dict[str, Any]:
    """The named arrays of a safetensors file, read now. Raises UserError when it is damaged."""
    import mlx.core as mx  # here, so that `doctor` runs where MLX does not load

    try:
        arrays = mx.load(str(file))
        mx.eval(arrays)  # mx.load is lazy: a file changed later would give wrong numbers
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({str(error).splitlines()[0]})") from None
    return arrays  # type: ignore[return-value]


def duration(seconds: float) -> str:
    """Seconds as 45 s, 12 min or 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
