"""How fast a run goes, and when it will end."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_hjepa.run import duration

SLOWER = 0.9  # of the usual rate: said as a warning


class Pace:
    """Rates and the time left, with what is not training taken out of the rates."""

    def __init__(self, total: int, start: int):
        self.total, self.start = total, start
        self.began = self.mark = time.monotonic()
        self.apart, self.paused = 0.0, 0.0
        self.rates: list[float] = []
        self.first_step: float | None = None
        self.skipped = self.counted = 0
        self.warned = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent here is no training time: for the rates the clock stands still."""
        self.paused = time.monotonic()
        yield
        self.apart += time.monotonic() - self.paused
        self.paused = 0.0

    def first(self, result: mx.array) -> None:
        """Wait for the first step, whose compilation is told apart."""
        mx.eval(result)
        self.first_step = time.monotonic() - self.mark - self.apart
        self.began = self.mark = time.monotonic()
        self.apart, self.skipped, self.counted = 0.0, 1, 1

    def lap(self, steps: int) -> float:
        """Steps a second since the last lap; a lap of the first step alone has that step's rate."""
        now = self.paused or time.monotonic()
        elapsed = now - self.mark - self.apart
        if steps > self.skipped:
            rate = (steps - self.skipped) / elapsed
            self.rates.append(rate)
        else:
            rate = 1 / (self.first_step or elapsed)
        self.mark, self.apart, self.skipped = now, 0.0, 0
        return rate

    @property
    def usual(self) -> float:
        return statistics.median(self.rates[1:11]) if len(self.rates) > 10 else 0.0

    def slowed(self, rate: float) -> bool:
        """Whether the last three laps were more than 10 % below the usual rate; told once until it recovers."""
        slow = self.usual > 0 and max(self.rates[-3:]) < SLOWER * self.usual
        told, self.warned = self.warned, slow
        return slow and not told

    def left(self, step: int) -> str:
        """The time left and the clock time of the end, from the pace since the first step, checks included."""
        done = step - self.start - self.counted
        each = (time.monotonic() - self.began) / done if done > 0 else self.first_step or 0.0
        seconds = each * (self.total - step)
        return f"{duration(seconds)} left, ends {time.strftime('%a %H:%M', time.localtime(time.time() + seconds))}"
