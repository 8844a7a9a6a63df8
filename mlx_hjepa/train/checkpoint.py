"""Checkpoints: written under a temporary name, synced, renamed; read back bit for bit. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_hjepa.run import Run, UserError, digest, read_arrays, read_json, sync_folder, write_atomically
from mlx_hjepa.train.step import Layout, State

FORMAT = 1
FILES = ("model.safetensors", "target.safetensors", "optimizer.safetensors")


def save(run: Run, state: State, layout: Layout, progress: dict[str, Any]) -> Path:
    """Write `checkpoints/step-<step>` and let `latest` name it. progress: JSON values, `step` among them."""
    run.checkpoints.mkdir(exist_ok=True)
    folder = run.checkpoints / f"step-{progress['step']:09d}"
    temporary = run.checkpoints / f".{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    contents = (
        layout.views(state.parameters),
        layout.views(state.target),
        {"first_moment": state.first_moment, "second_moment": state.second_moment, "guard": state.guard},
    )
    for name, arrays in zip(FILES, contents, strict=True):
        mx.save_safetensors(str(temporary / name), arrays, {"format": "mlx", "mlx_hjepa": str(FORMAT)})
        with open(temporary / name, "rb") as file:
            os.fsync(file.fileno())
    record = {"format": FORMAT, **progress, "digests": {name: digest(temporary / name) for name in FILES}}
    write_atomically(temporary / "state.json", json.dumps(record, indent=1))
    if folder.exists():  # a run killed between the rename and `latest` left the same one
        shutil.rmtree(folder)
    os.rename(temporary, folder)
    sync_folder(run.checkpoints)
    run.point("latest", folder)
    return folder


def newest(run: Run, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are as they were written; those passed over are said. None when none was
    written yet. Raises UserError: none is sound, or they were removed from a run that had some."""
    folders = sorted(run.checkpoints.glob("step-*"), reverse=True)
    for folder in folders:
        try:
            return run.checkpoint(folder.name)
        except UserError as error:
            say(f"passed over: {str(error).split('. Use')[0]}")
    if folders:
        raise UserError(f"{run.checkpoints}: no checkpoint is sound. "
                        f"Start a new run: mlx-hjepa train {run.config_file}")
    if (run.checkpoints / "latest").exists() or not run.checkpoints.is_dir():
        raise UserError(f"{run.folder}: its checkpoints were removed, so it cannot go on. "
                        f"Start a new run: mlx-hjepa train {run.config_file}")
    say(f"{run.folder} has no checkpoint yet: it starts at step 0")
    return None


def load(folder: Path, layout: Layout) -> tuple[State, dict[str, Any]]:
    """The state and the progress of a checkpoint whose digests were checked (Run.checkpoint). Raises UserError."""
    progress = read_json(folder / "state.json")
    if progress.get("format") != FORMAT:
        raise UserError(f"{folder}: written by another version of mlx-hjepa (format {progress.get('format')}, "
                        f"here {FORMAT})")
    model, target, optimizer = (read_arrays(folder / name) for name in FILES)
    encoder = {n for n in layout.names if n.startswith("encoder.")}
    if set(model) != set(layout.names) or set(target) != encoder:
        raise UserError(f"{folder}: its weights are of another model than its config.yaml describes")
    state = State(layout.pack(model), optimizer["first_moment"], optimizer["second_moment"], layout.pack(target),
                  optimizer["guard"])
    mx.eval(state.arrays())
    return state, progress
