#!/usr/bin/env python3
"""Publish an evaluated run under docs/results: `python tools/publish.py RUN [--weights]`.

Copies the configuration, the environment, the metrics (thinned when large), the report and its pictures, draws the
training curves, and enters the run in results.json. Refuses a run whose report lacks the raw or the random row.
--weights adds the target encoder as bf16 safetensors in shards of at most 16 MB, with their digests, which
`mlx_hjepa.load` reads.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click

import mlx_hjepa  # noqa: F401  (it chooses the BLAS before MLX is imported)
from mlx_hjepa.cli import friendly
from mlx_hjepa.evaluate.report import read_report
from mlx_hjepa.run import DIGESTS, Run, UserError, digest, read_arrays, read_json, write_atomically

ROWS = ("raw", "random", "trained")
SHARD_BYTES = 15_500_000
THINNED_BYTES = 500_000


@click.command(help=__doc__)
@click.argument("run")
@click.option("--weights", is_flag=True, help="Publish the target encoder's weights too.")
@click.option("--commit", help="The commit of the code that ran, where the run could not know it.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
@friendly
def main(run: str, weights: bool, commit: str | None, out: Path) -> None:
    source = Run.open(run)
    folder = out / source.name
    if source.published_weights or source.folder.resolve() == folder.resolve():
        raise UserError(f"{run}: published already. Give the run itself, a folder under results/")
    file = source.evaluation / "report.json"
    if not file.is_file():
        raise UserError(f"{run}: not evaluated yet; run: mlx-hjepa eval {run} --all")
    report = read_report(file)
    if not all({"linear", "knn"} <= report["rows"].get(name, {}).get("last", {}).keys() for name in ROWS):
        raise UserError(f"{run}: its report is not whole; run: mlx-hjepa eval {run} --knn --linear")
    if report["dataset"]["subset"]:
        raise UserError(f"{run}: it was scored on a subset only; run eval without --subset")
    file = "target.safetensors"
    encoder = source.checkpoint(report["checkpoint"], file) / file if weights else None
    folder.mkdir(parents=True, exist_ok=True)
    config = source.config
    data = config.data.model_copy(update={"root": None})  # a place on this machine; the environment has the command
    write_atomically(folder / source.config_file.name, config.model_copy(update={"data": data}).dump())
    shutil.copyfile(source.environment_file, folder / source.environment_file.name)
    write_atomically(folder / "metrics.jsonl", thinned(source.metrics_file.read_text()))
    (folder / "evaluation").mkdir(exist_ok=True)
    for file in sorted(source.evaluation.glob("*.*")):
        if file.suffix in (".json", ".md", ".png"):
            shutil.copyfile(file, folder / "evaluation" / file.name)
    curves(source, folder / "training_curves.png")
    if encoder:
        write_shards(encoder, folder / "weights")
    enter(out / "results.json", record(source, report, folder, out, commit))
    click.echo(f"published {source.name} in {folder}")


def record(run: Run, report: dict[str, Any], folder: Path, out: Path, commit: str | None) -> dict[str, Any]:
    """The run's entry in results.json (docs/results); accuracies in 0..1."""
    environment, rows = run.environment, report["rows"]
    whole = "levels" if "levels" in rows["trained"] else "last"
    score = {}
    for name in ROWS:
        chosen = rows[name]["last" if name == "raw" else whole]
        score[name] = {"linear": chosen["linear"]["accuracy"], "knn": chosen["knn"]["accuracy"]}
    last = rows["trained"]["last"]
    tuned = {name: report.get(name, {}).get("accuracy") for name in ("fine_tune", "scratch")}
    epochs = {f"{name}_epochs": report.get(name, {}).get("epochs") for name in tuned}
    shards = sorted((folder / "weights").glob("*.safetensors"))
    return {
        "name": run.name, "preset": run.config.name, "epochs": report["epochs"], "seed": report["seed"],
        "dataset": report["dataset"]["name"], "views": report["views"], **score["trained"],
        "linear_last": last["linear"]["accuracy"], "knn_last": last["knn"]["accuracy"],
        "effective_rank": last["effective_rank"], "dim": last["dim"], "random": score["random"], "raw": score["raw"],
        **tuned, **epochs, "supervised": tuned["scratch"],
        "encoder": report["encoder"], "weights": str((folder / "weights").relative_to(out)) if shards else None,
        "pictures_seen": report["pictures_seen"], "train_seconds": report["train_seconds"],
        "device": environment["name"], "versions": environment["versions"],
        "commit": commit or environment["commit"], "command": environment["command"],
        "files": sorted(str(f.relative_to(out)) for f in folder.rglob("*") if f.is_file())}


def enter(file: Path, entry: dict[str, Any]) -> None:
    """Put an entry into results.json, in place of an earlier one of that name."""
    records = [r for r in (read_json(file) if file.exists() else []) if r["name"] != entry["name"]]
    write_atomically(file, json.dumps(sorted([*records, entry], key=lambda r: r["name"]), indent=1) + "\n")


def thinned(text: str) -> str:
    """The metrics; when they are large, every n-th of the `train` lines and all others."""
    lines = text.splitlines(keepends=True)
    step = -(-len(text) // THINNED_BYTES)
    kept, seen = [], 0
    for line in lines:
        try:
            training = json.loads(line)["kind"] == "train"
        except json.JSONDecodeError:  # cut by a crash
            continue
        if not training or seen % step == 0:
            kept.append(line)
        seen += training
    return "".join(kept)


def write_shards(file: Path, folder: Path) -> None:
    """Weights as bf16 safetensors, each shard under SHARD_BYTES."""
    import mlx.core as mx

    weights = read_arrays(file)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shards: list[dict[str, mx.array]] = [{}]
    for name, weight in sorted(weights.items()):
        half = weight.astype(mx.bfloat16)
        if shards[-1] and sum(w.nbytes for w in shards[-1].values()) + half.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = half
    for i, shard in enumerate(shards, 1):
        mx.save_safetensors(str(folder / f"target-{i:02d}-of-{len(shards):02d}.safetensors"), shard, {"format": "mlx"})
    write_atomically(folder / DIGESTS, json.dumps({f.name: digest(f) for f in sorted(folder.iterdir())}, indent=1))


def curves(run: Run, out: Path) -> None:
    """Loss ratio, online k-NN, effective rank and speed over the epochs."""
    from mlx_hjepa.plots.curves import training_curves

    training_curves(run, out)


if __name__ == "__main__":
    main()
