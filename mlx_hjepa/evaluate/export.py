"""What leaves the package: a run's encoder under timm's names and layouts, and the features of a user's own pictures.

timm.models.vision_transformer.VisionTransformer computes the same features: fixed positions become `pos_embed`, the
LayerNorm without affine that reads every depth becomes the final `norm` with weight 1 and bias 0, before the mean.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_hjepa import config
from mlx_hjepa.backend import cache_folder
from mlx_hjepa.data import Pictures
from mlx_hjepa.data.folder import load as load_folder
from mlx_hjepa.evaluate import check_features
from mlx_hjepa.evaluate.features import FrozenEncoder, load, read_weights, weights_file
from mlx_hjepa.evaluate.subject import Progress
from mlx_hjepa.model.vit import EPS, Encoder, Weights, positions
from mlx_hjepa.run import Run, UserError, digest, read_json, sync_folder, write_atomically

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
Which = Literal["target", "context"]


def export(run: Run, out: str | Path, encoder: Which = "target", checkpoint: str = "latest") -> Path:
    """Write `model.safetensors`, `config.json` and the model card `README.md` into the new folder `out`, whole or not
    at all. Returns the folder. Raises UserError: `out` holds something, no such checkpoint, damaged weights."""
    out = Path(out).expanduser().resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: already there, and nothing is overwritten. Remove it, or export to another folder")
    model = load(run.folder, encoder, checkpoint)
    about = _about(run, model, encoder, checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        mx.save_safetensors(str(temporary / WEIGHTS), to_timm(model.weights, model.encoder), {"format": "pt"})
        with open(temporary / WEIGHTS, "rb") as file:
            os.fsync(file.fileno())
        write_atomically(temporary / CONFIG, json.dumps(timm_config(model) | {"mlx_hjepa": about}, indent=1))
        write_atomically(temporary / CARD, _card(run, model, about))
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(out.parent)
    return out


def to_timm(weights: Weights, encoder: Encoder) -> Weights:
    """An encoder's weights as VisionTransformer's state dict: Linears (out, in), the patch embedding a convolution."""
    p, dim = encoder.patch, encoder.dim
    out = {name: w.T if w.ndim == 2 else w for name, w in weights.items()}
    kernel = weights["patch_embed.proj.weight"].reshape(p, p, 3, dim)
    return out | {"patch_embed.proj.weight": kernel.transpose(3, 2, 0, 1), "norm.weight": mx.ones(dim),
                  "norm.bias": mx.zeros(dim), "pos_embed": mx.array(positions(encoder.grid, dim))[None]}


def from_timm(weights: Weights) -> Weights:
    """The inverse of `to_timm`."""
    kernel = weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    out = {n: w for n, w in weights.items() if n != "pos_embed" and not n.startswith("norm.")}
    out = {n: mx.contiguous(w.T) if w.ndim == 2 else w for n, w in out.items()}
    return out | {"patch_embed.proj.weight": kernel.reshape(-1, kernel.shape[-1])}


def timm_config(model: FrozenEncoder) -> dict[str, Any]:
    """timm's hub format: `model_args` builds the VisionTransformer, `pretrained_cfg` says how pictures are prepared."""
    e, size = model.encoder, model.config.data.image_size
    ratio = e.hidden / e.dim
    if int(e.dim * ratio) != e.hidden:  # timm cuts where the encoder rounds
        ratio = (e.hidden + 0.5) / e.dim
    return {
        "architecture": "vit_small_patch16_224",  # timm wants a registered name; model_args replaces all of its shape
        "num_classes": 0, "num_features": e.dim, "global_pool": "avg",
        "model_args": {"img_size": size, "patch_size": e.patch, "embed_dim": e.dim, "depth": e.depth,
                       "num_heads": e.heads, "mlp_ratio": ratio, "num_classes": 0, "class_token": False,
                       "global_pool": "avg", "fc_norm": False, "final_norm": True, "act_layer": "gelu_tanh"},
        "pretrained_cfg": {"input_size": [3, size, size], "fixed_input_size": True, "interpolation": "bilinear",
                           "crop_pct": 1.0, "mean": list(model.mean), "std": list(model.std), "num_classes": 0,
                           "first_conv": "patch_embed.proj", "classifier": "head"},
    }


def load_exported(folder: str | Path) -> FrozenEncoder:
    """The encoder of an exported folder. Raises UserError for anything else."""
    folder = Path(folder).expanduser()
    values = read_json(folder / CONFIG)
    try:
        settings = config.build(values["mlx_hjepa"]["config"], str(folder / CONFIG))
        mean, std = (tuple(values["pretrained_cfg"][key]) for key in ("mean", "std"))
    except (KeyError, TypeError):
        raise UserError(f"{folder}: not written by mlx-hjepa export") from None
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder / WEIGHTS}: missing")
    weights, encoder = read_weights([folder / WEIGHTS]), Encoder(settings)
    expected = {n: w.shape for n, w in to_timm(encoder.init(mx.random.key(0)), encoder).items()}
    if expected != {n: w.shape for n, w in weights.items()}:
        raise UserError(f"{folder / WEIGHTS}: not the weights that {CONFIG} describes")
    return FrozenEncoder(settings, from_timm(weights), mean, std)


def _about(run: Run, model: FrozenEncoder, encoder: Which, checkpoint: str) -> dict[str, Any]:
    """What timm has no word for, and the origin: the digest of the weights' file, the step where it is known.

    No path of the exporter's machine is among it.
    """
    kept = model.config.model_dump(mode="json", include={"name": True, "seed": True, "model": True, "masking": True,
                                                         "augment": True, "data": {"image_size": True}})
    about = {"run": run.name, "encoder": encoder, "dataset": run.environment["dataset"]["name"],
             "depths": model.depths, "norm_eps": EPS, "config": kept}
    if run.published_weights:
        return about | {"weights": digest(run.published_weights[0])}
    file = weights_file(encoder)
    state = read_json(run.checkpoint(checkpoint, file) / "state.json")
    return about | {"weights": state["digests"][file], "step": state["step"]}


def _card(run: Run, model: FrozenEncoder, about: dict[str, Any]) -> str:
    """The model card: what it is, how to load it, and the report's numbers where they are of these weights."""
    e, c = model.encoder, model.config
    count = sum(w.size for w in model.weights.values()) / 1e6
    which = f"{about['encoder']} encoder" + (f", after {about['step']:,} steps" if "step" in about else "")
    every = len(e.depths) * e.dim
    return f"""---
library_name: mlx
pipeline_tag: image-feature-extraction
tags: [mlx, timm, h-jepa, jepa, self-supervised-learning, vision-transformer]
---

# {run.name}

A vision transformer trained on {about['dataset']} without labels, as a hierarchical joint-embedding predictive
architecture (H-JEPA), with mlx-hjepa: width {e.dim}, {e.depth} blocks, {e.heads} heads, {count:.1f} M weights; pictures
of {c.data.image_size} px in patches of {e.patch} px. These are the weights of the {which}; the run has
{c.training.epochs} epochs, batch {c.training.batch}, seed {c.seed}. A picture's feature at a depth is the mean over its
tokens of the LayerNorm-ed output there; the levels of the hierarchy are the depths {', '.join(map(str, e.depths))}.

## With mlx-hjepa

```python
from mlx_hjepa.evaluate.export import load_exported

model = load_exported("path/to/this/folder")
z = model.features(images)           # uint8 (B, H, W, 3) -> float32 (B, {every}), every level
z = model.features(images, "last")   # (B, {e.dim})
```

## With timm

```python
import timm, torch

model = timm.create_model("local-dir:path/to/this/folder", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
x = transform(picture)[None]         # a PIL picture
z = model(x)                         # (1, {e.dim}), the same as "last"
h = model.forward_intermediates(x, indices={[d - 1 for d in e.depths]}, norm=True, output_fmt="NLC",
                                intermediates_only=True)
z = torch.cat([level.mean(1) for level in h], dim=1)  # (1, {every}), every level
```

## Accuracy

{_accuracy(run, about)}"""


def _accuracy(run: Run, about: dict[str, Any]) -> str:
    """evaluation/report.json as a table. Numbers of other weights are left out."""
    file = run.evaluation / "report.json"
    if not file.is_file():
        return "Not evaluated yet.\n"
    report = read_json(file)
    # a published folder's report is of the checkpoint that its weights were taken from
    same = run.published_weights or report.get("weights") == about["weights"]
    if not same or report.get("encoder") != about["encoder"]:
        return "Not evaluated: the run's report is of another checkpoint or encoder.\n"
    data = report["dataset"]
    lines = [f"Frozen encoder on {data['name']}, {data['train']:,} training and {data['test']:,} test pictures; top-1 "
             "and its 95 % interval.", "", "| features | level | k-NN | linear probe |", "|---|---|---|---|"]
    for name, levels in report["rows"].items():
        for level, scores in levels.items():
            lines.append(f"| {name} | {'-' if name == 'raw' else level} | {_percent(scores.get('knn'))} | "
                         f"{_percent(scores.get('linear'))} |")
    return "\n".join(lines) + "\n"


def _percent(score: dict[str, Any] | None) -> str:
    if not score:
        return "-"
    low, high = score["interval"]
    return f"{100 * score['accuracy']:.2f} % ({100 * low:.2f} to {100 * high:.2f})"


def embed(encoder: FrozenEncoder, pictures: Pictures, level: str | int = "levels",
          progress: Progress | None = None) -> np.ndarray:
    """Features of every picture, float32 (n, D), of a level as in FrozenEncoder.features."""
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress("embedding", done, len(pictures))

    return encoder.select(encoder.extract(pictures, np.arange(len(pictures)), progress=step), level)


def embed_folder(run: Run, folder: str | Path, out: str | Path, level: str | int = "levels", on_corrupt: str = "skip",
                 encoder: Which = "target", checkpoint: str = "latest", force: bool = False,
                 say: Callable[[str], None] = print, progress: Progress | None = None) -> Path:
    """Write the features of a folder's pictures, of whatever layout, to the NumPy archive `out`; returns its path.

    It holds features float32 (n, D), names (n,) relative to the folder, level and run. Raises UserError: `out` exists
    (unless `force`), no such level, no pictures, corrupt ones with on_corrupt "error".
    """
    out, level = Path(out).expanduser(), int(level) if str(level).isdigit() else level
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"{out}: not a file's name in an existing folder")
    if out.exists() and not force:
        raise UserError(f"{out}: already there. Remove it, give another name, or add --force")
    model = load(run.folder, encoder, checkpoint)
    if level not in ("last", "levels", *model.depths):
        raise UserError(f"level {level}: choose last, levels, or a depth of {model.depths}")
    data = config.section(config.Data, "embed", {
        "dataset": "folder", "root": str(folder), "image_size": model.config.data.image_size, "on_corrupt": on_corrupt,
        "threads": model.config.data.threads})
    found = load_folder(data, cache_folder(), say)
    parts = [part for part in (found.train, found.test) if part is not None]
    features = np.concatenate([embed(model, part, level, progress) for part in parts])
    check_features(features, f"{run.name}, pictures of {folder}")
    names = np.array([name for part in parts for name in part.names or []])
    _save(out, features=features, names=names, level=np.array(str(level)), run=np.array(run.name))
    say(f"{features.shape[0]:,} pictures, {features.shape[1]:,} numbers each; arrays features, names, level, run")
    return out


def _save(path: Path, **arrays: np.ndarray) -> None:
    """A NumPy archive, written whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
