"""Ends a wait that would last for ever.

MLX's CUDA back-end twice stood still inside `async_eval` (docs/results/profiles/h100_hang.txt). No signal handler runs
then, so that not even Ctrl-C helps; only another thread can act.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

STUCK = 600.0  # seconds
LONGEST = 20  # or so many times the longest wait that came to an end


class Watchdog:
    """`with watchdog:` around each wait; `act` is called, in another thread, when one lasts longer than `stuck` seconds
    and than LONGEST times the longest before it."""

    def __init__(self, act: Callable[[float], object], stuck: float = STUCK):
        self.act, self.stuck = act, stuck
        self.since: float | None = None
        self.longest = 0.0
        self.ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> None:
        self.since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        assert self.since is not None
        self.longest, self.since = max(self.longest, time.monotonic() - self.since), None

    def close(self) -> None:
        self.ended.set()

    def _watch(self) -> None:
        while not self.ended.wait(self.stuck / 20):
            since = self.since
            if since is not None and (waited := time.monotonic() - since) > max(self.stuck, LONGEST * self.longest):
                self.act(waited)
                return
