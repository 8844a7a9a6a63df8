import subprocess
import sys
import threading
import time

import pytest

from mlx_hjepa.train.watchdog import Watchdog

STANDS_STILL = """
import sys, time
from mlx_hjepa import cli
from mlx_hjepa.train import trainer, watchdog
advance = trainer.Trainer._advance
def hang(self, step, images):
    if step == 6:
        time.sleep(600)
    advance(self, step, images)
trainer.Trainer._advance = hang
trainer.Watchdog = lambda act: watchdog.Watchdog(act, 0.5)
watchdog.LONGEST = 1
cli.main(["train", "tiny.yaml"])
"""


@pytest.fixture
def acted():
    return threading.Event()


def test_a_wait_that_does_not_end_is_acted_on(acted):
    watchdog = Watchdog(lambda waited: acted.set(), 0.2)
    with watchdog:
        assert acted.wait(5)


def test_waits_that_end_are_not(acted):
    watchdog = Watchdog(lambda waited: acted.set(), 0.4)
    for _ in range(6):
        with watchdog:
            time.sleep(0.1)
    time.sleep(0.6)  # outside of any wait
    assert not acted.is_set()


def test_slow_steps_are_given_their_time(acted):
    watchdog = Watchdog(lambda waited: acted.set(), 0.1)
    watchdog.longest = 1.0
    with watchdog:
        time.sleep(0.5)
    assert not acted.is_set()


@pytest.mark.parametrize(("minutes", "status", "word"), [(1e-6, 0, "Going on from the newest checkpoint"),
                                                         (10, 75, "There is no checkpoint yet")])
def test_a_run_that_stands_still_goes_on_by_itself(tmp_path, tiny_config, minutes, status, word):
    config = tiny_config(training={"epochs": 1}, checkpoints={"every_minutes": minutes})
    (tmp_path / "tiny.yaml").write_text(config.dump())
    done = subprocess.run([sys.executable, "-c", STANDS_STILL], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert (done.returncode, word in done.stderr) == (status, True), done.stderr
    log = next(tmp_path.glob("results/*/train.log")).read_text()
    assert ("resumed at step" in log and "finished" in log) == (status == 0)
