"""The run folder: names, the newest, checkpoints that are checked before they are read, files that are whole."""

import hashlib
import json
import os
import shutil

import pytest

from mlx_hjepa import run as run_module
from mlx_hjepa.run import Run, UserError, digest, read_json, write_atomically

FILES = ("model.safetensors", "target.safetensors", "optimizer.safetensors")


@pytest.fixture
def run(tmp_path, tiny_config):
    return Run.create(tiny_config(), tmp_path / "results")


def add_checkpoint(run, step, latest=True):
    """A checkpoint folder as training leaves it, its weights being a few bytes."""
    folder = run.checkpoints / f"step-{step:09d}"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes(f"{name} at {step}".encode() * 100)
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    (folder / "state.json").write_text(json.dumps({"step": step, "digests": digests}))
    if latest:
        run.point("latest", folder)
    return folder


def kept(run):
    return sorted(int(folder.name.split("-")[1]) for folder in run.checkpoints.glob("step-*"))


# ---------------------------------------------------------------- folders and names


def test_a_second_run_of_a_name_gets_a_number(tmp_path, tiny_config):
    names = [Run.create(tiny_config(name="a"), tmp_path / "deep" / "results").name for _ in range(3)]
    assert names == ["a", "a-2", "a-3"]
    assert Run.create(tiny_config(name="b"), tmp_path / "deep" / "results").name == "b"


def test_a_new_run_holds_its_config(run, tiny_config):
    assert run.config == tiny_config()
    assert run.config_file == run.folder / "config.yaml"
    assert run.checkpoints.is_dir()
    assert {f.name for f in run.folder.iterdir()} == {"config.yaml", "checkpoints"}


def test_a_numbered_run_keeps_the_name_of_its_config(tmp_path, tiny_config):
    Run.create(tiny_config(name="a"), tmp_path)
    assert Run.create(tiny_config(name="a"), tmp_path).config.name == "a"


def test_the_files_of_a_run_are_those_of_the_design(run):
    paths = [run.config_file, run.environment_file, run.metrics_file, run.log_file, run.checkpoints, run.evaluation]
    names = [path.relative_to(run.folder).as_posix() for path in paths]
    assert names == ["config.yaml", "environment.json", "metrics.jsonl", "train.log", "checkpoints", "evaluation"]


def test_open_takes_a_folder_or_a_name(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Run.open(run.folder).folder == run.folder
    assert Run.open("tiny").folder.resolve() == run.folder
    assert Run.open("results/tiny").folder.resolve() == run.folder
    for nothing in ("nope", tmp_path, run.checkpoints):
        with pytest.raises(UserError, match="no run here"):
            Run.open(nothing)


def test_the_environment_is_read_or_missed_in_one_line(run):
    with pytest.raises(UserError, match=r"environment\.json: missing"):
        run.environment  # noqa: B018
    run.environment_file.write_text('{"precision": "fp32"}')
    assert run.environment == {"precision": "fp32"}
    run.environment_file.write_text('{"precision": ')
    with pytest.raises(UserError, match=r"environment\.json: damaged"):
        run.environment  # noqa: B018


# ---------------------------------------------------------------- the newest


def written(run, seconds, metrics=None):
    os.utime(run.config_file, (seconds, seconds))
    if metrics is not None:
        run.metrics_file.touch()
        os.utime(run.metrics_file, (metrics, metrics))


def test_the_newest_is_the_run_that_wrote_last(tmp_path, tiny_config):
    first, second, third = (Run.create(tiny_config(name=name), tmp_path) for name in ("c", "a", "b"))
    written(first, 100, metrics=900)  # started first, still training
    written(second, 300, metrics=400)
    written(third, 500)
    assert Run.newest(results=tmp_path).name == "c"
    written(third, 1000)  # just started, nothing logged yet
    assert Run.newest(results=tmp_path).name == "b"


def test_the_newest_of_a_name_counts_its_numbered_runs_only(tmp_path, tiny_config):
    for number, name in enumerate(["a", "a", "ab", "b"]):
        written(Run.create(tiny_config(name=name), tmp_path), 100 * (number + 1))
    assert Run.newest("a", tmp_path).name == "a-2"
    assert Run.newest("b", tmp_path).name == "b"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("model: [")
    assert Run.newest("a", tmp_path).name == "a-2"


def test_no_run_at_all_says_how_to_get_one(tmp_path, tiny_config):
    with pytest.raises(UserError, match=r"no run under .* yet\. Train one: mlx-hjepa train"):
        Run.newest(results=tmp_path / "none")
    Run.create(tiny_config(name="a"), tmp_path)
    with pytest.raises(UserError, match="no run named b under"):
        Run.newest("b", tmp_path)


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_by_pointer_name_and_path(run):
    old, new = add_checkpoint(run, 10), add_checkpoint(run, 200)
    run.point("best", old)
    assert run.checkpoint() == run.checkpoint("latest") == new
    assert run.checkpoint("best") == old
    assert run.checkpoint("step-000000010") == old
    assert run.checkpoint(str(old)) == old


def test_no_checkpoint_yet(run):
    for which in ("latest", "best"):
        with pytest.raises(UserError, match=f"no {which} checkpoint yet"):
            run.checkpoint(which)
    for nothing in ("step-000000007", str(run.folder)):
        with pytest.raises(UserError, match="not a checkpoint"):
            run.checkpoint(nothing)
    (run.checkpoints / "latest").write_text("step-000000007\n")
    with pytest.raises(UserError, match="step-000000007: not a checkpoint"):
        run.checkpoint()


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_by_name(run, name):
    folder = add_checkpoint(run, 10)
    whole = (folder / name).read_bytes()
    for damage in (whole[:-1], b"", b"X" + whole[1:]):
        (folder / name).write_bytes(damage)
        with pytest.raises(UserError, match=f"{name}: damaged. Use another checkpoint"):
            run.checkpoint()
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing. Use another checkpoint"):
        run.checkpoint()
    (folder / name).write_bytes(whole)
    assert run.checkpoint() == folder


@pytest.mark.parametrize("state", ["", "{", "{}", "[]", '{"digests": {}}', '{"digests": ["target.safetensors"]}'])
def test_a_damaged_state_is_refused(run, state):
    folder = add_checkpoint(run, 10)
    (folder / "state.json").write_text(state)
    with pytest.raises(UserError, match=r"state\.json: damaged"):
        run.checkpoint()


def test_retention_keeps_the_newest_and_the_best(run):
    for step in (5, 20, 100, 3000, 20000):
        add_checkpoint(run, step)
    run.remove_old_checkpoints(keep=9)
    assert kept(run) == [5, 20, 100, 3000, 20000]
    run.point("best", run.checkpoints / "step-000000020")
    run.remove_old_checkpoints(keep=2)
    assert kept(run) == [20, 3000, 20000]
    assert run.checkpoint("best").name == "step-000000020"
    assert run.checkpoint().name == "step-000020000"
    run.point("best", run.checkpoints / "step-000020000")
    run.remove_old_checkpoints(keep=1)
    assert kept(run) == [20000]


def test_retention_removes_what_a_killed_process_left(run):
    add_checkpoint(run, 5)
    (run.checkpoints / ".step-000000009.tmp").mkdir()
    (run.checkpoints / ".step-000000009.tmp" / "model.safetensors").write_bytes(b"half")
    run.remove_old_checkpoints(keep=1)
    assert {path.name for path in run.checkpoints.iterdir()} == {"step-000000005", "latest"}


def test_only_a_run_that_never_began_is_removed(tmp_path, tiny_config):
    logged, saved, empty = (Run.create(tiny_config(), tmp_path) for _ in range(3))
    logged.metrics_file.write_text("{}\n")
    add_checkpoint(saved, 1)
    empty.metrics_file.touch()
    for run in (logged, saved, empty):
        run.remove_if_empty()
    assert logged.folder.is_dir()
    assert saved.folder.is_dir()
    assert not empty.folder.exists()


def test_the_weights_of_a_published_run(run):
    assert run.published_weights == []
    (run.folder / "weights").mkdir()
    for number in (2, 1):
        (run.folder / "weights" / f"target-{number}.safetensors").touch()
    assert [file.name for file in run.published_weights] == ["target-1.safetensors", "target-2.safetensors"]


def test_a_folder_beside_published_results_is_scored_under_results_too(run):
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    assert not run.published
    (run.folder.parent / "results.json").write_text("[]")
    assert run.published
    assert run.scored.as_posix() == "results/tiny-published/evaluation"
    run.checkpoints.mkdir()
    assert not run.published


def test_a_published_folder_is_scored_under_results(run):
    assert run.scored == run.evaluation
    (run.folder / "weights").mkdir()
    (run.folder / "weights" / "target-1.safetensors").touch()
    assert run.scored.as_posix() == "results/tiny-published/evaluation"


# ---------------------------------------------------------------- whole files


def test_write_atomically_leaves_the_file_alone(tmp_path):
    file = tmp_path / "file.json"
    write_atomically(file, "old é")
    assert file.read_text(encoding="utf-8") == "old é"
    write_atomically(file, b"\x00new")
    assert file.read_bytes() == b"\x00new"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    file = tmp_path / "file.json"
    file.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module.os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_is_synced_under_another_name_before_it_is_renamed(tmp_path, monkeypatch):
    file, calls = tmp_path / "file.json", []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(handle):
        whole = [f.read_text() for f in tmp_path.iterdir()] == ["new"]
        calls.append(("fsync", whole, file.exists()))
        fsync(handle)

    def spy_replace(source, target):
        calls.append(("replace", os.path.dirname(source) == os.path.dirname(target), file.exists()))
        replace(source, target)

    monkeypatch.setattr(run_module.os, "fsync", spy_fsync)
    monkeypatch.setattr(run_module.os, "replace", spy_replace)
    write_atomically(file, "new")
    # the file, the rename inside one folder, then the folder that holds the name
    assert calls == [("fsync", True, False), ("replace", True, False), ("fsync", True, True)]


def test_digest_is_sha256_of_the_whole_file(tmp_path):
    file = tmp_path / "big"
    content = os.urandom((1 << 22) + 17)  # more than one block
    file.write_bytes(content)
    assert digest(file) == hashlib.sha256(content).hexdigest()


def test_read_json(tmp_path):
    (tmp_path / "good.json").write_text('{"a": [1]}')
    assert read_json(tmp_path / "good.json") == {"a": [1]}
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"bytes\.json: damaged"):
        read_json(tmp_path / "bytes.json")
