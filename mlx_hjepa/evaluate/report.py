"""One report of a run: raw pixels, the untrained encoder and the trained one in the same table."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_hjepa import backend, metrics
from mlx_hjepa.config import Augment, Config, Data
from mlx_hjepa.data.augment import augment, normalise
from mlx_hjepa.data.dataset import Dataset, load_dataset
from mlx_hjepa.evaluate import check_features
from mlx_hjepa.evaluate.features import load, random_encoder, weights_file
from mlx_hjepa.evaluate.few_shot import episodes, few_labels
from mlx_hjepa.evaluate.fine_tune import fine_tune
from mlx_hjepa.evaluate.knn import HEADLINE, KS, knn_accuracy, whitening
from mlx_hjepa.evaluate.linear import augmented_probe, probe
from mlx_hjepa.evaluate.quality import quality
from mlx_hjepa.evaluate.subject import Progress, Splits, Subject, mirrored, splits
from mlx_hjepa.evaluate.summary import Report, markdown
from mlx_hjepa.model.vit import patchify, pooled_features
from mlx_hjepa.run import Run, UserError, digest, read_json, write_atomically

Say = Callable[[str], None]
CARRIED = ("checkpoint", "step", "train_seconds", "pictures_seen")  # a published report knows them, its weights do not
TEMPERATURES = (0.03, 0.07, 0.1, 0.2)  # 0.07 is DINO's; lightly's table takes k 200, T 0.1


@dataclass(frozen=True)
class Protocols:
    """Which of them to run. context: k-NN and linear probe of the context encoder too, beside the target encoder.
    fine_tune_epochs: (fine-tuning, from scratch), None for 100 and 200; 0 leaves one of the two out. fine_tune_size:
    pixels a side of the pictures that both learn from, None for the run's."""

    knn: bool = True
    linear: bool = True
    few_shot: bool = False
    quality: bool = False
    fine_tune: bool = False
    augmented: bool = False
    context: bool = False
    fine_tune_epochs: tuple[int, int] | None = None
    fine_tune_size: int | None = None


@dataclass(frozen=True)
class Target:
    """What of a run is scored, and on which pictures; data: other pictures than the configuration names, or another
    place of them; validation: the held-out training pictures instead of the test set, to choose by."""

    encoder: Literal["target", "context"] = "target"
    checkpoint: str = "latest"
    subset: int | None = None
    data: Data | None = None
    validation: bool = False


def evaluate(run: Run, protocols: Protocols | None = None, what: Target | None = None, say: Say = print,
             progress: Progress | None = None) -> Report:
    """Score a run and write its report under `run.scored`, after each protocol anew: an interruption costs only one.
    `summary.write` adds the pictures.

    The file's name says what was scored (see `_name`). What an earlier call found for the same weights and pictures is
    kept; `protocols` has each one's seconds (loading and features count for the first that needs them), commit, device
    and command, the top level those of the last call; `seconds` is their sum. Returns the report. Raises UserError.
    """
    protocols, what = protocols or Protocols(), what or Target()
    began = time.monotonic()
    trained = load(run.folder, what.encoder, what.checkpoint, last_four=True)
    checkpoint = None if run.published_weights else run.checkpoint(what.checkpoint, weights_file(what.encoder))
    report = _about(run, what, checkpoint)
    dataset, split, facts = _pictures(run, what, say)
    report |= {"dataset": facts, "classes": split.classes}
    report["name"] = _name(run, report, checkpoint)
    file = run.scored / f"{report['name']}.json"
    if file.exists() and _alike(earlier := read_report(file), report):
        report = earlier | report
    report = Report(protocols={}, rows={}, seconds=0.0) | report
    encoders = {"random": random_encoder(run), "trained": trained}
    if what.encoder == "target" and checkpoint and (checkpoint / weights_file("context")).exists() and (
            protocols.context or "context" in report["rows"]):
        encoders["context"] = load(run.folder, "context", what.checkpoint)
    elif protocols.context and what.encoder == "target":
        say("the context encoder's weights are not here: left out")
    subjects = [Subject("raw", split, None, progress=progress)]
    for name, encoder in encoders.items():
        key = f"{encoder.digest} {dataset.fingerprint}"
        subjects.append(Subject(name, split, encoder, run.scored / "features", key, progress))
    for name in _run(report, subjects, protocols, mirrored(run.config, dataset), say):
        now = time.monotonic()
        report["protocols"][name] = {"seconds": round(now - began, 1), "commit": report["commit"],
                                     "device": report["device"]["name"], "command": report["command"]}
        began = now
        _write(file, report)
        write_atomically(file.with_suffix(".md"), markdown(run, report))
    return report


def _name(run: Run, report: Report, checkpoint: Path | None) -> str:
    """The file's: report, and what differs from the target encoder of the newest checkpoint on the run's own test set:
    the data (a folder's fingerprint too), context, validation, the subset, the checkpoint."""
    data, latest = report["dataset"], run.checkpoints / "latest"
    newest = checkpoint is None or (latest.is_file() and latest.read_text().strip() == checkpoint.name)
    parts = ["report", data["name"] if data["transfer"] else None,
             data["fingerprint"][:8] if data["transfer"] and data["name"] == "folder" else None,
             "context" if report["encoder"] == "context" else None, "validation" if data["validation"] else None,
             f"subset{data['subset']}" if data["subset"] else None, None if newest else report["checkpoint"]]
    return "-".join(part for part in parts if part)


def read_report(file: Path) -> Report:
    """A report, of this code or an older one. Raises UserError for anything else."""
    report = read_json(file)
    if not isinstance(report, dict) or not all(isinstance(report.get(key), dict) for key in ("rows", "dataset")):
        raise UserError(f"{file}: not a report of mlx-hjepa. Move it away")
    return report


def published(run: Run) -> Report | None:
    """A published run's report, if it is of this code. Raises UserError."""
    file = run.evaluation / "report.json"
    if not run.published or not file.is_file():
        return None
    report = read_report(file)
    return report if {"recipe", "preset", "protocols"} <= report.keys() else None


def _alike(earlier: Report, report: Report) -> bool:
    """Whether both are of the same weights and pictures, and the earlier one says of each protocol how it ran."""
    ran = earlier.get("protocols")
    known = isinstance(ran, dict) and all(isinstance(how, dict) for how in ran.values())
    same = all(earlier["dataset"].get(k) == report["dataset"][k] for k in ("fingerprint", "train", "test"))
    return known and same and earlier.get("weights") == report["weights"]


def _write(file: Path, report: Report) -> None:
    """Write the report, with what another `eval` of the same weights has put there meanwhile; a report of other weights
    that has its name is first moved aside, to a name that is free."""
    file.parent.mkdir(parents=True, exist_ok=True)
    earlier = read_report(file) if file.exists() else None
    if earlier and _alike(earlier, report):
        for name, levels in earlier["rows"].items():
            for level, scores in levels.items():
                own = report["rows"].setdefault(name, {})
                own[level] = scores | own.get(level, {})
        report["protocols"] = earlier["protocols"] | report["protocols"]
        report.update({key: value for key, value in earlier.items() if key not in report})
    elif earlier:
        aside = f"{file.stem}-{earlier.get('checkpoint', 'published')}"
        names = itertools.chain([aside], (f"{aside}-{i}" for i in itertools.count(2)))
        os.replace(file, next(p for p in (file.with_name(f"{n}.json") for n in names) if not p.exists()))
    report["seconds"] = round(sum(p["seconds"] for p in report["protocols"].values()), 1)
    write_atomically(file, json.dumps(report, indent=1))


def _about(run: Run, what: Target, checkpoint: Path | None) -> Report:
    """Where the scores come from: everything needed to get them again."""
    config, environment = run.config, backend.environment()
    about = {"run": run.name, "preset": config.name, "recipe": _recipe(config), "encoder": what.encoder,
             "seed": config.seed, "epochs": config.training.epochs, "views": "masked-only", "device": backend.device(),
             "versions": environment["versions"], "commit": environment["commit"],
             "command": shlex.join(["mlx-hjepa", *sys.argv[1:]])}
    if checkpoint is None:
        file = run.evaluation / "report.json"
        known = read_report(file) if file.exists() else _ended(run)
        return about | {"weights": " ".join(map(digest, run.published_weights))} | {
            key: known[key] for key in CARRIED if key in known}
    state = read_json(checkpoint / "state.json")
    try:
        return about | {"checkpoint": checkpoint.name, "step": state["step"],
                        "train_seconds": round(state["seconds"], 1),
                        "pictures_seen": state["step"] * config.training.batch,
                        "weights": state["digests"][weights_file(what.encoder)]}
    except KeyError as key:
        raise UserError(f"{checkpoint / 'state.json'}: without {key}, so written by other code") from None


def _ended(run: Run) -> dict[str, Any]:
    """What the metrics say of a run's end; nothing where it did not come to one."""
    lines = run.metrics_file.read_text().splitlines() if run.metrics_file.exists() else []
    ends = [line for line in map(json.loads, lines) if line["kind"] == "end"]
    return {"step": ends[-1]["step"], "train_seconds": round(ends[-1]["seconds"], 1),
            "pictures_seen": ends[-1]["pictures_seen"]} if ends else {}


def _recipe(config: Config) -> str:
    """A digest of what two runs must share to differ in their seed alone."""
    values = config.model_dump(mode="json", exclude={"name": True, "seed": True, "logging": True, "checkpoints": True,
                                                     "data": {"root"}})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _pictures(run: Run, what: Target, say: Say) -> tuple[Dataset, Splits, dict[str, Any]]:
    """The data set, what of it is scored, and the facts about both for the report. Raises UserError."""
    dataset = load_dataset(what.data or run.config.data, say=say)
    trained_on = run.environment["dataset"].get("fingerprint")  # `load` has found mean and std beside it
    if not trained_on:
        raise UserError(f"{run.environment_file}: without the data's fingerprint, so written by other code")
    transfer = dataset.fingerprint != trained_on
    if transfer:
        say("note: the pictures are not those the run was trained on (another fingerprint)")
    split = splits(dataset, run.config.data.split_seed, what.subset, what.validation)
    split.check()
    if split.note:
        say(split.note)
    return dataset, split, {
        "name": dataset.name, "note": dataset.note, "fingerprint": dataset.fingerprint, "train": len(split.train_rows),
        "test": len(split.test_rows), "subset": what.subset, "test_split": split.note or "test", "transfer": transfer,
        "validation": what.validation, "leaked": split.leaked}


def _run(report: Report, subjects: list[Subject], protocols: Protocols, flip: bool, say: Say) -> Iterator[str]:
    """Run what was asked for into the report, the quickest first; yields the name of each protocol when it is done."""
    every = [(subject, level) for subject in subjects for level in _levels(subject)]
    trained, whole = subjects[2], ("last", "levels")
    say("features ...")
    for subject, level in every:
        test = subject.features("test", level).plain
        check_features(test, f"{subject.name} features, {level}")
        _scores(report, subject, level).update(dim=test.shape[1], effective_rank=metrics.effective_rank(test))
    if protocols.knn:
        say("k-NN ...")
        for subject, level in every:
            _scores(report, subject, level)["knn"] = _knn(subject, level)
        yield "knn"
    if protocols.linear:
        say("linear probe ...")
        for subject, level in every:
            _scores(report, subject, level)["linear"] = _linear(subject, level, flip)
        yield "linear"
    if protocols.few_shot:
        say("few-shot ...")
        for subject, level in every:
            if subject.name != "context" and level in whole:
                _scores(report, subject, level)["few_shot"] = _few_shot(subject, level)
        yield "few_shot"
    if protocols.quality:
        say("feature quality ...")
        report |= _quality(subjects)
        yield "quality"
    if protocols.augmented:
        say("linear probe on fresh crops ...")
        levels: list[str | int] = [level for level in _levels(trained) if level in whole]
        scores = [_scores(report, trained, level) for level in levels]
        rates = [s["linear"]["lr"] for s in scores]
        for own, found in zip(scores, _augmented(trained, levels, rates, flip), strict=True):
            own["linear_augmented"] = found
        yield "augmented"
    epochs = protocols.fine_tune_epochs or (None, None)
    for name, count, said in zip(("fine_tune", "scratch"), epochs, ("fine-tuning", "the same network from scratch"),
                                 strict=True):
        if protocols.fine_tune and count != 0 and trained.encoder:
            say(f"{said} ...")
            report[name] = fine_tune(trained.encoder, trained.split, flip, count, name == "scratch", report["seed"],
                                     trained.progress, size=protocols.fine_tune_size)
            yield name


def _levels(subject: Subject) -> list[str | int]:
    """What is scored of a subject: of the untrained and the context encoder no single depth."""
    if subject.name != "trained":
        return subject.levels[:2]
    return [*subject.levels, "last4"] if len(subject.depths) > 1 else ["last", "last4"]


def _scores(report: Report, subject: Subject, level: str | int) -> dict[str, Any]:
    return report["rows"].setdefault(subject.name, {}).setdefault(str(level), {})


def _told(subject: Subject, level: str | int) -> Progress | None:
    """The subject's progress, which names the level too."""
    told = subject.progress
    return told and (lambda what, done, of: told(f"{what}: {subject.name}, {level}", done, of))


def _knn(subject: Subject, level: str | int) -> dict[str, Any]:
    train, test = subject.features("train", level), subject.features("test", level)
    ks = tuple(k for k in KS if k <= len(train.plain))
    result = knn_accuracy(train.plain, train.labels, test.plain, test.labels, len(subject.split.classes), ks,
                          TEMPERATURES, progress=_told(subject, level))
    white = {"whitened": _whitened(subject, level)} if subject.encoder and level in ("last", "levels") else {}
    return {**white, "accuracy": result.top1, "interval": result.interval, "top5": result.top5, "k": HEADLINE[0],
            "T": HEADLINE[1], "by_k": {str(k): result.accuracy[k, HEADLINE[1]] for k in ks},
            "sweep": [{"k": k, "T": t, "accuracy": a} for (k, t), a in result.accuracy.items()],
            "per_class": _plain(result.per_class)}


def _whitened(subject: Subject, level: str | int) -> dict[str, Any]:
    """k-NN after PCA whitening to the encoder's width: beside the headline, never in its place."""
    train, test = subject.features("train", level), subject.features("test", level)
    assert subject.encoder is not None
    white = whitening(train.plain, subject.encoder.dim)
    bank, queries = white(train.plain), white(test.plain)
    k = min(HEADLINE[0], len(bank))
    result = knn_accuracy(bank, train.labels, queries, test.labels, len(subject.split.classes), (k,),
                          headline=(k, HEADLINE[1]))
    return {"accuracy": result.top1, "interval": result.interval, "dims": bank.shape[1]}


def _linear(subject: Subject, level: str | int, flip: bool) -> dict[str, Any]:
    split = subject.split
    result = probe(subject.features("train", level, flip), subject.features("test", level), split.validation,
                   len(split.classes), progress=_told(subject, level))
    return {"accuracy": result.accuracy, "interval": result.interval, "top5": result.top5, "lr": result.lr,
            "validation": {f"{lr:g}": a for lr, a in result.validation_accuracy.items()},
            "per_class": _plain(result.per_class), "confusion": result.confusion.tolist()}


def _plain(values: np.ndarray) -> list[float | None]:
    """For JSON, which has no NaN: the accuracy of a class without test pictures is null."""
    return [None if np.isnan(v) else float(v) for v in values]


def _few_shot(subject: Subject, level: str | int) -> dict[str, Any]:
    """Both kinds; one that the data are too small for says so in its place."""
    train, test = subject.features("train", level), subject.features("test", level)
    classes, told = len(subject.split.classes), _told(subject, level)
    found: dict[str, Any] = {}
    for name, run in (("episodes", lambda: episodes(test.plain, test.labels, classes, progress=told)),
                      ("labels", lambda: few_labels(train, test, classes, progress=told))):
        try:
            found[name] = run()
        except UserError as error:
            found[name] = {"skipped": str(error)}
    return found


def _augmented(subject: Subject, levels: list[str | int], lrs: list[float], flip: bool) -> list[dict[str, Any]]:
    """The augmented linear probe with RandomResizedCrop 0.5 to 1 and, where the run took them, mirror images."""
    encoder, split = subject.encoder, subject.split
    assert encoder
    settings = Augment(crop="random_resized", scale=(0.5, 1.0), flip=flip)
    size, patch = encoder.config.data.image_size, encoder.config.model.patch
    wanted = [encoder.levels[-1:] if level == "last" else encoder.levels for level in levels]

    @mx.compile
    def features(images: mx.array, key: mx.array) -> list[mx.array]:
        x = normalise(augment(images, size, settings, key), encoder.mean, encoder.std)
        found = pooled_features(encoder.encoder(encoder.weights, patchify(x, patch), fused=True))
        return [mx.concatenate([found[:, encoder.depths.index(d)] for d in depths], axis=1) for depths in wanted]

    train, test = ([subject.features(which, level) for level in levels] for which in ("train", "test"))
    return augmented_probe(features, train, split.train, split.train_rows, test, len(split.classes), lrs,
                           progress=subject.progress)


def _quality(subjects: list[Subject]) -> dict[str, Any]:
    count = max(2, min(1000, len(subjects[1].split.test_rows) // 4))
    untrained = quality(subjects[1], pictures=count)
    found = quality(subjects[2], untrained, pictures=count)
    return {"quality": {"random": untrained, "trained": found}, "verdict": found["verdict"], "reason": found["reason"]}
