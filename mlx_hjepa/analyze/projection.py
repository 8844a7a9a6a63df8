"""`mlx-hjepa project`: how long a configuration takes here, on another chip, or what fits into a budget."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_hjepa import backend
from mlx_hjepa.analyze import chips, timing
from mlx_hjepa.analyze.measures import Span, span
from mlx_hjepa.config import Config, ConfigError, load
from mlx_hjepa.run import UserError, duration, read_json

Say = Callable[[str], None]
SCALED = 0.3  # relative half-width of a time that was scaled by FLOPs from another model's


def here(config: Config, make_step: Callable[..., Any] | None = None, say: Say = print) -> timing.Speed | None:
    """This machine's speed with a configuration: from its throughput file, else measured now with `make_step`
    (train.step.Step), else scaled by FLOPs from another model that was measured; None where nothing was."""
    file = timing.throughput_file()
    found = timing.measured(config, file)
    if found is None and make_step:
        say(f"nothing measured here for {config.name} yet ({file}): measuring for about 20 s, after compiling")
        found = timing.fit(timing.measure_here(config, make_step))
    return found or _scaled(config, file)


def _scaled(config: Config, file: Path) -> timing.Fit | None:
    wanted = timing.key(config)
    fits = [f for f in read_json(file)["fits"] if f["precision"] == wanted["precision"]] if file.is_file() else []
    if not fits:
        return None
    near = min(fits, key=lambda f: abs(f["gflop"] - wanted["gflop"]))
    return timing.Fit(near["a"], near["b"] * wanted["gflop"] / near["gflop"], SCALED)


def times_here() -> Callable[[Config, int], Span] | None:
    """Seconds of any configuration for so many epochs, as `analyze` asks; None when nothing was measured here."""
    if not timing.throughput_file().is_file():
        return None

    def times(config: Config, epochs: int) -> Span:
        speed = here(config)
        if speed is None:
            return 0.0, 0.0, 0.0
        p = timing.project(config, speed, epochs)
        return p.low, p.mid, p.high

    return times if read_json(timing.throughput_file())["fits"] else None


def project(config: Config, epochs: int | None, chip: str | None, make_step: Callable[..., Any],
            pictures: int | None = None, say: Say = print) -> dict[str, Any]:
    """The time of a run as plain values: low, mid and high seconds, their parts, and what they rest on."""
    if chip:
        speed: timing.Speed | None = chips.Projected(config, chips.find(chip))
        basis = chips.band(config, chips.find(chip), config.training.batch).label
    else:
        speed, basis = here(config, make_step, say), f"measured on {backend.device()['name']}"
    assert speed is not None  # make_step measures
    p = timing.project(config, speed, epochs, pictures)
    return {"config": config.name, **asdict(p), "it_s": 1 / speed.step(config.training.batch)[1], "basis": basis}


def describe(result: dict[str, Any]) -> list[str]:
    """A projection in a few lines."""
    parts = ", ".join(f"{name.replace('_', ' ')} {duration(seconds)}" for name, seconds in result["parts"].items())
    return [f"{result['config']}: {result['epochs']} epochs, {result['steps']:,} steps in "
            f"{span((result['low'], result['mid'], result['high']))} at {result['it_s']:.3g} it/s",
            f"  {parts}", f"  {result['basis']}"]


def budget(text: str, config: Config, folder: Path, chip: str | None, make_step: Callable[..., Any],
           say: Say = print) -> list[str]:
    """What of a folder's presets for the same pictures fits into a time such as 3h, 45m or 2h30m: the best batch size
    and number of epochs of each, best first, as ready command lines."""
    presets = {}
    for file in sorted(folder.glob("*.yaml")):
        try:
            presets[str(file)] = load(file)
        except ConfigError:
            continue
    presets = {name: c for name, c in presets.items() if c.data.dataset == config.data.dataset}
    known = chips.find(chip) if chip else None

    def speed(config: Config) -> timing.Speed:
        found = chips.Projected(config, known) if known else here(config, make_step, say)
        assert found is not None
        return found

    options = timing.fits(seconds_of(text), presets, speed)
    if not options:
        raise UserError(f"nothing of {folder}/ fits into {text}, not even its warm-up")
    lines = [f"fits into {text}" + (f" ({known.name}, a projection)" if known else "") + ":"]
    best = {o.preset: o for o in reversed(options)}  # the first of each
    for o in (o for o in options if o is best[o.preset]):
        p = o.projection
        lines += [f"  {span((p.low, p.mid, p.high))}: mlx-hjepa train {o.preset} {o.overrides()}"]
    return lines


def seconds_of(text: str) -> float:
    """3h, 45m, 2h30m or 90s as seconds. Raises UserError."""
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+)s)?", text.strip().lower())
    if not found or not any(found.groups()):
        raise UserError(f"--budget {text}: write it as 3h, 45m or 2h30m")
    hours, minutes, seconds = (float(g or 0) for g in found.groups())
    return 3600 * hours + 60 * minutes + seconds

