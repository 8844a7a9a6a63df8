"""`mlx-hjepa project`: how long a configuration takes here, on another chip, or what fits into a budget."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_hjepa import backend
from mlx_hjepa.analyze import chips, timing
from mlx_hjepa.analyze.measures import Span, span
from mlx_hjepa.config import Config, ConfigError, load
from mlx_hjepa.run import UserError, duration

Say = Callable[[str], None]
SCALED = 0.3  # relative half-width of a time that was scaled by FLOPs from another model's


def here(config: Config, make_step: Callable[..., Any] | None = None, say: Say = print) -> timing.Speed | None:
    """This machine's speed with a configuration: from its throughput file, else measured now with `make_step`
    (train.step.Step) and kept there, else scaled by FLOPs from another model that was measured; None where none was."""
    file = timing.throughput_file()
    found = timing.measured(config, file)
    if found is None and make_step:
        say(f"nothing measured here for {config.name} yet ({file}): measuring for about 20 s, after compiling")
        rows = timing.measure_here(config, make_step)
        new = {**timing.document(backend.environment()), "rows": rows,
               "fits": [timing.fitted(rows, timing.Costs(first_step=min(r["first_step_s"] for r in rows)))]}
        timing.write(file, timing.merged(timing.recorded(file), new))
        found = timing.measured(config, file)
    return found or _scaled(config, file)


def _scaled(config: Config, file: Path) -> timing.Fit | None:
    """From the measured model nearest in FLOPs."""
    wanted, found = timing.key(config), timing.recorded(file)
    fits = [f for f in found["fits"] if f["precision"] == wanted["precision"]]
    if not fits:
        return None
    near = min(fits, key=lambda f: abs(f["gflop"] - wanted["gflop"]))
    fit = timing.fit([r for r in found["rows"] if timing.same(r, near)])
    return replace(fit, b=fit.b * wanted["gflop"] / near["gflop"], interval=SCALED)


def times_here() -> Callable[[Config, int], Span | None] | None:
    """Seconds of any configuration for so many epochs, as `analyze` asks, None for what cannot be projected from what
    was measured here; None altogether when nothing was."""
    measured = timing.recorded(timing.throughput_file())["fits"]
    return (lambda config, epochs: _span(config, here(config), epochs)) if measured else None


def times_from(own: Config, step_seconds: float) -> Callable[[Config, int], Span | None]:
    """As `times_here`, scaled by FLOPs, +-30 %, from the seconds that one step of another run takes (1 / it_s)."""
    per_gflop = step_seconds / own.training.batch / timing.key(own)["gflop"]
    return lambda config, epochs: _span(
        config, timing.Fit(0.0, per_gflop * timing.key(config)["gflop"], SCALED), epochs)


def _span(config: Config, speed: timing.Speed | None, epochs: int) -> Span | None:
    p = timing.project(config, speed, epochs) if speed else None
    return (p.low, p.mid, p.high) if p else None


def project(config: Config, epochs: int | None, chip: str | None, make_step: Callable[..., Any],
            pictures: int | None = None, say: Say = print) -> dict[str, Any]:
    """The time of a run as plain values: low, mid and high seconds, their parts, and what they rest on."""
    speed = _speed(config, chip, make_step, say)
    p = timing.project(config, speed, epochs, pictures)
    return {"config": config.name, **asdict(p), "it_s": 1 / speed.step(config.training.batch)[1], "basis": speed.basis}


def _speed(config: Config, chip: str | None, make_step: Callable[..., Any], say: Say) -> timing.Speed:
    speed = chips.Projected(config, chips.find(chip)) if chip else here(config, make_step, say)
    assert speed is not None  # make_step measures
    return speed


def describe(result: dict[str, Any]) -> list[str]:
    """A projection in a few lines."""
    parts = {name: duration(seconds) + " (estimated)" * (name in result["estimated"])
             for name, seconds in result["parts"].items() if seconds}
    words = [f"{name} {time}" for name, time in parts.items()]
    words += ["not counted: " + ", ".join(result["not_counted"])] if result["not_counted"] else []
    return [f"{result['config']}: {result['epochs']} epochs, {result['steps']:,} steps in "
            f"{span((result['low'], result['mid'], result['high']))} at {result['it_s']:.3g} it/s",
            f"  {', '.join(words).replace('_', ' ')}", f"  {result['basis']}"]


# ---------------------------------------------------------------- budgets


@dataclass(frozen=True)
class Option:
    """A preset that fits a budget: its name, a batch size and as many epochs as fit."""

    preset: str
    batch: int
    epochs: int
    projection: timing.Projection
    complete: bool  # at least the preset's own epochs
    basis: str

    def command(self, overrides: tuple[str, ...] = ()) -> str:
        """The line that trains it, with what else was set."""
        sets = [*overrides, f"training.batch={self.batch}", f"training.epochs={self.epochs}"]
        return f"mlx-hjepa train {shlex.quote(self.preset)}" + "".join(f" --set {shlex.quote(s)}" for s in sets)


def fits(budget: float, presets: dict[str, Config], speed: Callable[[Config], timing.Speed],
         pictures: int | None = None, scales: tuple[float, ...] = (0.5, 1, 2), most: int = 300) -> list[Option]:
    """What fits into `budget` seconds, even at the projection's high end; the best first.

    presets: by name; speed: a configuration's Speed here; pictures: of a folder; scales: batch sizes to try, as
    multiples of the preset's own; most: no more epochs than these. First comes what reaches its preset's epochs, then
    the larger model, then the preset's own batch.
    """
    options = []
    for name, config in presets.items():
        rate = speed(config)
        for batch in {max(1, round(config.training.batch * s)) for s in scales}:
            sized = timing.with_batch(config, batch)
            least = int(config.training.warmup_epochs) + 1
            tries = (timing.project(sized, rate, epochs, pictures) for epochs in range(most, least - 1, -1))
            if done := next((p for p in tries if p.high <= budget), None):
                whole = done.epochs >= config.training.epochs
                options.append(Option(name, batch, done.epochs, done, whole, rate.basis))
    return sorted(options, reverse=True, key=lambda o: (
        o.complete, timing.flops_per_picture(presets[o.preset]).total,
        o.batch == presets[o.preset].training.batch, o.epochs))


def budget(text: str, config: Config, folder: Path, chip: str | None, make_step: Callable[..., Any],
           pictures: int | None = None, overrides: tuple[str, ...] = (), say: Say = print) -> list[dict[str, Any]]:
    """What of a folder's presets for the same pictures fits into a time such as 3h, 45m or 2h30m: the best batch size
    and number of epochs of each, best first, as ready command lines. overrides: set in every preset, too.

    Raises UserError when nothing fits, or when the overrides set the epochs, which the budget does.
    """
    set_by_user = {item.partition("=")[0].strip() for item in overrides}
    if "training.epochs" in set_by_user:
        raise UserError("--budget finds the number of epochs: leave training.epochs out")
    presets = {}
    for file in sorted(folder.glob("*.yaml")):
        try:
            presets[str(file)] = load(file, overrides)
        except ConfigError:
            continue
    presets = {name: c for name, c in presets.items() if c.data.dataset == config.data.dataset}
    scales = (1.0,) if "training.batch" in set_by_user else (0.5, 1, 2)
    options = fits(seconds_of(text), presets, lambda c: _speed(c, chip, make_step, say), pictures, scales)
    if not options:
        raise UserError(f"nothing of {folder}/ fits into {text}, not even its warm-up")
    best = {o.preset: o for o in reversed(options)}  # the first of each
    kept = tuple(item for item in overrides if not item.startswith("training.batch"))
    return [{"preset": o.preset, "batch": o.batch, "complete": o.complete, **asdict(o.projection), "basis": o.basis,
             "command": o.command(kept)} for o in options if o is best[o.preset]]


def describe_budget(text: str, options: list[dict[str, Any]]) -> list[str]:
    """What fits, a line each, and what it rests on."""
    return [f"fits into {text}:", *(f"  {span((o['low'], o['mid'], o['high']))}: {o['command']}" for o in options),
            *(f"  {basis}" for basis in dict.fromkeys(o["basis"] for o in options))]


def seconds_of(text: str) -> float:
    """3h, 45m, 2h30m or 90s as seconds. Raises UserError."""
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+)s)?", text.strip().lower())
    if not found or not any(found.groups()):
        raise UserError(f"--budget {text}: write it as 3h, 45m or 2h30m")
    hours, minutes, seconds = (float(g or 0) for g in found.groups())
    return 3600 * hours + 60 * minutes + seconds

