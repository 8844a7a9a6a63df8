"""A run from its first step to its last: schedules, checks, checkpoints, signals, progress."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hjepa import backend
from mlx_hjepa.config import Config
from mlx_hjepa.data.dataset import load_dataset, validation_split
from mlx_hjepa.data.source import batches, order, steps_per_epoch
from mlx_hjepa.evaluate.features import FrozenEncoder
from mlx_hjepa.evaluate.knn import knn_accuracy
from mlx_hjepa.model.hjepa import HEALTH_STEP, HJEPA, key_of, keys_of
from mlx_hjepa.run import Run, UserError, duration, write_atomically
from mlx_hjepa.schedule import Schedule
from mlx_hjepa.train import checkpoint, health
from mlx_hjepa.train.log import Log, truncate
from mlx_hjepa.train.pace import Pace
from mlx_hjepa.train.step import STATISTICS, Step, part
from mlx_hjepa.train.watchdog import Watchdog

MAY_DIFFER = ("logging", "checkpoints")  # the sections that a resumed run may change
HEALTH_PICTURES, FEWEST_PICTURES = 512, 20
FEW_STEPS = 10  # an epoch, below which a smaller batch is advised
TEMPORARY_FAILURE = 75  # sysexits.h


def train(config: Config, run: Run, resume: bool = False, again: Callable[[], object] | None = None) -> bool:
    """Train a run to its end. `resume` continues from its newest checkpoint. Returns False when interrupted.

    again: called in another thread, to go on in a new process, when MLX never returns from a step and there is a newer
    checkpoint than at the start; without one, the process exits with status 75.
    Raises UserError: unreadable data, a batch larger than the data, another configuration than the checkpoint's, no
    sound checkpoint, or training that is no longer finite.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the first step there is nothing to save
    try:
        trainer = Trainer(config, run, resume)
    except KeyboardInterrupt:
        print("stopped before the first step: nothing to save", flush=True)
        return False
    finally:
        signal.signal(signal.SIGTERM, before)
    return trainer.fit(again)


class Trainer:
    """Holds what a run needs; `fit` is the loop."""

    def __init__(self, config: Config, run: Run, resume: bool):
        self.config, self.run = config, run
        self.notes: list[str] = []
        self.data = load_dataset(config.data, say=self._note)
        if len(self.data.train) < FEWEST_PICTURES:
            raise UserError(f"{len(self.data.train)} training pictures are too few: it takes {FEWEST_PICTURES}")
        self.bank, self.validation = validation_split(len(self.data.train), config.data.split_seed)
        self.rows = np.arange(len(self.data.train))
        if config.data.hold_out:
            self.rows = np.setdiff1d(self.rows, self.validation)
        self.epoch_steps = steps_per_epoch(len(self.rows), config.training.batch)
        self.schedule = Schedule(config.training, self.epoch_steps)
        self.precision = backend.precision(config.training.precision)
        self.model = HJEPA(config, self.data.mean, self.data.std)
        self.keys = keys_of(config.seed)
        self.step = Step(self.model, self.schedule, self.precision)
        self.unprobed = self.data.train.labels is None
        self.probe = FrozenEncoder(config, {}, self.data.mean, self.data.std)
        self.alarm = health.Alarm()
        self.unplugged: bool | None = None
        if not (resume and self._restore()):
            self.state = self.step.initial_state()
            self.progress: dict[str, Any] = {
                "step": 0, "seconds": 0.0, "baseline": None, "level_weights": self._level_weights(None), "best": None,
                "checked": -1, "probed": 0, "alarm": self.alarm.dump(), "fingerprint": self.data.fingerprint}
            truncate(run.metrics_file, -1)  # a run killed before its first checkpoint starts anew
            write_atomically(run.environment_file, json.dumps(self._environment(), indent=1))

    def _note(self, text: str) -> None:
        """Said at once, since reading data may take long; train.log gets it when it is opened."""
        print(text, flush=True)
        self.notes.append(text)

    def _environment(self) -> dict[str, Any]:
        d = self.data
        dataset = {"name": d.name, "fingerprint": d.fingerprint, "classes": d.classes, "mean": d.mean, "std": d.std,
                   "train": len(d.train), "note": d.note, "corrupt": d.corrupt}
        return {**backend.environment(), "precision": self.precision, "dataset": dataset}

    def _restore(self) -> bool:
        """Take the newest sound checkpoint. False when the run has none yet."""
        folder = checkpoint.newest(self.run, self._note)
        if folder is None:
            return False
        self.state, self.progress = checkpoint.load(folder, self.step.layout)
        if self.progress["fingerprint"] != self.data.fingerprint:
            raise UserError(f"{self.run.folder}: the training pictures are not those it started with "
                            f"(fingerprint then {self.progress['fingerprint'][:12]}, now {self.data.fingerprint[:12]})")
        self.alarm = health.Alarm(**self.progress["alarm"])
        truncate(self.run.metrics_file, self.progress["step"])
        return True

    def fit(self, again: Callable[[], object] | None = None) -> bool:
        """The loop: checks and checkpoints where they are due, then a step. Returns whether the run is finished."""
        self.again = again
        start, total = self.progress["step"], self.schedule.total
        self.kept = start  # the step of the newest checkpoint
        began, seconds = time.monotonic(), self.progress["seconds"]
        with (Log(self.run, self.config, start, total) as self.log, _signals() as asked, backend.both_cores(),
              closing(Watchdog(self._stand_still)) as watchdog):
            self._introduce(start)
            source = batches(self.data.train, self.config.data.source, self.config.seed, self.config.training.batch,
                             start, total, self.config.data.threads, self.rows)
            self.pace, self.saved = Pace(total, start), time.monotonic()
            self.waiting: list[mx.array] = []
            self.guesses: list[float] = []  # what the best constant guess would have cost each of them
            self.waited = 0.0
            for step in range(start, total + 1):
                self.progress |= {"step": step, "seconds": seconds + time.monotonic() - began}
                stop = asked()
                if stop or self._health_due(step) or self._knn_due(step) or self._save_due(step):
                    self._pause(step, stop)
                if stop or step == total:
                    break
                asked_at = time.monotonic()
                images = next(source)
                self.waited += time.monotonic() - asked_at
                with watchdog if step > start else nullcontext():  # the first compiles, for minutes at worst
                    self._advance(step, images)
                if step == start:
                    self.pace.first(self.waiting[-1])
                    # what a step needs, and not the whole device: others may be running beside this run
                    backend.set_cache_limit(1.2 * backend.peak_memory_gb())
                if (step + 1) % self.config.logging.every_steps == 0:
                    self._report(step + 1)
            return self._conclude(step)

    def _advance(self, step: int, images: mx.array) -> None:
        """Queue one update; while it runs, the next is prepared, and the one before it is waited for."""
        scalars = self.step.scalars(step, self.progress["level_weights"])
        self.state, statistics = self.step(self.state, images, self.keys(step), scalars)
        mx.async_eval(self.state.arrays(), statistics)
        if self.waiting:
            mx.eval(self.waiting[-1])
        self.waiting.append(statistics)
        base, weights = self.progress["baseline"], self.progress["level_weights"]
        self.guesses.append(float(np.dot(base, weights)) / sum(weights) if base else np.nan)

    def _pause(self, step: int, stop: bool) -> None:
        """Health, online k-NN and a checkpoint, each where it is due; a run resumed at this step repeats none."""
        mx.eval(self.state.arrays())
        with self.pace.aside():
            if self._health_due(step):
                self._check_health(step)
            if self._knn_due(step):
                self._probe(step)
            best = self.progress["best"]
            if stop or self._save_due(step) or (best and best["step"] == step > self.pace.start):
                self._report(step)
                self._save()
                self.saved = time.monotonic()

    def _introduce(self, start: int) -> None:
        c, sizes = self.config, self.step.layout
        for note in self.notes:
            self.log.keep(note)
        device = backend.device()
        self.log.line(f"{self.run.folder}: {c.model.dim} x {c.model.depth} encoder, {sizes.encoder_size / 1e6:.1f} M "
                      f"weights, predictor {(sizes.size - sizes.encoder_size) / 1e6:.1f} M; {len(self.rows):,} "
                      f"pictures of {self.data.name}, {self.schedule.total:,} steps of {c.training.batch}; "
                      f"{self.precision} on {device['name']}")
        if start:
            self.log.line(f"resumed at step {start:,} of {self.schedule.total:,}")
        if slow := backend.slow_heads(c.model.head_dim):
            self.log.line(f"note: {slow}")
        if self.epoch_steps < FEW_STEPS:
            self.log.line(f"note: steps an epoch: {self.epoch_steps}, and pictures that fill no batch are left out: "
                          "a smaller training.batch suits so few")
        self._warn_of_battery()
        self.log.record("resume" if start else "start", start, total=self.schedule.total, epoch_steps=self.epoch_steps,
                        batch=c.training.batch, precision=self.precision, device=device["name"])

    def _warn_of_battery(self) -> None:
        """When the machine is unplugged, at the start and at each health check: told once until it is plugged in."""
        told, self.unplugged = self.unplugged, backend.on_battery()
        if self.unplugged and not told:
            self.log.line("warning: running on battery: plug the machine in, or it slows down and may stop")

    def _every(self, step: int, epochs: float) -> bool:
        period = max(1, round(epochs * self.epoch_steps))
        return epochs > 0 and step > 0 and step % period == 0

    def _health_due(self, step: int) -> bool:
        due = step in (0, self.schedule.total) or self._every(step, self.config.logging.health_every)
        return due and self.progress["checked"] < step

    def _knn_due(self, step: int) -> bool:
        every = self.config.logging.knn_every
        if self.unprobed or not every or self.progress["probed"] >= step:
            return False
        return step == self.schedule.total or self._every(step, every)

    def _save_due(self, step: int) -> bool:
        c = self.config.checkpoints
        late = time.monotonic() - self.saved > 60 * c.every_minutes
        return step > self.pace.start and (late or step == self.schedule.total or self._every(step, c.every_epochs))

    def _weights(self) -> dict[str, mx.array]:
        return part(self.step.layout.views(self.state.target), "encoder")

    def _features(self, indices: np.ndarray) -> np.ndarray:
        self.probe.weights = self._weights()
        return self.probe.extract(self.data.train, indices)

    def _check_health(self, step: int) -> None:
        self._warn_of_battery()
        if not step:
            self.log.line(f"before the first step: features of {len(self.validation):,} held-out pictures ...")
        chosen = order(self.config.data.split_seed, 0, len(self.data.train))[:HEALTH_PICTURES]
        images = mx.array(self.data.train.read(np.asarray(chosen)))
        values = self.step.health(self.state, images, key_of(self.config.seed, HEALTH_STEP))
        loss, base, cosine = ([float(v) for v in np.array(value)] for value in values)
        features = self._features(self.validation)
        if not (np.isfinite(features).all() and np.isfinite(base).all()):
            self._give_up(step, "the features are no longer finite")
        found = {"loss": loss, "baseline": base, "cosine": cosine, **health.statistics(features)}
        reason = self.alarm.check(found)
        self.progress |= {"checked": step, "baseline": base, "level_weights": self._level_weights(base),
                          "alarm": self.alarm.dump(),
                          "health": {"rank": found["effective_rank"][-1], "std": found["std"][-1]}}
        self.log.record("health", step, epoch=step / self.epoch_steps, **found, alarm=reason)
        if reason:
            self.log.line(f"COLLAPSE at step {step}: {reason}.\n  {health.ADVICE}")

    def _level_weights(self, base: list[float] | None) -> list[float]:
        chosen, levels = self.config.model.level_weights, len(self.config.model.levels)
        if isinstance(chosen, list):
            return chosen
        return [1 / max(b, 1e-6) for b in base] if chosen == "balanced" and base else [1.0] * levels

    def _probe(self, step: int) -> None:
        labels = self.data.train.labels
        assert labels is not None
        bank, queries = self._features(self.bank), self._features(self.validation)
        scores = {}
        try:
            for level in ("last", "levels"):
                k = min(20, len(self.bank))
                result = knn_accuracy(self.probe.select(bank, level), labels[self.bank],
                                      self.probe.select(queries, level), labels[self.validation],
                                      len(self.data.classes), ks=(k,), headline=(k, 0.07))
                scores[level] = result.top1
        except UserError as error:  # a class without a picture in the bank is no reason to lose a night
            self.unprobed = True
            self.log.line(f"no online k-NN in this run: {error}")
            return
        self.progress["probed"] = step
        self.log.record("knn", step, epoch=step / self.epoch_steps, **scores)
        which = "pictures held out" if self.config.data.hold_out else "held-out training pictures"
        self.log.line(f"epoch {step / self.epoch_steps:.1f}: online k-NN {100 * scores['levels']:.1f} % (levels), "
                      f"{100 * scores['last']:.1f} % (last), on {len(self.validation):,} {which}")
        if self.progress["best"] is None or scores["levels"] > self.progress["best"]["knn"]:
            self.progress["best"] = {"step": step, "knn": scores["levels"]}

    def _save(self) -> None:
        folder = checkpoint.save(self.run, self.state, self.step.layout,
                                 {**self.progress, "config": self.config.model_dump(mode="json")})
        self.kept, best = self.progress["step"], self.progress["best"]
        if best and best["step"] == self.kept:
            self.run.point("best", folder)
        self.run.remove_old_checkpoints(self.config.checkpoints.keep)

    def _report(self, step: int) -> None:
        """A log line of the steps since the last one; here alone the device's numbers are read."""
        waiting, self.waiting, pace = self.waiting, [], self.pace
        guesses, self.guesses = np.array(self.guesses), []
        if not waiting:
            return
        rows = np.array(mx.stack(waiting), np.float64)
        rate = pace.lap(len(waiting))
        finite = np.isfinite(rows[:, 0])
        chosen = finite if finite.any() else ~finite
        means = rows[chosen].mean(axis=0)
        values = dict(zip(STATISTICS, means[: len(STATISTICS)], strict=True))
        guess = float(guesses[chosen].mean())
        ratio = values["loss"] / guess if np.isfinite(guess) else None
        values |= {"bad": int(rows[-1, 2]), "bad_in_a_row": int(rows[:, 3].max()), "loss_scale": rows[-1, 4]}
        peak, waited, self.waited = backend.peak_memory_gb(), self.waited / len(waiting), 0.0
        self.log.record("train", step, epoch=step / self.epoch_steps, steps=len(waiting), loss_ratio=ratio, **values,
                        levels=list(means[len(STATISTICS):]), lr=self.schedule.lr(step - 1),
                        weight_decay=self.schedule.weight_decay(step - 1), momentum=self.schedule.momentum(step - 1),
                        it_s=rate, img_s=rate * self.config.training.batch, wait_s=waited, peak_gb=peak,
                        first_step_seconds=pace.first_step, seconds=self.progress["seconds"])
        shown = f"{ratio:.3f}" if ratio is not None else "-"
        skipped = f"{values['bad']} skipped  " if values["bad"] else ""
        self.log.status(step, f"epoch {step / self.epoch_steps:.2f}/{self.config.training.epochs} step {step:,}  "
                              f"loss {values['loss']:.4f} ratio {shown}  lr {self.schedule.lr(step - 1):.2e}  "
                              f"{rate * self.config.training.batch:,.0f} img/s {rate:.2f} it/s  {peak:.1f} GB  "
                              f"{self._health_words()}  {skipped}{pace.left(step)}")
        self._warn(step, values, pace, rate)

    def _health_words(self) -> str:
        health = self.progress.get("health")
        return f"rank {health['rank']:.0f} std {health['std']:.2f}" if health else "health -"

    def _warn(self, step: int, values: dict[str, Any], pace: Pace, rate: float) -> None:
        if pace.slowed(rate):
            self.log.line(f"warning: {rate:.2f} it/s, {100 * (1 - rate / pace.usual):.0f} % slower than at the start "
                          "(heat, battery, or other programs)")
        if values["bad_in_a_row"] >= self.config.training.max_bad_steps:
            self._give_up(step, f"{values['bad_in_a_row']} steps in a row without a finite gradient")

    def _give_up(self, step: int, why: str) -> None:
        """Stop a run that cannot recover, without a checkpoint of what it has become. Raises UserError."""
        kept = "the last checkpoint is kept" if (self.run.checkpoints / "latest").exists() else "no checkpoint yet"
        why = (f"{why}: training stopped at step {step:,}, {kept}.\nTry training.lr 3x lower, a longer "
               "training.warmup_epochs, or training.precision: fp32 (in a new run)")
        self.log.keep(why)
        self.log.record("end", step, finished=False, seconds=self.progress["seconds"],
                        pictures_seen=step * self.config.training.batch, failed=why.splitlines()[0])
        raise UserError(why)

    def _stand_still(self, waited: float) -> None:
        """In the watchdog's thread: the main one waits for ever, and can neither save nor end."""
        go_on = self.again if self.kept > self.pace.start else None  # else it would stand still there again
        then = ("Going on from the newest checkpoint" if go_on else "There is no checkpoint yet" if not self.kept else
                f"Go on with: mlx-hjepa train {self.run.folder} --resume")
        text = f"no step for {duration(waited)}: MLX does not return from step {self.progress['step']:,}. {then}"
        self.log.keep(text)
        print(f"\nerror: {text}", file=sys.stderr, flush=True)
        if go_on:
            go_on()
        os._exit(TEMPORARY_FAILURE)

    def _conclude(self, step: int) -> bool:
        done = step == self.schedule.total
        self.log.record("end", step, finished=done, seconds=self.progress["seconds"],
                        pictures_seen=step * self.config.training.batch)
        if done:
            then = (f"Score it: mlx-hjepa eval {self.run.folder} --knn --linear" if self.data.train.labels is not None
                    else f"Use it: mlx-hjepa embed {self.run.folder} FOLDER --out features.npz")
            took = duration(self.progress["seconds"]) + (", nothing left to do" if step == self.pace.start else "")
            self.log.line(f"finished {self.config.training.epochs} epochs in {took}. {then}")
        else:
            self.log.line(f"stopped and saved at step {step:,}. Go on with: mlx-hjepa train {self.run.folder} --resume")
        return done


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM ask the loop to finish its step and save; a second SIGINT exits at once."""
    asked: list[int] = []

    def handle(number: int, _: Any) -> None:
        if asked and number == signal.SIGINT:
            os._exit(130)
        if not asked:
            print("stopping: finishing what runs, then saving; Ctrl-C again exits at once", file=sys.stderr, flush=True)
        asked.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def same_run(config: Config, run: Run) -> None:
    """Refuse to resume with another configuration. Raises UserError naming the first key that differs."""
    now, then = (c.model_dump(mode="json", exclude=set(MAY_DIFFER)) for c in (config, run.config))
    for section, value in now.items():
        if value == then[section]:
            continue
        keys = [f"{section}.{k}" for k in value if value[k] != then[section][k]] if isinstance(value, dict) else []
        raise UserError(f"{run.folder} was started with another {(keys or [section])[0]}; a resumed run may change "
                        f"only {' and '.join(MAY_DIFFER)}.\nStart a new run, or go on as it was: "
                        f"mlx-hjepa train {run.folder} --resume")

