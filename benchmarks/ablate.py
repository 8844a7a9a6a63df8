#!/usr/bin/env python3
"""Run a list of changes to one preset side by side, and put them in one table.

    python benchmarks/ablate.py configs/vit_wide_20ep.yaml ladder.yaml --jobs 3 --seeds 0,1

ladder.yaml maps a name to its overrides, as in `{base: [], blocks: [masking.select=blocks]}`. Each (name, seed) is
an ordinary run of `mlx-hjepa train` with data.hold_out, then scored on the pictures held out of it by the protocols of
`eval --validation`, the trained encoder alone, never on the test set. `seen` is the linear probe on pictures that it
did not learn from either, but the encoder did: how much better it is there is what the encoder knows by heart. A run
that is finished is not run again, one cut off is resumed. Writes results/ablations/<ladder>.json, anew after each run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import mlx_hjepa  # noqa: F401  (it chooses the BLAS before MLX is imported)
from mlx_hjepa.cli import friendly
from mlx_hjepa.config import load as load_config
from mlx_hjepa.config import parse_yaml
from mlx_hjepa.data.dataset import load_dataset
from mlx_hjepa.evaluate.features import load
from mlx_hjepa.evaluate.knn import HEADLINE, knn_accuracy
from mlx_hjepa.evaluate.linear import probe
from mlx_hjepa.evaluate.subject import Subject, mirrored, splits
from mlx_hjepa.metrics import effective_rank
from mlx_hjepa.run import RESULTS, Run, UserError, read_json, write_atomically
from mlx_hjepa.train.trainer import same_run

COLUMNS = (("knn", "levels"), ("linear", "levels"), ("seen", "levels"), ("knn", "last"), ("linear", "last"))
SCORE = "--score-of"  # a process of its own for each run


@click.command(help=__doc__)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("ladder", type=click.Path(path_type=Path))
@click.option("--jobs", default=3, show_default=True, help="Runs at a time on the one accelerator.")
@click.option("--seeds", default="0", show_default=True, help="Comma-separated.")
@click.option("--set", "common", multiple=True, metavar="KEY=VALUE", help="Overrides of every run.")
@friendly
def main(config: Path, ladder: Path, jobs: int, seeds: str, common: tuple[str, ...]) -> None:
    changes = _changes(ladder)
    common = ("data.hold_out=true", *common)
    work = [(name, int(seed), [*common, *changes[name]]) for seed in seeds.split(",") for name in changes]
    for name, seed, overrides in work:  # every mistake before any work
        settings = load_config(config, [*overrides, f"seed={seed}", f"name={_run_name(ladder, name, seed)}"])
        if (run := Run(RESULTS / settings.name)).config_file.exists():
            same_run(settings, run)
    rows, out = [], RESULTS / "ablations" / f"{ladder.stem}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        scores = pool.map(lambda w: _score(config, ladder, *w), work)
        for (name, seed, overrides), found in zip(work, scores, strict=True):
            rows.append({"name": name, "seed": seed, "overrides": overrides, **found})
            write_atomically(out, json.dumps({"config": str(config), "rows": rows}, indent=1))
    Console(width=None if sys.stdout.isatty() else 110).print(_table(ladder.stem, rows))
    click.echo(f"written to {out}")


def _changes(ladder: Path) -> dict[str, list[str]]:
    try:
        changes = parse_yaml(ladder.read_text())
    except OSError as error:
        raise UserError(f"{ladder}: cannot be read ({error.strerror})") from None
    if not isinstance(changes, dict) or not all(isinstance(v, list) for v in changes.values()):
        raise UserError(f"{ladder}: write it as  name: [section.key=value, ...]")
    return changes


def _run_name(ladder: Path, name: str, seed: int) -> str:
    return f"{ladder.stem}-{name}-s{seed}"


def _score(config: Path, ladder: Path, name: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Train where needed, score where needed; what failed says so in its row and stops nothing else."""
    run = Run(RESULTS / _run_name(ladder, name, seed))
    sets = [part for o in (*overrides, f"seed={seed}", f"name={run.name}") for part in ("--set", o)]
    if not _finished(run):
        again = ["--resume"] if run.config_file.exists() else []
        failed = _run(["-m", "mlx_hjepa.cli", "train", str(config), *sets, *again])
        if failed or not _finished(run):
            return {"failed": failed or "interrupted"}
    file = run.evaluation / "ablation.json"
    if not file.exists():
        failed = _run([__file__, SCORE, str(run.folder)])
        if failed:
            return {"failed": failed}
    return read_json(file)


def score(run: Run) -> None:
    """Write evaluation/ablation.json: k-NN and linear accuracy on the held-out pictures, rank, training time."""
    dataset = load_dataset(run.config.data)
    split = splits(dataset, run.config.data.split_seed, held_out=True)
    subject, classes = Subject("trained", split, load(run.folder)), len(split.classes)
    flip = mirrored(run.config, dataset)
    found: dict[str, Any] = {}
    for level in ("last", "levels"):
        train, test = subject.features("train", level, flip), subject.features("test", level)
        k = min(HEADLINE[0], len(train.plain))
        found[f"knn_{level}"] = knn_accuracy(train.plain, train.labels, test.plain, test.labels, classes, (k,),
                                             headline=(k, HEADLINE[1])).top1
        linear = probe(train, test, split.validation, classes)
        found |= {f"linear_{level}": linear.accuracy, f"seen_{level}": max(linear.validation_accuracy.values())}
    last = subject.features("test", "last").plain
    seconds = json.loads(run.metrics_file.read_text().splitlines()[-1])["seconds"]
    run.evaluation.mkdir(exist_ok=True)
    write_atomically(run.evaluation / "ablation.json", json.dumps(
        found | {"effective_rank": effective_rank(last), "train_seconds": seconds}))


def _finished(run: Run) -> bool:
    if not run.metrics_file.exists():
        return False
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines() if line.endswith("}")]
    return any(line["kind"] == "end" and line["finished"] for line in lines)


def _run(arguments: list[str]) -> str | None:
    """None when Python did it, else the end of what it said."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr or done.stdout).strip()[-300:]


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Mean over the seeds, with their spread, and the step from the first row."""
    out = Table(title=f"{title}: held-out pictures, %; step from the first row")
    for heading in ("change", *(f"{p} {level}" for p, level in COLUMNS), "rank last", "train s"):
        out.add_column(heading, justify="left" if heading == "change" else "right")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["name"], []).append(row)
    base: dict[str, float] = {}
    for name, group in groups.items():
        good = [row for row in group if "failed" not in row]
        if not good:
            out.add_row(name, f"failed: {group[0]['failed'].splitlines()[-1]}")
            continue
        cells = []
        for key in (f"{p}_{level}" for p, level in COLUMNS):
            values = [100 * row[key] for row in good]
            step = mean(values) - base.setdefault(key, mean(values))
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread} ({step:+.1f})")
        out.add_row(name, *cells, f"{mean(r['effective_rank'] for r in good):.0f}",
                    f"{mean(r['train_seconds'] for r in good):.0f}")
    return out


if __name__ == "__main__":
    if sys.argv[1:2] == [SCORE]:
        score(Run(sys.argv[2]))
    else:
        main()
