"""The commands. Each is a few lines that call the package."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mlx_hjepa import __version__
from mlx_hjepa.config import ConfigError, Data, load
from mlx_hjepa.run import Run, UserError

DATASETS = click.Choice(["cifar10", "cifar100", "digits", "folder"])
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for a program to read.")


def friendly(command: Callable) -> Callable:
    """A user's mistake becomes one or two lines and exit status 2."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (UserError, ConfigError) as error:
            click.echo(f"error: {error}", err=True)
        except BrokenPipeError:
            raise
        except OSError as error:  # a full disk, a folder without permission
            where = f"{error.filename}: " if error.filename else ""
            click.echo(f"error: {where}{error.strerror or error}", err=True)
        except ImportError as error:
            if not (error.name or "").startswith("mlx"):
                raise
            click.echo(f"error: MLX does not load ({error}).\nSee what is missing: mlx-hjepa doctor", err=True)
        sys.exit(2)

    return wrapped


def _show(error: click.UsageError, _: Any = None) -> None:
    """Click prints four lines."""
    see = f"\nSee: {error.ctx.command_path} --help" if error.ctx else ""
    click.echo(f"error: {error.format_message()}{see}", err=True)


setattr(click.UsageError, "show", _show)  # noqa: B010


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
    """Train by CONFIG, a YAML file, or with --resume a run's folder or name. Ctrl-C saves and stops."""
    from mlx_hjepa import backend
    from mlx_hjepa.train import trainer

    given = Path(config)
    if resume and given.name == "config.yaml" and (given.parent / "checkpoints").is_dir():
        given = given.parent
    if given.is_dir() or (resume and not given.exists()):
        run = Run.open(given)
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
            trainer.train(settings, run, resume, again=lambda: _resume_anew(run))
        finally:
            if not resume:
                run.remove_if_empty()


def _resume_anew(run: Run) -> None:
    """Replace this process, threads and all, by one that resumes the run."""
    os.execv(sys.executable, [sys.executable, "-m", "mlx_hjepa.cli", "train", str(run.folder), "--resume"])


@main.command("eval")
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option("--knn", is_flag=True, help="k-nearest neighbours.")
@click.option("--linear", is_flag=True, help="Linear probe.")
@click.option("--few-shot", is_flag=True, help="Few-shot episodes, and a few labels a class.")
@click.option("--quality", is_flag=True, help="Feature quality and its verdict.")
@click.option("--fine-tune", is_flag=True, help="Fine-tuning, and the same network from scratch: slow.")
@click.option("--augmented", is_flag=True, help="Linear probe on fresh crops in every epoch, too: slow.")
@click.option("--all", "everything", is_flag=True, help="All of these; and the context encoder by k-NN and linear.")
@click.option("--checkpoint", default="latest", help="latest, best, or a checkpoint's folder.")
@click.option("--encoder", type=click.Choice(["target", "context"]), default="target", help="Which encoder to score.")
@click.option("--subset", type=click.IntRange(min=100), help="Score only so many pictures of each split.")
@click.option("--validation", is_flag=True, help="Score on the held-out training pictures, not on the test set.")
@click.option("--dataset", type=DATASETS, help="Score on other pictures than the run's own (transfer).")
@click.option("--root", help="Where the pictures are: an unpacked archive, or a folder of pictures.")
@click.option("--fine-tune-epochs", type=(click.IntRange(0, 100), click.IntRange(0)),
              help="Epochs of fine-tuning and from scratch, 0 to leave out (both with --all only). [default: 100 200]")
@click.option("--fine-tune-size", type=click.IntRange(min=1),
              help="Fine-tune at so many pixels a side instead of the run's; half as many again gave 0.4 points.")
@as_json
@friendly
def evaluate(runs: tuple[str, ...], everything: bool, checkpoint: str, encoder: str, subset: int | None,
             validation: bool, dataset: str | None, root: str | None, fine_tune_epochs: tuple[int, int] | None,
             fine_tune_size: int | None, as_json: bool, **asked: bool) -> None:
    """Score RUN, the newest by default, beside raw pixels and its untrained encoder.

    Without a protocol: k-NN and linear probe. Several runs are also put side by side in one table; of published ones
    the reports are taken as they are when nothing else is asked for.
    """
    from mlx_hjepa.evaluate import features, report, summary

    plain = len(runs) > 1 and not everything and not any(asked.values())
    if everything or not any(asked.values()):
        asked |= {name: everything or name in ("knn", "linear") for name in asked}
    if (fine_tune_epochs or fine_tune_size) and not asked["fine_tune"]:
        raise UserError("--fine-tune-epochs and --fine-tune-size go with --fine-tune or --all")
    if fine_tune_epochs == (0, 0):
        if not everything:
            raise UserError("--fine-tune-epochs 0 0 leaves both out: leave out --fine-tune instead")
        asked["fine_tune"] = False
    protocols = report.Protocols(**{**asked, "linear": asked["linear"] or asked["augmented"]}, context=everything,
                                 fine_tune_epochs=fine_tune_epochs, fine_tune_size=fine_tune_size)
    opened, reports = [Run.open(r) for r in runs] or [Run.newest()], []
    wanted = []
    for run in opened:  # every mistake before any work
        if fine_tune_size and fine_tune_size % run.config.model.patch:
            raise UserError(f"--fine-tune-size {fine_tune_size}: give a multiple of {run.config.model.patch}, the side "
                            f"of a patch of {run.folder}")
        what = report.Target(encoder, checkpoint, subset, _pictures(run, dataset, root),  # type: ignore[arg-type]
                             validation)
        published = report.published(run) if plain and what == report.Target() else None
        if not published:
            features.load(run.folder, what.encoder, checkpoint)
        wanted.append((run, what, published))
    for run, what, published in wanted:
        reports.append(published or _scored(run, protocols, what, as_json))
    compared = summary.compare(reports)
    if as_json:
        click.echo(json.dumps({"reports": reports, "comparison": compared} if len(reports) > 1 else reports[0]))
    elif len(reports) > 1:
        _out().print(summary.comparison(compared))


def _pictures(run: Run, dataset: str | None, root: str | None) -> Data | None:
    """The data set asked for, or the run's own at another place; None where neither is. Raises UserError."""
    from mlx_hjepa.config import section

    if not dataset and not root:
        return None
    own = run.config.data
    if root and (dataset or own.dataset) == "digits":
        raise UserError(f"--root {root}: the digits come with scikit-learn and have no folder. Leave --root out")
    if not dataset:
        return own.model_copy(update={"root": root})
    return section(Data, "data", {"dataset": dataset, "root": root, "source": "resident", "image_size": own.image_size})


def _scored(run: Run, protocols: Any, what: Any, quiet: bool) -> dict[str, Any]:
    """Evaluate one run, write its report, and show its table and what has no place in that."""
    from mlx_hjepa.evaluate import report, summary

    with _bar() as (say, progress):
        result = report.evaluate(run, protocols, what, say, progress)
    summary.write(run, result)
    if not quiet:
        _out().print(summary.table(result))
        for line in summary.findings(result):
            click.echo(line)
        click.echo(f"{result['seconds']:.0f} s; written to {run.scored / result['name']}.md and .json")
    return result


@contextlib.contextmanager
def _bar() -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int], None] | None]]:
    """Functions to say a line and to show progress, a bar that goes when it is done; both on stderr, the bar only on a
    terminal."""
    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if not console.is_terminal:
        yield say, None
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", visible=False)

        def progress(what: str, done: int, of: int) -> None:
            new = bar.tasks[0].description != what
            if new:
                bar.reset(task, total=of, description=what, visible=True)
            bar.update(task, completed=done, refresh=new)

        yield say, progress


def _out() -> Console:
    """For tables: where no terminal gives a width, each is as wide as it needs."""
    return Console(width=None if sys.stdout.isatty() else 1000, markup=False)


@main.command()
@click.argument("run", required=False)
@as_json
@friendly
def analyze(run: str | None, as_json: bool) -> None:
    """Judge RUN, the newest by default, or a console log of the PyTorch H-JEPA, and say what to run next."""
    from mlx_hjepa.analyze import report
    from mlx_hjepa.analyze.projection import times_here

    result = report.analyze(_source(run), times_here())
    click.echo(json.dumps(result) if as_json else "\n".join([*report.summary(result), *result["files"]]))


@main.command()
@click.argument("run", required=False)
@click.option("--refresh", type=click.FloatRange(min=0.1), default=5.0, help="Seconds between looks.")
@friendly
def watch(run: str | None, refresh: float) -> None:
    """Follow RUN, the newest by default, from another terminal; analyse it when it ends."""
    from mlx_hjepa.analyze.projection import times_here
    from mlx_hjepa.analyze.watch import watch as follow

    follow(_source(run), times_here(), refresh, say=click.echo)


@main.command()
@click.argument("config")
@click.option("--epochs", type=click.IntRange(min=1), help="Instead of the configuration's.")
@click.option("--chip", metavar="NAME", help="Another machine, such as 'M1 Max': a roofline projection.")
@click.option("--budget", metavar="TIME", help="Which presets beside CONFIG fit into 3h, 45m ...")
@click.option("--pictures", type=click.IntRange(min=1), help="Training pictures of a folder.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key.")
@as_json
@friendly
def project(config: str, epochs: int | None, chip: str | None, budget: str | None, pictures: int | None,
            overrides: tuple[str, ...], as_json: bool) -> None:
    """How long CONFIG will take here, from the throughput benchmark or 20 seconds of measuring."""
    from mlx_hjepa.analyze import projection
    from mlx_hjepa.train.step import Step

    def say(text: str) -> None:
        click.echo(text, err=True)

    settings = load(config, overrides)
    if budget:
        if epochs:
            raise UserError("--budget finds the number of epochs: leave --epochs out")
        options = projection.budget(budget, settings, Path(config).parent, chip, Step, pictures, overrides, say)
        click.echo(json.dumps(options) if as_json else "\n".join(projection.describe_budget(budget, options)))
        return
    result = projection.project(settings, epochs, chip, Step, pictures, say)
    click.echo(json.dumps(result) if as_json else "\n".join(projection.describe(result)))


def _source(run: str | None) -> Run | Path:
    if run and Path(run).is_file():
        return Path(run)
    return Run.open(run) if run else Run.newest()


@main.command()
@click.argument("run")
@click.argument("folder")
@click.option("--out", required=True, help="The .npz file to write.")
@click.option("--level", default="levels", help="levels, last, or a depth.")
@click.option("--encoder", type=click.Choice(["target", "context"]), default="target", help="Which encoder to use.")
@click.option("--checkpoint", default="latest", help="latest, best, or a checkpoint's folder.")
@click.option("--on-corrupt", type=click.Choice(["skip", "error"]), default="skip", help="What a corrupt picture does.")
@click.option("--force", is_flag=True, help="Write over an existing file.")
@friendly
def embed(run: str, folder: str, out: str, level: str, encoder: str, checkpoint: str, on_corrupt: str,
          force: bool) -> None:
    """Write the features and names of the pictures in FOLDER, by the encoder of RUN."""
    from mlx_hjepa.evaluate.export import embed_folder

    with _bar() as (say, progress):
        path = embed_folder(Run.open(run), folder, out, level, on_corrupt,
                            encoder, checkpoint, force, say, progress)  # type: ignore[arg-type]
    click.echo(f"written to {path}")


@main.command()
@click.argument("run")
@click.argument("out")
@click.option("--encoder", type=click.Choice(["target", "context"]), default="target", help="Which encoder to export.")
@click.option("--checkpoint", default="latest", help="latest, best, or a checkpoint's folder.")
@friendly
def export(run: str, out: str, encoder: str, checkpoint: str) -> None:
    """Write RUN's encoder to the folder OUT with timm's names, a config and a model card."""
    from mlx_hjepa.evaluate.export import export as write

    click.echo(f"written to {write(Run.open(run), out, encoder, checkpoint)}")  # type: ignore[arg-type]


@main.command()
@click.argument("run", required=False)
@click.option("--checkpoint", default="latest", help="latest, best, or a checkpoint's folder.")
@click.option("--root", help="Where the pictures are, if not where they were.")
@friendly
def plot(run: str | None, checkpoint: str, root: str | None) -> None:
    """Draw RUN, the newest by default: its curves, masks, predictions, attention, and a map of its features."""
    from mlx_hjepa.plots.model import draw

    source = Run.open(run) if run else Run.newest()
    for file in draw(source, checkpoint, _pictures(source, None, root), click.echo):
        click.echo(str(file))


@main.command()
@click.option("--dataset", type=DATASETS, default="cifar10", help="Which data set.")
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
    if not as_json:
        del facts["note"]  # said already
    _print(facts, as_json)


@main.command()
@as_json
@friendly
def doctor(as_json: bool) -> None:
    """Check this machine: MLX, its back-end, the compiler, memory, disk, the data cache."""
    from mlx_hjepa import backend
    from mlx_hjepa.doctor import findings

    found = findings()
    device = {} if any(f.what.startswith("MLX does not load") for f in found) else backend.device()
    if as_json:
        click.echo(json.dumps({"device": device, "findings": [f._asdict() for f in found]}))
    else:
        _print(device | {"memory": f"{device['memory'] / 1e9:.0f} GB"} if device else {}, False)
        for finding in found:
            click.echo(f"{finding.level:>5}  {finding.what}" + (f"\n       {finding.advice}" if finding.advice else ""))
    if any(f.level == "error" for f in found):
        sys.exit(1)


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts))
        return
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        click.echo(f"{name:>{width}}  {', '.join(map(str, value)) or 'none' if isinstance(value, list) else value}")


if __name__ == "__main__":
    main()
