"""One report of a run: raw pixels, the untrained encoder and the trained one in the same table."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_hjepa import backend, metrics
from mlx_hjepa.config import Augment, Data
from mlx_hjepa.data.augment import augment, normalise
from mlx_hjepa.data.dataset import Dataset, load_dataset
from mlx_hjepa.evaluate import Features, check_features
from mlx_hjepa.evaluate.features import FrozenEncoder, load, random_encoder, weights_file
from mlx_hjepa.evaluate.few_shot import episodes, few_labels
from mlx_hjepa.evaluate.fine_tune import fine_tune
from mlx_hjepa.evaluate.knn import HEADLINE, KS, knn_accuracy
from mlx_hjepa.evaluate.linear import augmented_probe, probe
from mlx_hjepa.evaluate.quality import quality
from mlx_hjepa.evaluate.subject import Progress, Splits, Subject, splits
from mlx_hjepa.model.vit import patchify, pooled_features
from mlx_hjepa.run import Run, UserError, digest, read_json, write_atomically

Say = Callable[[str], None]
TEMPERATURES = (0.03, 0.07, 0.1, 0.2)  # 0.07 is DINO's; lightly's table takes k 200, T 0.1


@dataclass(frozen=True)
class Protocols:
    """Which of them to run. fine_tune_epochs: (fine-tuning, from scratch), None for 100 and 200."""

    knn: bool = True
    linear: bool = True
    few_shot: bool = False
    quality: bool = False
    fine_tune: bool = False
    augmented: bool = False
    fine_tune_epochs: tuple[int, int] | None = None


@dataclass(frozen=True)
class Target:
    """What of a run is scored, and on which pictures; data: other pictures than it was trained on (transfer);
    validation: the held-out training pictures instead of the test set, to choose by."""

    encoder: Literal["target", "context"] = "target"
    checkpoint: str = "latest"
    subset: int | None = None
    data: Data | None = None
    validation: bool = False


def evaluate(run: Run, protocols: Protocols | None = None, what: Target | None = None, say: Say = print,
             progress: Progress | None = None) -> dict[str, Any]:
    """Score a run and write evaluation/report.json (report-<dataset>.json for other pictures than the run's own).

    Returns the report. Raises UserError.
    """
    protocols, what = protocols or Protocols(), what or Target()
    began, config = time.monotonic(), run.config
    trained = load(run.folder, what.encoder, what.checkpoint, last_four=True)
    dataset = load_dataset(what.data or config.data, say=say)
    if what.data is None and dataset.fingerprint != run.environment["dataset"]["fingerprint"]:
        say("note: the pictures are not those the run was trained on (another fingerprint)")
    split = splits(dataset, config.data.split_seed, what.subset, what.validation)
    split.check()
    if split.note:
        say(split.note)
    about = _about(run, what)
    cache = run.evaluation / "features"
    subjects = [Subject("raw", split, None, progress=progress)]
    for name, encoder in (("random", random_encoder(run)), ("trained", trained)):
        subjects.append(Subject(name, split, encoder, cache, f"{encoder.digest} {dataset.fingerprint}", progress))
    flip = config.augment.flip if what.data is None else what.data.dataset != "digits"
    rows: dict[str, Any] = {}
    for subject in subjects:
        say(f"scoring {subject.name} ...")
        rows[subject.name] = _score(subject, protocols, flip)
    report = {**about, "protocols": asdict(protocols), "dataset": _data(dataset, split, what), "classes": split.classes,
              "rows": rows, **_quality(subjects, protocols, say),
              **_with_labels(trained, split, protocols, say, progress)}
    report["seconds"] = round(time.monotonic() - began, 1)
    run.evaluation.mkdir(exist_ok=True)
    report = _with_earlier(report, run.evaluation / f"{report_name(report)}.json")
    write_atomically(run.evaluation / f"{report_name(report)}.json", json.dumps(report, indent=1))
    return report


def _with_earlier(report: dict[str, Any], file: Path) -> dict[str, Any]:
    """Scores of the same weights on the same pictures that another call made are kept; a report about others is moved
    aside under the name of its checkpoint."""
    if not file.exists():
        return report
    old = read_json(file)
    if any(old.get(k) != report[k] for k in ("weights", "encoder")) or old["dataset"] != report["dataset"]:
        aside = "-".join(filter(None, [file.stem, old.get("checkpoint", "published"),
                                       f"subset{old['dataset']['subset']}" if old["dataset"]["subset"] else ""]))
        os.replace(file, file.with_name(f"{aside}.json"))
        return report
    rows = {name: {level: old["rows"][name].get(level, {}) | scores for level, scores in levels.items()}
            for name, levels in report["rows"].items()}
    used = {k: v or report["protocols"][k] for k, v in old["protocols"].items()}
    commands = old["command"] if report["command"] in old["command"] else f"{old['command']}; {report['command']}"
    return old | report | {"rows": rows, "protocols": used, "command": commands,
                           "seconds": round(old["seconds"] + report["seconds"], 1)}


def report_name(report: dict[str, Any]) -> str:
    """report, with the data set's name for a transfer and the encoder's for the context encoder."""
    data = report["dataset"]
    return "-".join(["report", *([data["name"]] if data["transfer"] else []),
                     *(["context"] if report["encoder"] == "context" else []),
                     *(["validation"] if data["validation"] else [])])


def _about(run: Run, what: Target) -> dict[str, Any]:
    """Where the scores come from: everything needed to get them again."""
    config, environment = run.config, backend.environment()
    about = {"run": run.name, "preset": config.name, "encoder": what.encoder, "seed": config.seed,
             "epochs": config.training.epochs, "views": "masked-only", "device": backend.device(),
             "versions": environment["versions"], "commit": environment["commit"],
             "command": shlex.join(["mlx-hjepa", *sys.argv[1:]])}
    if run.published_weights:
        return about | {"weights": " ".join(map(digest, run.published_weights))}
    file = weights_file(what.encoder)
    folder = run.checkpoint(what.checkpoint, file)
    state = read_json(folder / "state.json")
    try:
        return about | {"checkpoint": folder.name, "step": state["step"], "train_seconds": round(state["seconds"], 1),
                        "pictures_seen": state["step"] * config.training.batch, "weights": state["digests"][file]}
    except KeyError as key:
        raise UserError(f"{folder / 'state.json'}: without {key}, so written by other code") from None


def _data(dataset: Dataset, split: Splits, what: Target) -> dict[str, Any]:
    return {"name": dataset.name, "note": dataset.note, "fingerprint": dataset.fingerprint,
            "train": len(split.train_rows), "test": len(split.test_rows), "subset": what.subset,
            "test_split": split.note or "test", "transfer": what.data is not None,
            "validation": what.validation}


def _score(subject: Subject, protocols: Protocols, mirror: bool) -> dict[str, Any]:
    """The protocols on each level of a subject; the untrained encoder's single depths are of no interest."""
    levels = subject.levels[:2]
    if subject.name == "trained":
        levels = [*subject.levels, "last4"] if len(subject.depths) > 1 else ["last", "last4"]
    return {str(level): _score_level(subject, level, protocols, mirror) for level in levels}


def _score_level(subject: Subject, level: str | int, protocols: Protocols, mirror: bool) -> dict[str, Any]:
    split = subject.split
    test, classes = subject.features("test", level), len(split.classes)
    check_features(test.plain, f"{subject.name} features, {level}")
    scores: dict[str, Any] = {"dim": test.plain.shape[1], "effective_rank": metrics.effective_rank(test.plain)}
    if protocols.knn:
        scores["knn"] = _knn(subject.features("train", level), test, classes)
    if protocols.linear:
        train = subject.features("train", level, mirror)
        result = probe(train, test, split.validation, classes)
        scores["linear"] = {
            "accuracy": result.accuracy, "interval": result.interval, "top5": result.top5, "lr": result.lr,
            "validation": {f"{lr:g}": a for lr, a in result.validation_accuracy.items()},
            "per_class": _plain(result.per_class), "confusion": result.confusion.tolist()}
        if protocols.augmented and subject.encoder and level in ("last", "levels"):
            scores["linear_augmented"] = _augmented(subject, subject.encoder, level, result.lr, mirror)
    if protocols.few_shot and level in ("last", "levels"):
        scores["few_shot"] = _few_shot(subject.features("train", level), test, classes)
    return scores


def _knn(train: Features, test: Features, classes: int) -> dict[str, Any]:
    ks = tuple(k for k in KS if k <= len(train.plain))
    result = knn_accuracy(train.plain, train.labels, test.plain, test.labels, classes, ks, TEMPERATURES)
    return {"accuracy": result.top1, "interval": result.interval, "top5": result.top5, "k": HEADLINE[0],
            "T": HEADLINE[1], "by_k": {str(k): result.accuracy[k, HEADLINE[1]] for k in ks},
            "sweep": [{"k": k, "T": t, "accuracy": a} for (k, t), a in result.accuracy.items()],
            "per_class": _plain(result.per_class)}


def _plain(values: np.ndarray) -> list[float | None]:
    """For JSON, which has no NaN: the accuracy of a class without test pictures is null."""
    return [None if np.isnan(v) else float(v) for v in values]


def _few_shot(train: Features, test: Features, classes: int) -> dict[str, Any]:
    """Both kinds; one that the data are too small for says so in its place."""
    found: dict[str, Any] = {}
    for name, run in (("episodes", lambda: episodes(test.plain, test.labels, classes)),
                      ("labels", lambda: few_labels(train, test, classes))):
        try:
            found[name] = run()
        except UserError as error:
            found[name] = {"skipped": str(error)}
    return found


def _augmented(subject: Subject, encoder: FrozenEncoder, level: str | int, lr: float, mirror: bool) -> dict[str, Any]:
    """The augmented linear probe with RandomResizedCrop 0.5 to 1 and, where the run took them, mirror images."""
    settings = Augment(crop="random_resized", scale=(0.5, 1.0), flip=mirror)
    size, patch = encoder.config.data.image_size, encoder.config.model.patch

    @mx.compile
    def features(images: mx.array, key: mx.array) -> mx.array:
        x = normalise(augment(images, size, settings, key), encoder.mean, encoder.std)
        found = pooled_features(encoder.encoder(encoder.weights, patchify(x, patch), fused=True))
        wanted = encoder.levels[-1:] if level == "last" else encoder.levels
        return mx.concatenate([found[:, encoder.depths.index(d)] for d in wanted], axis=1)

    split = subject.split
    return augmented_probe(features, subject.features("train", level), split.train, split.train_rows,
                           subject.features("test", level), len(split.classes), lr)


def _quality(subjects: list[Subject], protocols: Protocols, say: Say) -> dict[str, Any]:
    if not protocols.quality:
        return {}
    say("feature quality ...")
    count = max(2, min(1000, len(subjects[1].split.test_rows) // 4))
    untrained = quality(subjects[1], pictures=count)
    found = quality(subjects[2], untrained, pictures=count)
    return {"quality": {"random": untrained, "trained": found}, "verdict": found["verdict"], "reason": found["reason"]}


def _with_labels(encoder: FrozenEncoder, split: Splits, protocols: Protocols, say: Say,
                 progress: Progress | None) -> dict[str, Any]:
    if not protocols.fine_tune:
        return {}
    found = {}
    epochs = protocols.fine_tune_epochs or (None, None)
    for name, scratch, count in (("fine_tune", False, epochs[0]), ("scratch", True, epochs[1])):
        say("fine-tuning ..." if not scratch else "the same network from scratch ...")
        found[name] = fine_tune(encoder, split, count, scratch, encoder.config.seed, progress)
    return found
