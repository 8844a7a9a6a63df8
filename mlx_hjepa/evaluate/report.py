"""One report of a run: raw pixels, the untrained encoder and the trained one in the same table."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from mlx_hjepa import backend, metrics
from mlx_hjepa.data.dataset import Dataset, load_dataset
from mlx_hjepa.evaluate.features import load, random_encoder
from mlx_hjepa.evaluate.knn import KS, knn_accuracy
from mlx_hjepa.evaluate.linear import probe
from mlx_hjepa.evaluate.subject import Progress, Splits, Subject, splits
from mlx_hjepa.run import Run, digest, read_json, write_atomically

Say = Callable[[str], None]


def evaluate(run: Run, knn: bool = True, linear: bool = True, encoder: Literal["target", "context"] = "target",
             checkpoint: str = "latest", subset: int | None = None, say: Say = print,
             progress: Progress | None = None) -> dict[str, Any]:
    """Score a run and write evaluation/report.json. Returns the report. Raises UserError.

    subset: only so many training and test pictures, for slow machines; said in the report.
    """
    began, config = time.monotonic(), run.config
    trained = load(run.folder, encoder, checkpoint)
    dataset = load_dataset(config.data, say=say)
    split = splits(dataset, config.data.split_seed, subset)
    if split.note:
        say(split.note)
    about = _about(run, encoder, checkpoint)
    cache = run.evaluation / "features"
    subjects = [
        Subject("raw", split, None, progress=progress),
        Subject("random", split, random_encoder(run), cache, f"seed {config.seed} {dataset.fingerprint}", progress),
        Subject("trained", split, trained, cache, f"{about['weights']} {dataset.fingerprint}", progress),
    ]
    rows: dict[str, Any] = {}
    for subject in subjects:
        say(f"scoring {subject.name} ...")
        rows[subject.name] = _score(subject, split, knn, linear, config.augment.flip)
    report = {**about, "dataset": _data(dataset, split, subset), "classes": split.classes, "rows": rows,
              "seconds": round(time.monotonic() - began, 1)}
    run.evaluation.mkdir(exist_ok=True)
    write_atomically(run.evaluation / "report.json", json.dumps(report, indent=1))
    return report


def _about(run: Run, encoder: str, checkpoint: str) -> dict[str, Any]:
    """Where the scores come from: everything needed to get them again."""
    config = run.config
    about = {"run": run.name, "encoder": encoder, "seed": config.seed, "epochs": config.training.epochs,
             "views": "masked-only", "device": backend.device(), "versions": backend.environment()["versions"],
             "commit": backend.environment()["commit"], "command": shlex.join(["mlx-hjepa", *sys.argv[1:]])}
    if run.published_weights:
        return about | {"weights": digest(run.published_weights[0])}
    folder = run.checkpoint(checkpoint)
    state = read_json(folder / "state.json")
    seen = state["step"] * config.training.batch
    file = "target.safetensors" if encoder == "target" else "model.safetensors"
    return about | {"checkpoint": folder.name, "step": state["step"], "pictures_seen": seen,
                    "train_seconds": round(state["seconds"], 1), "weights": state["digests"][file]}


def _data(dataset: Dataset, split: Splits, subset: int | None) -> dict[str, Any]:
    return {"name": dataset.name, "note": dataset.note, "fingerprint": dataset.fingerprint, "train": len(split.train_rows),
            "test": len(split.test_rows), "subset": subset, "test_split": split.note or "test"}


def _score(subject: Subject, split: Splits, knn: bool, linear: bool, mirror: bool) -> dict[str, Any]:
    """The protocols on each level of a subject; the untrained encoder's single depths are of no interest."""
    levels = subject.levels if subject.name == "trained" else subject.levels[:2]
    found: dict[str, Any] = {}
    for level in levels:
        test = subject.features("test", level)
        scores: dict[str, Any] = {"dim": test.plain.shape[1], "effective_rank": metrics.effective_rank(test.plain)}
        if knn:
            scores["knn"] = _knn(subject.features("train", level), test, len(split.classes))
        if linear:
            result = probe(subject.features("train", level, mirror), test, split.validation, len(split.classes))
            scores["linear"] = {
                "accuracy": result.accuracy, "interval": result.interval, "top5": result.top5, "lr": result.lr,
                "validation": {f"{lr:g}": a for lr, a in result.validation_accuracy.items()},
                "per_class": result.per_class.tolist(), "confusion": result.confusion.tolist()}
        found[str(level)] = scores
    return found


def _knn(train: Any, test: Any, classes: int) -> dict[str, Any]:
    ks = tuple(k for k in KS if k <= len(train.plain))
    result = knn_accuracy(train.plain, train.labels, test.plain, test.labels, classes, ks)
    return {"accuracy": result.top1, "interval": result.interval, "top5": result.top5, "k": 20, "T": 0.07,
            "by_k": {str(k): result.accuracy[k, 0.07] for k in ks}, "per_class": result.per_class.tolist()}


def table(report: dict[str, Any]) -> Table:
    """The report as a table for the terminal."""
    data = report["dataset"]
    out = Table(title=f"{report['run']}: {data['name']}, {data['test']:,} test pictures, {report['encoder']} encoder")
    for heading in ("features", "level", "k-NN, k 20", "linear probe", "effective rank"):
        out.add_column(heading, justify="left" if heading in ("features", "level") else "right")
    for name, levels in report["rows"].items():
        for level, scores in levels.items():
            cells = [_percent(scores.get(protocol)) for protocol in ("knn", "linear")]
            shown = "-" if name == "raw" else f"depth {level}" if level.isdigit() else level
            out.add_row(name, shown, *cells, f"{scores['effective_rank']:.0f} of {scores['dim']}")
        out.add_section()
    return out


def _percent(score: dict[str, Any] | None) -> str:
    if not score:
        return "-"
    low, high = score["interval"]
    return f"{100 * score['accuracy']:.1f} ± {50 * (high - low):.1f} %"


def report_file(run: Run) -> Path:
    return run.evaluation / "report.json"
