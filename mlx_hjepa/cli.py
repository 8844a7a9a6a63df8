"""The commands. Each is a few lines that call the package."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from mlx_hjepa import __version__
from mlx_hjepa.config import ConfigError, Data, load
from mlx_hjepa.run import Run, UserError

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for a program to read.")


def friendly(command: Callable) -> Callable:
    """A user's mistake becomes one or two lines and exit status 2."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (UserError, ConfigError) as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)

    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
def main() -> None:
    """Train and evaluate H-JEPA, a hierarchical joint-embedding predictive architecture, with MLX."""


@main.command()
@click.argument("config")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
              help="Override a key, such as training.lr=1e-3.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of this run.")
@click.option("--keep-awake", is_flag=True, help="Keep a Mac from sleeping while it trains.")
@friendly
def train(config: str, overrides: tuple[str, ...], resume: bool, keep_awake: bool) -> None:
    """Train by CONFIG, a YAML file, or with --resume a run's folder. Ctrl-C saves and stops."""
    from mlx_hjepa import backend
    from mlx_hjepa.train import trainer

    if Path(config).is_dir():
        run = Run.open(config)
        settings = load(run.config_file, overrides)
        if not resume:
            raise UserError(f"{config} is a run. Go on with it: --resume. Start a new one: give its config.yaml")
    else:
        settings = load(config, overrides)
        run = Run.newest(settings.name) if resume else Run.create(settings)
    if resume:
        trainer.same_run(settings, run)
    with backend.keep_awake(click.echo) if keep_awake else contextlib.nullcontext():
        try:
            trainer.train(settings, run, resume)
        finally:
            if not resume:
                run.remove_if_empty()


@main.command("eval")
@click.argument("run", required=False)
@click.option("--knn", is_flag=True, help="k-nearest neighbours.")
@click.option("--linear", is_flag=True, help="Linear probe.")
@click.option("--checkpoint", default="latest", help="latest, best, or a checkpoint's folder.")
@click.option("--encoder", type=click.Choice(["target", "context"]), default="target", help="Which encoder to score.")
@click.option("--subset", type=click.IntRange(min=100), help="Score only so many pictures of each split.")
@as_json
@friendly
def evaluate(run: str | None, knn: bool, linear: bool, checkpoint: str, encoder: str, subset: int | None,
             as_json: bool) -> None:
    """Score RUN, the newest by default, beside raw pixels and its untrained encoder. Without a protocol: both."""
    from mlx_hjepa.evaluate import report

    chosen = Run.open(run) if run else Run.newest()
    console = Console(stderr=True)
    shown = console.is_terminal
    with console.status("") as status:
        result = report.evaluate(
            chosen, knn or not linear, linear or not knn, encoder, checkpoint, subset,  # type: ignore[arg-type]
            say=lambda text: console.print(text, highlight=False, markup=False),
            progress=(lambda what, done, of: status.update(f"{what} {done:,} of {of:,}")) if shown else None)
    if as_json:
        click.echo(json.dumps(result))
    else:
        Console(width=None if sys.stdout.isatty() else 100).print(report.table(result))
        click.echo(f"{result['seconds']:.0f} s; written to {report.report_file(chosen)}")


@main.command()
@click.option("--dataset", type=click.Choice(["cifar10", "cifar100", "digits", "folder"]), default="cifar10")
@click.option("--root", help="An unpacked archive, or a folder of pictures.")
@click.option("--on-corrupt", type=click.Choice(["error", "skip"]), default="error",
              help="What a corrupt picture does.")
@as_json
@friendly
def data(dataset: str, root: str | None, on_corrupt: str, as_json: bool) -> None:
    """Fetch a data set, check it, and say what it holds."""
    from mlx_hjepa.config import section
    from mlx_hjepa.data.dataset import describe, load_dataset

    settings = section(Data, "data", {"dataset": dataset, "root": root, "on_corrupt": on_corrupt})
    facts = describe(load_dataset(settings, say=lambda text: click.echo(text, err=True)))
    _print(facts, as_json)


@main.command()
@as_json
@friendly
def doctor(as_json: bool) -> None:
    """Check this machine: MLX, its back-end, the compiler, memory, disk, the data cache."""
    from mlx_hjepa import backend

    device, findings = backend.device(), backend.doctor()
    if as_json:
        click.echo(json.dumps({"device": device, "findings": [f._asdict() for f in findings]}))
    else:
        _print(device, False)
        for finding in findings:
            click.echo(f"{finding.level:>5}  {finding.what}" + (f"\n       {finding.advice}" if finding.advice else ""))
    if any(f.level == "error" for f in findings):
        sys.exit(1)


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:>{width}}  {', '.join(map(str, value)) if isinstance(value, list) else value}")


if __name__ == "__main__":
    main()
