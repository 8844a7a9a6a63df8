"""One report of a run: whole, honest about what it scored, and refused where its numbers would mean nothing."""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from mlx_hjepa import backend, config
from mlx_hjepa.cli import main
from mlx_hjepa.data import Pictures
from mlx_hjepa.data.dataset import load_dataset
from mlx_hjepa.data.digits import NOTE
from mlx_hjepa.evaluate import report as module
from mlx_hjepa.evaluate import summary
from mlx_hjepa.evaluate.features import FrozenEncoder, random_encoder
from mlx_hjepa.evaluate.report import Protocols, Target, evaluate
from mlx_hjepa.evaluate.subject import Subject, splits
from mlx_hjepa.metrics import wilson_interval
from mlx_hjepa.run import Run, UserError, digest
from mlx_hjepa.train import trainer

spec = importlib.util.spec_from_file_location("publish", Path(__file__).parents[1] / "tools" / "publish.py")
publish = importlib.util.module_from_spec(spec)
spec.loader.exec_module(publish)

TINY = {
    "name": "tiny",
    "data": {"dataset": "digits", "source": "resident", "image_size": 8},
    "augment": {"crop": "random_resized", "scale": [0.7, 1.0], "flip": False},
    "model": {"dim": 32, "depth": 2, "head_dim": 16, "patch": 2, "levels": [1, 2]},
    "predictor": {"dim": 32, "depth": 1, "head_dim": 16},
    "masking": {"target_tokens": 4, "context_tokens": 6, "target_blocks": 2},
    "training": {"epochs": 1, "batch": 64, "warmup_epochs": 0.5, "precision": "fp32"},
    "logging": {"health_every": 1, "knn_every": 1},
}
KNN = Protocols(knn=True, linear=False)
NONE = Protocols(knn=False, linear=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One run of 22 steps, its k-NN and linear probe on every level, and what was said of it."""
    folder = tmp_path_factory.mktemp("trained")
    run = Run.create(config.build(TINY), folder / "results")
    trainer.train(run.config, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(module, "probe", functools.partial(module.probe, epochs=10))
        result = CliRunner().invoke(main, ["eval", "--subset", "400"])
    assert result.exit_code == 0, result.output
    return run, result


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, its report and its cache, to be spoilt."""
    shutil.copytree(trained[0].folder, tmp_path / "results" / "tiny")
    return Run(tmp_path / "results" / "tiny")


@pytest.fixture
def cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(main, [str(word) for word in words])


def report_of(run, name="report-subset400"):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")
    return json.loads((run.evaluation / f"{name}.json").read_text(), parse_constant=refuse)


def reports(run):
    return {file.stem for file in run.evaluation.glob("*.json")}


def environment_of(run, source, **facts):
    """The environment of another run, but for these facts about the data."""
    environment = source.environment
    environment["dataset"] |= facts
    run.environment_file.write_text(json.dumps(environment))


def quiet(text):
    pass


def replant(run, change):
    """The newest checkpoint's weights changed as if they had been saved so."""
    folder = run.checkpoint()
    for name in ("target.safetensors", "model.safetensors"):
        weights = {n: change(w) for n, w in mx.load(str(folder / name)).items()}
        mx.eval(weights)
        mx.save_safetensors(str(folder / name), weights)
    state = json.loads((folder / "state.json").read_text())
    state["digests"] = {name: digest(folder / name) for name in state["digests"]}
    (folder / "state.json").write_text(json.dumps(state))


def mistake(result):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    said, _, error = result.stderr.rpartition("error: ")
    assert error, result.stderr
    assert len(error.splitlines()) <= 2
    assert "Traceback" not in said + error
    return error


def folder_of(root, sizes, seed=0):
    """train/<class>/* and test/<class>/* of random pictures; sizes: {"train/cat": 12, ...}."""
    rng = np.random.default_rng(seed)
    for place, count in sizes.items():
        (root / place).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / place / f"{i}.png")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_HJEPA_CACHE", str(tmp_path / "cache"))


# ---------------------------------------------------------------- the report


def test_raw_random_and_trained_are_in_one_table(trained):
    run, result = trained
    rows = report_of(run)["rows"]
    assert {name: list(levels) for name, levels in rows.items()} == {
        "raw": ["last"], "random": ["last", "levels"], "trained": ["last", "levels", "1", "last4"]}
    for levels in rows.values():
        for scores in levels.values():
            for kind in ("knn", "linear"):
                low, high = scores[kind]["interval"]
                assert 0 <= low <= scores[kind]["accuracy"] <= high <= 1
                assert len(scores[kind]["per_class"]) == 10
            assert 1 <= scores["effective_rank"] <= scores["dim"]
    assert rows["raw"]["last"]["dim"] == 192
    assert [rows["trained"][level]["dim"] for level in ("last", "levels", "1", "last4")] == [32, 64, 32, 64]
    assert rows["raw"]["last"]["knn"]["accuracy"] > 0.9  # digits are easy
    text = (run.evaluation / "report-subset400.md").read_text()
    for out in (result.stdout, text):
        for word in ("raw", "random", "trained", "levels", "last4"):
            assert word in out
        assert f"{100 * rows['trained']['levels']['knn']['accuracy']:.1f} ±" in out


def test_the_report_says_what_was_scored_and_where_it_comes_from(trained):
    run, result = trained
    report = report_of(run)
    assert report["dataset"]["subset"] == 400
    assert (report["dataset"]["train"], report["dataset"]["test"]) == (400, 360)
    assert (report["step"], report["pictures_seen"]) == (22, 22 * 64)
    assert report["weights"] == digest(run.checkpoint() / "target.safetensors")
    text = (run.evaluation / "report-subset400.md").read_text()
    for out in (" ".join(result.stdout.split()), text):
        assert "a subset: at most 400 pictures of each split" in out
    for word in ("360 test pictures", "bank of 400", "seed 0", report["weights"], "evaluation took",
                 "![report-subset400-knn.png]", "![report-subset400-confusion.png]", "| knn | ", "k-NN top-5",
                 "`mlx-hjepa"):
        assert word in text
    levels = report["rows"]["trained"]["levels"]
    best = max(levels["knn"]["sweep"], key=lambda s: s["accuracy"])
    assert f"{100 * best['accuracy']:.1f} at k {best['k']}, T {best['T']:g}" in text
    assert f"| {100 * levels['knn']['top5']:.1f} | {100 * levels['linear']['top5']:.1f} |" in text
    white = levels["knn"]["whitened"]
    assert (white["dims"], f"| {100 * white['accuracy']:.1f} ± " in text) == (32, True)  # the encoder's width, of 64
    assert "whitened" not in report["rows"]["raw"]["last"]["knn"]


def test_pictures_are_small_and_only_of_what_ran(run):
    names = {f"report-subset400-{part}.png" for part in ("knn", "levels", "confusion")}
    assert {f.name for f in run.evaluation.glob("*.png")} == names
    for name in names:
        assert (run.evaluation / name).stat().st_size < 150_000
        with Image.open(run.evaluation / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    (run.evaluation / "report-subset400.json").unlink()
    summary.write(run, evaluate(run, KNN, Target(subset=400), quiet))
    assert {f.name for f in run.evaluation.glob("*.png")} == names - {"report-subset400-confusion.png"}
    assert "confusion" not in (run.evaluation / "report-subset400.md").read_text()


def test_the_random_row_is_the_encoder_of_step_0(run, tmp_path):
    settings = config.build({**TINY, "training": {**TINY["training"], "lr": 1e-12, "min_lr": 0}})
    still = Run.create(settings, tmp_path / "still")
    trainer.train(settings, still)
    start = evaluate(still, KNN, Target(subset=300), quiet)["rows"]
    moved = evaluate(run, KNN, Target(subset=300), quiet)["rows"]
    assert start["trained"]["last"]["knn"] == start["random"]["last"]["knn"] == moved["random"]["last"]["knn"]
    assert moved["trained"]["last"]["knn"] != moved["random"]["last"]["knn"]


def test_features_are_computed_once_for_the_same_weights_and_data(run, monkeypatch):
    calls = []
    extract = FrozenEncoder.extract
    monkeypatch.setattr(FrozenEncoder, "extract", lambda self, *a, **k: calls.append(1) or extract(self, *a, **k))
    what = Target(subset=400)
    before = report_of(run)["rows"]["trained"]["last"]["knn"]["sweep"]
    first = evaluate(run, KNN, what, quiet)
    assert calls == []  # the run's own evaluation left them
    assert first["rows"]["trained"]["last"]["knn"]["sweep"] == before
    evaluate(run, NONE, Target(subset=300), quiet)
    assert len(calls) == 2  # other pictures: no bank is needed for the rank alone
    evaluate(run, NONE, Target(encoder="context", subset=300), quiet)
    assert len(calls) == 3  # other weights: only the trained one's
    file = next((run.evaluation / "features").glob("trained-test*"))
    for other in (run.evaluation / "features").glob("*"):
        other.write_bytes(file.read_bytes()[:200])  # as a full disk leaves it
    again = evaluate(run, KNN, what, quiet)["rows"]
    assert again["trained"]["last"]["knn"]["sweep"] == first["rows"]["trained"]["last"]["knn"]["sweep"]
    assert len(calls) == 7


def test_changed_weights_are_scored_anew(run):
    before = evaluate(run, KNN, Target(subset=400), quiet)["rows"]["trained"]
    replant(run, lambda w: w * 1.5)
    after = evaluate(run, KNN, Target(subset=400), quiet)["rows"]["trained"]
    assert before["last"]["effective_rank"] != after["last"]["effective_rank"]


def test_a_random_encoder_of_other_code_is_not_taken_from_the_cache(run):
    """Its features lie under the run, but what `init` draws may change under it."""
    encoder, split = random_encoder(run), splits(load_dataset(run.config.data), 0, 300)
    other = FrozenEncoder(run.config, {n: w * 2 for n, w in encoder.weights.items()}, encoder.mean, encoder.std)
    assert other.digest != encoder.digest
    assert FrozenEncoder(run.config, encoder.weights, (0.0, 0.0, 0.0), encoder.std).digest != encoder.digest
    found = [Subject("random", split, e, run.evaluation / "features", e.digest).depth_features("test")
             for e in (encoder, other, encoder)]
    np.testing.assert_array_equal(found[0], found[2])
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_features_that_nothing_asks_for_any_more_are_removed(run):
    folder = run.evaluation / "features"
    assert len(list(folder.iterdir())) == 4
    dead = subprocess.Popen(["true"])
    dead.wait()
    mine, killed, strange = (folder / f"trained-test-0123.{pid}.tmp" for pid in (os.getpid(), dead.pid, "x"))
    for file in (mine, killed, strange):
        file.write_bytes(b"half")
    replant(run, lambda w: w * 1.5)
    before = {file.name for file in folder.glob("*.npy")}
    evaluate(run, KNN, Target(subset=400), quiet)
    after = {file.name for file in folder.glob("*.npy")}
    assert len(after) == 4
    assert {name.split("-")[0] for name in before & after} == {"random"}
    assert (mine.exists(), killed.exists(), strange.exists()) == (True, False, True)


def test_a_class_without_test_pictures_is_no_nan_in_the_json(run, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(module, "probe", functools.partial(module.probe, epochs=5))
    root = folder_of(tmp_path / "p", {"train/a": 20, "train/b": 20, "test/b": 12})
    result = cli("eval", run.folder, "--linear", "--knn", "--dataset", "folder", "--root", root, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert report["rows"]["raw"]["last"]["linear"]["per_class"][0] is None
    assert report["rows"]["raw"]["last"]["knn"]["per_class"][0] is None


# ---------------------------------------------------------------- planted faults


def test_a_constant_encoder_is_called_collapsed(run, cli):
    replant(run, mx.zeros_like)
    result = cli("eval", "--quality", "--subset", 200)
    assert result.exit_code == 0, result.output
    assert "features: collapsed (normalised std" in result.stdout
    report = report_of(run, "report-subset200")
    assert report["verdict"] == "collapsed"
    assert report["quality"]["random"]["verdict"] != "collapsed"
    cosine = report["quality"]["trained"]["by_level"]["last"]["cosine"]
    text = (run.evaluation / "report-subset200.md").read_text()
    assert "**Features: collapsed** (normalised std" in text
    assert "{mean:.2f} ({p5:.2f} to {p95:.2f})".format(**cosine) in text
    assert (run.evaluation / "report-subset200-spectrum.png").stat().st_size < 150_000


def test_shuffled_labels_give_chance(run, monkeypatch):
    data = load_dataset(run.config.data)
    rng = np.random.default_rng(0)
    mixed = [Pictures(part.images, rng.permutation(part.labels)) for part in (data.train, data.test)]
    monkeypatch.setattr(module, "load_dataset", lambda *a, **k: replace(data, train=mixed[0], test=mixed[1]))
    rows = evaluate(run, Protocols(), Target(subset=400), quiet)["rows"]
    for name in ("raw", "trained"):
        for kind in ("knn", "linear"):
            assert abs(rows[name]["last"][kind]["accuracy"] - 0.1) < 4 * np.sqrt(0.09 / 360), (name, kind)


def test_leaked_test_pictures_are_refused(run, tmp_path, cli):
    root = folder_of(tmp_path / "p", {"train/a": 30, "train/b": 30, "test/a": 10, "test/b": 10})
    shutil.copy(root / "train/a/3.png", root / "test/b/0.png")
    assert "1 of the 20 test pictures are in the training pictures too" in mistake(
        cli("eval", run.folder, "--dataset", "folder", "--root", root))
    assert reports(run) == {"report-subset400"}


def test_a_few_pictures_twice_are_no_leak_but_told(run, monkeypatch):
    data = load_dataset(run.config.data)
    images = data.test.images.copy()
    images[:3] = data.train.images[:3]
    twice = replace(data, test=Pictures(images, data.test.labels))
    split = splits(twice, 0)
    assert (len(split.test_rows), split.leaked, splits(data, 0).leaked) == (360, 3, 0)
    monkeypatch.setattr(module, "load_dataset", lambda *a, **k: twice)
    report = evaluate(run, KNN, Target(), quiet)
    assert report["dataset"]["leaked"] == 3
    assert "3 test pictures lie in the bank too, byte for byte." in summary.markdown(run, report)
    images[:4] = data.train.images[:4]
    with pytest.raises(UserError, match="4 of the 360 test pictures"):
        splits(twice, 0)


def test_a_diverged_encoder_is_told(run, cli):
    replant(run, lambda w: w * float("nan"))
    text = mistake(cli("eval", "--few-shot", "--subset", 200))
    assert "not finite; the checkpoint may come from a run that diverged" in text


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(("sizes", "words", "message"), [
    ({"train/a": 2, "train/b": 1, "train/c": 148, "test/a": 9}, ["--subset", "100"],
     "class 'b' has no picture in the bank of 100"),
    ({"train/a": 8, "train/b": 8, "test/a": 4}, [], "k-NN: k 20 with a bank of 16 pictures; k can be 1 to 16"),
    ({"train/a": 3, "train/b": 3, "test/a": 4}, ["--linear"], "6 training and 4 test pictures are too few"),
    ({"all": 12}, [], "these pictures have no labels"),
    ({}, [], "no pictures here"),
    (None, [], "no such folder"),
])
def test_folders_that_cannot_be_scored(run, tmp_path, cli, sizes, words, message):
    root = tmp_path / "p"
    if sizes is not None:
        root.mkdir()
        folder_of(root, sizes)
    assert message in mistake(cli("eval", run.folder, "--dataset", "folder", "--root", root, *words))


def test_a_truncated_or_missing_checkpoint(run, cli):
    file = run.checkpoint() / "target.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for words in (["eval"], ["embed", "tiny", ".", "--out", "x.npz"], ["export", "tiny", "out"]):
        assert "target.safetensors: damaged. Use another checkpoint" in mistake(cli(*words))
    file.unlink()
    assert "target.safetensors: missing. Use another checkpoint" in mistake(cli("eval"))
    (run.checkpoints / "latest").unlink()
    assert "no latest checkpoint yet" in mistake(cli("eval"))
    assert "not a checkpoint" in mistake(cli("eval", "--checkpoint", "nowhere"))


def test_a_run_of_other_code(run, cli):
    folder = run.checkpoint()
    weights = dict(mx.load(str(folder / "target.safetensors")))
    mx.save_safetensors(str(folder / "target.safetensors"), {f"student.{n}": w for n, w in weights.items()})
    state = json.loads((folder / "state.json").read_text())
    state["digests"]["target.safetensors"] = digest(folder / "target.safetensors")
    (folder / "state.json").write_text(json.dumps(state))
    assert "were written by other code" in mistake(cli("eval"))
    del state["seconds"]
    (folder / "state.json").write_text(json.dumps(state))
    assert "without 'seconds', so written by other code" in mistake(cli("eval", "--encoder", "context"))
    run.config_file.write_text(run.config_file.read_text().replace("head_dim", "heads_dim"))
    assert "heads_dim" in mistake(cli("eval"))


def test_options_that_make_no_sense(run, cli):
    assert "data.root" in mistake(cli("eval", "--dataset", "folder"))
    assert "leaves both out" in mistake(cli("eval", "--fine-tune", "--fine-tune-epochs", 0, 0))
    for words in (["--fine-tune-size", 16], ["--knn", "--fine-tune-epochs", 1, 1]):
        assert "go with --fine-tune or --all" in mistake(cli("eval", *words))
    told = mistake(cli("eval", "--fine-tune", "--fine-tune-size", 9))
    assert "--fine-tune-size 9: give a multiple of 2, the side of a patch of results/tiny" in told
    for words in (["--root", "p"], ["--dataset", "digits", "--root", "p"]):
        assert "--root p: the digits come with scikit-learn and have no folder" in mistake(cli("eval", *words))
    for words in (["--fine-tune-epochs", "101", "0"], ["--fine-tune-epochs", "1"], ["--subset", "5"]):
        result = cli("eval", *words)
        assert (result.exit_code, "Traceback" in result.stderr) == (2, False)


# ---------------------------------------------------------------- what is kept of earlier calls

TUNED = Protocols(knn=True, linear=False, fine_tune=True, fine_tune_epochs=(1, 0))


def test_every_choice_of_what_is_scored_has_a_report_of_its_own(run):
    evaluate(run, TUNED, Target(), quiet)
    for what in (Target(subset=300), Target(), Target(subset=300), Target(validation=True), Target(encoder="context")):
        evaluate(run, KNN, what, quiet)
    assert reports(run) == {"report-subset400", "report", "report-subset300", "report-validation", "report-context"}
    assert report_of(run, "report")["fine_tune"]["epochs"] == 1
    assert "linear" in report_of(run)["rows"]["raw"]["last"]
    first = run.checkpoint()
    second = shutil.copytree(first, run.checkpoints / "step-000000044")
    run.point("latest", second)
    replant(run, lambda w: w * 1.5)
    run.point("best", first)
    old = [evaluate(run, KNN, Target(checkpoint=which), quiet) for which in ("best", first.name, str(first))]
    assert {report["name"] for report in old} == {"report-step-000000022"}
    assert evaluate(run, KNN, Target(checkpoint=str(second)), quiet)["name"] == "report"


def test_a_report_of_other_weights_is_moved_aside_and_never_over_another(run):
    found = [report_of(run)]
    for scale in (1.5, 1.2):
        replant(run, lambda w, scale=scale: w * scale)
        found.append(evaluate(run, KNN, Target(subset=400), quiet))
    assert "linear" not in found[1]["rows"]["raw"]["last"]
    kept = [report_of(run, f"report-subset400-step-000000022{end}") for end in ("", "-2")] + [report_of(run)]
    assert json.loads(json.dumps(found)) == kept


def test_a_report_of_older_code_is_moved_aside(run):
    old = report_of(run) | {"protocols": {"knn": True, "linear": True, "fine_tune_epochs": None}}
    (run.evaluation / "report-subset400.json").write_text(json.dumps(old))
    assert "linear" not in evaluate(run, KNN, Target(subset=400), quiet)["rows"]["raw"]["last"]
    assert report_of(run, "report-subset400-step-000000022") == old


def test_each_protocol_says_how_it_ran_and_the_last_time_counts(run, monkeypatch):
    file = run.evaluation / "report-subset400.json"
    before = report_of(run)
    before["protocols"]["knn"] |= {"seconds": 1000.0, "commit": "old", "device": "another"}
    before["protocols"]["linear"] |= {"seconds": 500.0, "commit": "old", "device": "another"}
    file.write_text(json.dumps(before))
    commands = ("--fine-tune-epochs 1 0", "--fine-tune-epochs 0 1", "--fine-tune-epochs 2 0")
    for words, epochs in zip(commands, ((1, 0), (0, 1), (2, 0)), strict=True):
        monkeypatch.setattr(sys, "argv", ["mlx-hjepa", *words.split()])
        protocols = Protocols(knn=True, linear=False, fine_tune=True, fine_tune_epochs=epochs)
        report = evaluate(run, protocols, Target(subset=400), quiet)
    ran = report["protocols"]
    assert {name: how["command"].removeprefix("mlx-hjepa ") for name, how in ran.items() if name != "linear"} == {
        "knn": commands[2], "fine_tune": commands[2], "scratch": commands[1]}
    assert (ran["linear"]["commit"], ran["linear"]["device"]) == ("old", "another")
    assert ran["knn"]["device"] == report["device"]["name"] != "another"
    assert (report["fine_tune"]["epochs"], report["scratch"]["epochs"]) == (2, 1)
    assert report["seconds"] == pytest.approx(sum(how["seconds"] for how in ran.values()))
    assert 500 < report["seconds"] < 600
    assert "| linear | 500 | another | old |" in summary.markdown(run, report)
    ran["linear"]["commit"] = report["versions"]["mlx-data"] = None  # no git, no mlx-data
    text = summary.markdown(run, report)
    assert "| linear | 500 | another | not known |" in text
    assert "mlx-data -, numpy " in text
    assert "None" not in text


def test_what_is_done_outlives_an_interruption(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "fine_tune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, TUNED, Target(subset=300), quiet)
    report = report_of(run, "report-subset300")
    assert list(report["protocols"]) == ["knn"]
    accuracy = report["rows"]["trained"]["levels"]["knn"]["accuracy"]
    assert f"{100 * accuracy:.1f} ±" in (run.evaluation / "report-subset300.md").read_text()


@pytest.mark.parametrize(("content", "message"), [
    ("{", "damaged, not JSON"), ("{}", "not a report of mlx-hjepa. Move it away"), ("[]", "not a report"),
    ('{"rows": {}, "dataset": "digits"}', "not a report")])
def test_a_damaged_earlier_report_is_told_before_the_work(run, cli, monkeypatch, content, message):
    (run.evaluation / "report-subset400.json").write_text(content)
    monkeypatch.setattr(module, "Subject", None)
    assert message in mistake(cli("eval", "--subset", 400))
    assert (run.evaluation / "report-subset400.json").read_text() == content


def test_no_protocol_mirrors_digits(run, tmp_path, monkeypatch):
    run.config_file.write_text(run.config_file.read_text().replace("flip: false", "flip: true"))
    mirrored, probe = [], module.probe
    monkeypatch.setattr(module, "probe", lambda train, *a, **k: mirrored.append(train.mirror is not None) or probe(
        train, *a, **(k | {"epochs": 1})))
    protocols = replace(TUNED, linear=True)
    report = evaluate(run, protocols, Target(subset=300), quiet)
    assert not report["fine_tune"]["settings"]["augment"]["flip"]
    assert not any(mirrored)
    data = config.Data(dataset="folder", image_size=8,
                       root=str(folder_of(tmp_path / "p", {"train/a": 40, "train/b": 40, "test/a": 9, "test/b": 9})))
    report = evaluate(run, protocols, Target(data=data), quiet)
    assert report["fine_tune"]["settings"]["augment"]["flip"]
    assert mirrored[-1]


# ---------------------------------------------------------------- runs and data


def test_eval_takes_the_newest_run_and_prints_json(run, cli, tmp_path):
    older = tmp_path / "results" / "older"
    shutil.copytree(run.folder, older)
    for file in (older / "metrics.jsonl", older / "config.yaml"):
        os.utime(file, (1, 1))
    result = cli("eval", "--knn", "--subset", 400, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["run"] == "tiny"
    assert found == report_of(run)
    assert "linear" in found["rows"]["trained"]["last"], "what an earlier call found is kept"


def test_transfer_is_scored_on_the_other_pictures(run, tmp_path, cli):
    before = (run.evaluation / "report-subset400.json").read_bytes()
    root = folder_of(tmp_path / "p", {"train/a": 20, "train/b": 20, "test/a": 9, "test/b": 9})
    data = {**TINY["data"], "dataset": "folder", "root": str(root)}
    other = Run.create(config.build({**TINY, "name": "other", "data": data}), tmp_path / "results")
    shutil.copytree(run.checkpoints, other.checkpoints, dirs_exist_ok=True)
    environment_of(other, run, fingerprint="that of the folder")
    found = evaluate(other, KNN, Target(data=config.section(config.Data, "data", {
        "dataset": "digits", "image_size": 8, "source": "resident"})), quiet)
    assert (found["dataset"]["name"], found["dataset"]["transfer"]) == ("digits", True)
    assert (found["dataset"]["train"], found["dataset"]["test"]) == (1437, 360)
    assert json.loads(json.dumps(found)) == report_of(other, "report-digits")
    result = cli("eval", "tiny", "--knn", "--dataset", "folder", "--root", root)
    assert result.exit_code == 0, result.output
    name = f"report-folder-{load_dataset(other.config.data, say=quiet).fingerprint[:8]}"
    assert report_of(run, name)["classes"] == ["a", "b"]
    assert (run.evaluation / f"{name}.md").is_file()
    assert reports(run) == {"report-subset400", name}
    assert (run.evaluation / "report-subset400.json").read_bytes() == before


def test_the_runs_own_pictures_at_another_place_are_no_transfer(run, tmp_path, cli):
    own, other = (folder_of(tmp_path / name, {"train/a": 20, "train/b": 20, "test/a": 9, "test/b": 9}, seed)
                  for seed, name in enumerate(("own", "other")))
    shutil.copytree(run.folder, tmp_path / "results" / "of_digits")
    data = {**TINY["data"], "dataset": "folder", "root": "/no/such/place"}
    run.config_file.write_text(config.build({**TINY, "data": data}).dump())
    found = load_dataset(config.Data(dataset="folder", root=str(own), image_size=8), say=quiet)
    environment_of(run, run, fingerprint=found.fingerprint)
    assert "no such folder" in mistake(cli("eval", "tiny", "--knn"))
    assert "digits come with scikit-learn" in mistake(cli("eval", "tiny", "of_digits", "--knn", "--root", own))
    for root in (own, other):
        assert cli("eval", "tiny", "--knn", "--root", root).exit_code == 0
    (other,) = reports(run) - {"report-subset400", "report"}
    assert not report_of(run, "report")["dataset"]["transfer"]
    assert report_of(run, other)["dataset"]["transfer"]


def test_an_environment_without_a_fingerprint(run, cli):
    environment_of(run, run, fingerprint=None)
    assert "without the data's fingerprint, so written by other code" in mistake(cli("eval"))


def test_each_protocol_alone(run, cli, monkeypatch):
    shorten(monkeypatch)
    for words, kinds, whole in ((["--linear"], {"linear"}, set()), (["--few-shot"], {"few_shot"}, set()),
                                (["--quality"], set(), {"quality", "verdict", "reason"}),
                                (["--fine-tune", "--fine-tune-epochs", 0, 1], set(), {"scratch"})):
        result = cli("eval", "--subset", 200, *words)
        assert result.exit_code == 0, result.output
        report = report_of(run, "report-subset200")
        found = {kind for levels in report["rows"].values() for scores in levels.values() for kind in scores}
        assert found == {"dim", "effective_rank", *kinds}
        assert report.keys() - report_of(run).keys() == whole
        (run.evaluation / "report-subset200.json").unlink()


def test_fine_tuning_at_another_size_is_said_where_it_counts(run, cli):
    result = cli("eval", "--subset", 100, "--fine-tune", "--fine-tune-epochs", 1, 0, "--fine-tune-size", 12)
    assert result.exit_code == 0, result.output
    assert "1 epochs, 12 px" in result.output
    assert report_of(run, "report-subset100")["fine_tune"]["settings"]["size"] == 12
    assert "after epoch 1 of 1, 12 px, chosen" in (run.evaluation / "report-subset100.md").read_text()


def test_another_data_set_by_its_name(run, cli, tmp_path):
    environment_of(run, run, fingerprint="of other pictures")
    result = cli("eval", "--knn", "--dataset", "digits")
    assert result.exit_code == 0, result.output
    assert report_of(run, "report-digits")["dataset"]["transfer"]


def test_progress_is_for_a_terminal(run, cli, tmp_path, monkeypatch):
    shorten(monkeypatch)
    folder_of(tmp_path / "p", {"all": 3})
    commands = (["eval", "--all", "--subset", 400, "--fine-tune-epochs", 1, 1],
                ["embed", "tiny", tmp_path / "p", "--out", "x.npz", "--force"])
    words = ("trained: test", "k-NN: raw, last", "linear probe: trained, last4", "few-shot episodes: random, levels",
             "few labels: trained, last", "augmented probe", "trained: views", "fine-tuning",
             "from scratch", "embedding")
    plain = [cli(*command) for command in commands]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    shutil.rmtree(run.evaluation)
    drawn = [cli(*command) for command in commands]
    assert [result.exit_code for result in (*plain, *drawn)] == [0] * 4
    assert "━" in drawn[0].stderr
    for word in words:
        assert word in "".join(result.stderr for result in drawn), word
    said = "".join(result.stderr for result in plain).splitlines()
    assert said == [NOTE, "features ...", "k-NN ...", "linear probe ...", "few-shot ...", "feature quality ...",
                    "linear probe on fresh crops ...", "fine-tuning ...", "the same network from scratch ...",
                    "3 pictures, 64 numbers each; arrays features, names, level, run"]


def test_features_and_weights_leave_by_the_commands(run, cli, tmp_path):
    folder_of(tmp_path / "p", {"all": 3})
    result = cli("embed", "tiny", tmp_path / "p", "--out", "x.npz", "--level", "last", "--encoder", "context")
    assert result.exit_code == 0, result.output
    assert "written to x.npz" in result.stdout
    with np.load("x.npz") as found:
        assert found["features"].shape == (3, 32)
        assert found["names"].tolist() == [f"all/{i}.png" for i in range(3)]
    assert "already there" in mistake(cli("embed", "tiny", tmp_path / "p", "--out", "x.npz"))
    result = cli("export", "tiny", "out", "--encoder", "context")
    assert result.exit_code == 0, result.output
    assert {f.name for f in Path("out").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert json.loads(Path("out/config.json").read_text())["mlx_hjepa"]["encoder"] == "context"
    assert "already there" in mistake(cli("export", "tiny", "out"))


@pytest.mark.slow
def test_the_script_runs_everything(run, tmp_path):
    script = Path(__file__).parents[1] / "tools" / "eval_after_training.sh"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run([script, "tiny", "--subset", "100", "--fine-tune-epochs", "1", "1"], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    assert len(report_of(run, "report-subset100")["protocols"]) == 7
    for word in ("tiny: digits", "features: ", "from scratch", "report-subset100.md"):
        assert word in done.stdout


def test_without_a_test_split_held_out_pictures_are_scored(run, tmp_path, cli):
    root = folder_of(tmp_path / "p", {"train/a": 40, "train/b": 40})
    result = cli("eval", "tiny", "--knn", "--dataset", "folder", "--root", root)
    assert result.exit_code == 0, result.output
    (name,) = reports(run) - {"report-subset400"}
    report = report_of(run, name)
    assert (report["dataset"]["train"], report["dataset"]["test"]) == (72, 8)
    assert "no test split: scored on 8" in (run.evaluation / f"{name}.md").read_text()


def shorten(monkeypatch):
    for name, shorter in (("probe", {"epochs": 5}), ("augmented_probe", {"epochs": 2}), ("episodes", {"episodes": 30}),
                          ("few_labels", {"draws": 2}), ("quality", {"views": 4})):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), **shorter))


def test_everything_at_once(run, cli, monkeypatch):
    """--all: every protocol's numbers and pictures, on the rows that it is for."""
    shorten(monkeypatch)
    result = cli("eval", "--all", "--subset", 150, "--fine-tune-epochs", 1, 2)
    assert result.exit_code == 0, result.output
    report = report_of(run, "report-subset150")
    assert list(report["protocols"]) == ["knn", "linear", "few_shot", "quality", "augmented", "fine_tune", "scratch"]
    assert (report["fine_tune"]["epochs"], report["scratch"]["epochs"]) == (1, 2)
    assert {(name, level, kind) for name, levels in report["rows"].items() for level, scores in levels.items()
            for kind in scores if kind not in ("dim", "effective_rank")} == {
        *((name, level, kind) for name in ("random", "trained", "context") for level in ("last", "levels")
          for kind in ("knn", "linear", "few_shot") if (name, kind) != ("context", "few_shot")),
        *(("trained", level, kind) for level in ("1", "last4") for kind in ("knn", "linear")),
        *(("raw", "last", kind) for kind in ("knn", "linear", "few_shot")),
        *(("trained", level, "linear_augmented") for level in ("last", "levels"))}
    assert report["rows"]["context"]["last"]["knn"] != report["rows"]["trained"]["last"]["knn"]
    text = (run.evaluation / "report-subset150.md").read_text()
    for word in ("Fine-tuned: ", "The same network from scratch: ", "## k-NN", "## Few-shot episodes",
                 "## k labels a class", "## Feature quality", "LiDAR", "Linear probe on fresh crops"):
        assert word in text
    verdicts = ("| healthy |", "| weak |", "| collapsed |")
    judged = [line for line in text.splitlines() if line.endswith(verdicts)]
    assert [line.split(" | ")[:2] for line in judged] == [["| random", "last"], ["| trained", "last"]]
    for part in ("knn", "levels", "confusion", "spectrum"):
        assert 0 < (run.evaluation / f"report-subset150-{part}.png").stat().st_size < 150_000
    skipped = report["rows"]["raw"]["last"]["few_shot"]["labels"]["skipped"]
    assert "50" in skipped
    for out in (text, result.stdout):
        assert f"50: {skipped['50']}" in out
    for word in ("fine-tuned", "from scratch", f"features: {report['verdict']} ({report['reason']})",
                 "Linear probe on fresh crops in every epoch, trained, levels: ", "raw, last: 1: centroid "):
        assert word in result.stdout
    outdated = json.loads(json.dumps(report))
    outdated["rows"]["context"]["last"]["knn"]["accuracy"] = 2
    (run.evaluation / "report-subset150.json").write_text(json.dumps(outdated))
    evaluate(run, KNN, Target(subset=150), quiet)  # a row that is there is scored anew
    assert report_of(run, "report-subset150")["rows"]["context"] == report["rows"]["context"]


def score(accuracy, n=1000):
    return {"accuracy": accuracy, "interval": wilson_interval(round(accuracy * n), n)}


def tuning(accuracy, epochs):
    return score(accuracy) | {"epochs": epochs, "epoch": 1, "held_out": 1, "trained_on": 2}


def row(run, accuracy, seed=0, preset="p", n=1000, fingerprint="f", epochs=10, **more):
    scores = {level: {"knn": score(accuracy, n), "linear": score(accuracy, n), "effective_rank": 9.0}
              for level in ("last", "levels")}
    return {"run": run, "preset": preset, "recipe": f"{preset} {epochs}", "seed": seed, "epochs": epochs,
            "rows": {"trained": scores}, "dataset": {"name": "cifar10", "test": n, "fingerprint": fingerprint}, **more}


def side_by_side(*reports):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary.comparison(summary.compare(list(reports))))
    lines = (line.strip("│┃ ") for line in console.export_text().splitlines() if "│" in line or "┃" in line)
    return {line.split("│")[0].split("┃")[0].strip(): line for line in lines}


def test_the_comparison_marks_what_is_within_the_noise():
    # the root of two half intervals' squares near 0.7 of 1,000 is 4 points
    lines = side_by_side(row("best", 0.70), row("near", 0.67), row("far", 0.64))
    assert lines["best"].count("70.0 best") == 4
    assert lines["near"].count("67.0 ~") == 4
    assert "64.0" in lines["far"]
    assert "~" not in lines["far"]
    lines = side_by_side(row("a", 0.70, n=100_000), row("b", 0.67, n=100_000), row("c", 0.30, fingerprint="g"))
    assert "~" not in lines["b"]
    assert lines["c"].count("30.0") == 4
    assert "best" not in lines["c"]  # other pictures: no rival


def test_the_comparison_pools_runs_that_differ_in_their_seed_alone():
    runs = [*(row(f"p{i}", a, i) for i, a in enumerate((0.60, 0.62, 0.64))),
            *(row(f"q{i}", a, i, "q") for i, a in enumerate((0.63, 0.64, 0.65))),
            *(row(f"r{i}", a, i, "r") for i, a in enumerate((0.50, 0.51, 0.52))), row("s", 0.9, 0, "s"),
            row("long", 0.9, 9, epochs=100), row("p2", 0.64, 2), row("faster", 0.1, 8, recipe="p, another lr")]
    lines = side_by_side(*runs)
    assert "62.0 ± 2.0 ~" in lines["p"]
    assert "3 seeds" in lines["p"]  # one value a seed
    assert "64.0 ± 1.0 best" in lines["q"]
    assert "51.0 ± 1.0" in lines["r"]
    assert "~" not in lines["r"]
    assert "seeds" not in lines["s"]
    assert [s["seeds"] for s in summary.compare(runs)["seeds"]] == [[0, 1, 2]] * 3


def test_the_recipe_is_all_of_the_configuration_but_where_and_which(tiny_config):
    same = [tiny_config(**{"data": {"dataset": "cifar10"}} | c) for c in (
        {}, {"name": "b"}, {"seed": 3}, {"data": {"dataset": "cifar10", "root": "elsewhere"}},
        {"logging": {"knn_every": 1}}, {"checkpoints": {"keep": 9}})]
    other = [tiny_config(**{"data": {"dataset": "cifar10"}} | c) for c in (
        {"training": {"lr": 0.1}}, {"augment": {"flip": False}}, {"data": {"dataset": "cifar10", "split_seed": 1}})]
    assert len({module._recipe(c) for c in same}) == 1
    assert len({module._recipe(c) for c in [same[0], *other]}) == 4


def test_the_comparison_has_a_column_for_what_was_run():
    plain, tuned = row("plain", 0.70), row("tuned", 0.60, fine_tune=tuning(0.9, 100), scratch=tuning(0.8, 200))
    tuned["rows"]["trained"]["levels"]["few_shot"] = {"episodes": {"shots": {"5": score(0.55)}}}
    assert summary.compare([plain, plain])["columns"] == ["k-NN", "linear", "k-NN last", "linear last"]
    lines = side_by_side(plain, tuned)
    assert any("fine-tuned" in line and "from scratch" in line for line in lines.values())
    assert all(word in lines["run"] for word in ("5-shot", "100 epochs", "200 epochs"))
    assert all(word in lines["tuned"] for word in ("55.0", "90.0", "80.0"))
    assert "best" not in lines["tuned"]
    assert summary.compare([plain, tuned])["runs"][0]["scores"]["fine-tuned, 100 epochs"] is None


def test_the_comparison_keeps_fine_tuning_of_different_lengths_apart():
    runs = [row(f"p{i}", 0.7, i, fine_tune=tuning(a, n), scratch=tuning(a - 0.1, 20))
            for i, (a, n) in enumerate(((0.90, 100), (0.60, 5), (0.70, 5)))]
    found = summary.compare(runs)
    assert found["columns"][-3:] == ["fine-tuned, 5 epochs", "fine-tuned, 100 epochs", "from scratch, 20 epochs"]
    marks = [[s and s["mark"] for s in list(r["scores"].values())[-3:]] for r in found["runs"]]
    assert marks == [[None, "", "best"], ["", None, ""], ["best", None, ""]]
    short, long, _ = list(found["seeds"][0]["scores"].values())[-3:]
    assert (short["accuracy"], long) == (pytest.approx(0.65), None)  # no mean over different lengths either
    assert side_by_side(*runs)["run"].split("┃")[-4:-1] == ["   5 epochs ", " 100 epochs ", "    20 epochs "]


def test_the_comparison_keeps_fine_tuning_at_other_sizes_apart():
    own, larger = (tuning(a, 5) | {"settings": {"size": size, "lr": 1e-3}} for a, size in ((0.8, None), (0.9, 48)))
    runs = [row("a", 0.7, 0, fine_tune=own), row("b", 0.7, 1, fine_tune=larger)]
    found = summary.compare(runs)
    assert found["columns"][-2:] == ["fine-tuned, 5 epochs, rate 0.001", "fine-tuned, 5 epochs, rate 0.001, 48 px"]
    assert [[s and s["accuracy"] for s in list(r["scores"].values())[-2:]] for r in found["runs"]] == [
        [0.8, None], [None, 0.9]]
    assert "px" not in side_by_side(*runs[:1])["run"]


def test_the_comparison_keeps_other_rates_apart():
    runs = [row(f"r{i}", 0.7, i, scratch=tuning(a, 200) | {"settings": {"lr": lr}})
            for i, (a, lr) in enumerate(((0.85, 1e-3), (0.86, 5e-4)))]
    found = summary.compare(runs)
    assert found["columns"][-2:] == ["from scratch, 200 epochs, rate 0.0005", "from scratch, 200 epochs, rate 0.001"]
    assert [[s and s["mark"] for s in list(r["scores"].values())[-2:]] for r in found["runs"]] == [
        [None, ""], ["", None]]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_narrow_terminal_folds_what_a_table_holds_and_cuts_nothing(trained, width):
    name = "a_run_with_a_name_that_is_long"
    for shown in (summary.comparison(summary.compare([row(name, 0.7, fine_tune=tuning(0.9, 100))])),
                  summary.table(report_of(trained[0]) | {"run": name, "scratch": tuning(0.5, 200)})):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(shown)
        text = console.export_text()
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width


def test_several_runs_are_put_side_by_side(run, cli, tmp_path):
    shutil.copytree(run.folder, tmp_path / "results" / "twin")
    result = cli("eval", "tiny", "twin", "--knn", "--subset", 400)
    assert result.exit_code == 0, result.output
    assert "side by side" in result.stdout
    found = json.loads(cli("eval", "tiny", "twin", "--knn", "--subset", 400, "--json").stdout)
    assert [r["run"] for r in found["reports"]] == ["tiny", "twin"]
    accuracy = found["reports"][0]["rows"]["trained"]["levels"]["knn"]["accuracy"]
    assert [r["scores"]["k-NN"] for r in found["comparison"]["runs"]] == [{"accuracy": accuracy, "mark": "best"}] * 2


def test_the_weights_of_all_runs_are_looked_at_before_one_is_scored(run, cli, tmp_path):
    twin = shutil.copytree(run.folder, tmp_path / "results" / "twin")
    next(twin.glob("checkpoints/step-*/target.safetensors")).write_bytes(b"cut")
    result = cli("eval", "tiny", "twin", "--knn", "--subset", 400)
    assert result.exit_code == 2
    assert "k-NN" not in result.output


def test_published_runs_are_put_side_by_side_by_their_reports(cli):
    names = ("lunch_x", "lunch_x_s1", "vit_wide_20ep_m4")
    folders = [Path(__file__).parents[1] / "docs/results" / name for name in names]
    found = json.loads(cli("eval", *folders, "--json").stdout)["comparison"]
    assert [r["scores"]["linear"] for r in found["runs"]] == [
        {"accuracy": 0.757, "mark": "~"}, {"accuracy": 0.7631, "mark": "best"}, {"accuracy": 0.7311, "mark": ""}]
    assert [s["seeds"] for s in found["seeds"]] == [[0, 1]]
    assert cli("eval", *folders[:2], "--subset", 400).exit_code == 2  # asked for what the report does not hold


def test_without_a_terminal_the_tables_are_as_wide_as_they_need(run, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    report = report_of(run) | {"fine_tune": tuning(0.9, 7), "scratch": tuning(0.8, 123)}
    report["rows"]["trained"]["levels"]["few_shot"] = {"episodes": {"shots": {"5": score(0.5)}}}
    (run.evaluation / "report-subset400.json").write_text(json.dumps(report))
    names = [f"a_run_with_a_name_that_is_long_{i}[copy]" for i in range(2)]
    for name in names:
        shutil.copytree(run.folder, tmp_path / "results" / name)
    result = cli("eval", *names, "--knn", "--subset", 400)
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout
    own, _, both = result.stdout.replace("┃", "│").partition("runs side by side")
    for text, words in ((own, ["from scratch", "123 epochs", "k-NN, k 20", "linear probe", "effective rank"]),
                        (both, [*names, "run", "data", "epochs", "seed", "k-NN", "linear", "k-NN last", "linear last",
                                "5-shot", "fine-tuned", "7 epochs", "from scratch", "123 epochs", "rank last"])):
        assert set(words) <= {cell.strip() for cell in text.split("│")}
    assert all(f"{name}: digits" in own for name in names)


def test_a_report_is_named_as_its_folder_and_says_what_configuration_that_is_of(run, cli, tmp_path, monkeypatch):
    twin = shutil.copytree(run.folder, tmp_path / "results" / "tiny-2")
    for folder, told in ((run.folder, False), (twin, True)):
        monkeypatch.chdir(folder)
        result = cli("eval", ".", "--knn", "--subset", 400)
        assert result.exit_code == 0, result.output
        text = (folder / "evaluation" / "report-subset400.md").read_text()
        assert text.splitlines()[0] == f"# {folder.name}"
        assert ("target encoder of the configuration tiny, " in text) == told
        assert result.stdout.split()[0] == f"{folder.name}:"


# ---------------------------------------------------------------- publishing

KEYS = {"name", "preset", "epochs", "seed", "dataset", "views", "linear", "knn", "linear_last", "knn_last",
        "effective_rank", "dim", "random", "raw", "fine_tune", "scratch", "fine_tune_epochs", "scratch_epochs",
        "supervised", "encoder", "weights", "pictures_seen", "train_seconds", "device", "versions", "commit", "command",
        "files"}


def published(*words):
    return CliRunner().invoke(publish.main, [str(word) for word in words])


def whole(run, **more):
    """The report as a whole one: what was scored is not what publishing is about."""
    report = report_of(run) | more
    report["dataset"]["subset"], report["name"] = None, "report"
    (run.evaluation / "report.json").write_text(json.dumps(report))
    summary.write(run, report)
    return report


def test_a_published_run_is_entered_in_the_results(run, tmp_path):
    tuned = {"accuracy": 0.9, "interval": [0.8, 0.95], "epochs": 7, "epoch": 5, "held_out": 1, "trained_on": 2}
    report, out = whole(run, fine_tune=tuned), tmp_path / "docs"
    with run.metrics_file.open("a") as file:
        file.write('{"kind": "train", "st')  # a crash cut it
    for _ in range(2):  # a second time replaces the entry
        result = published(run.folder, "--weights", "--out", out, "--commit", "abc")
        assert result.exit_code == 0, result.output
    (entry,) = json.loads((out / "results.json").read_text())
    assert entry.keys() == KEYS
    trained = report["rows"]["trained"]
    assert (entry["knn"], entry["linear"]) == (
        trained["levels"]["knn"]["accuracy"], trained["levels"]["linear"]["accuracy"])
    assert (entry["knn_last"], entry["linear_last"]) == (
        trained["last"]["knn"]["accuracy"], trained["last"]["linear"]["accuracy"])
    assert entry["raw"]["knn"] == report["rows"]["raw"]["last"]["knn"]["accuracy"]
    assert (entry["fine_tune"], entry["fine_tune_epochs"], entry["commit"]) == (0.9, 7, "abc")
    assert (entry["scratch"], entry["scratch_epochs"], entry["supervised"]) == (None, None, None)
    assert entry["weights"] == "tiny/weights"
    assert {"tiny/config.yaml", "tiny/evaluation/report.json", "tiny/evaluation/report.md", "tiny/training_curves.png",
            "tiny/evaluation/report-knn.png", "tiny/metrics.jsonl"} <= set(entry["files"])
    assert all((out / file).is_file() for file in entry["files"])
    assert not any("features" in file for file in entry["files"])
    assert all(json.loads(line) for line in (out / "tiny" / "metrics.jsonl").read_text().splitlines())


def test_where_the_pictures_lay_is_not_published(run, tmp_path):
    whole(run)
    data = {**TINY["data"], "dataset": "cifar10", "root": "/my/place", "image_size": 8}
    run.config_file.write_text(config.build({**TINY, "data": data}).dump())
    assert published(run.folder, "--out", tmp_path / "docs").exit_code == 0
    found = config.load(tmp_path / "docs" / "tiny" / "config.yaml")
    assert found == config.build({**TINY, "data": {**data, "root": None}})


def test_a_published_folder_is_scored_elsewhere_and_stays_as_it_is(run, tmp_path, cli):
    own, out = whole(run), tmp_path / "docs" / "tiny"
    assert published(run.folder, "--weights", "--out", out.parent).exit_code == 0
    told = []
    evaluate(Run(out), replace(KNN, context=True), Target(subset=400), told.append)
    assert "the context encoder's weights are not here: left out" in told
    shutil.rmtree(Run(out).scored)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    (out / "evaluation" / "report.json").rename(tmp_path / "kept.json")
    public = evaluate(Run(out), KNN, Target(subset=400), quiet)
    assert "checkpoint" not in public  # nothing to know it by
    assert [public[key] for key in ("step", "pictures_seen")] == [own[key] for key in ("step", "pictures_seen")]
    assert public["train_seconds"] == pytest.approx(own["train_seconds"], abs=1)
    (tmp_path / "kept.json").rename(out / "evaluation" / "report.json")
    result = cli("eval", out, "--knn", "--subset", 400)
    assert result.exit_code == 0, result.output
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    folder = tmp_path / "results" / "tiny-published" / "evaluation"
    assert "tiny-published/evaluation/report-subset400.md" in "".join(result.stdout.split())
    assert {f.name for f in folder.iterdir()} == {
        "features", *(f"report-subset400{end}" for end in (".json", ".md", "-knn.png", "-levels.png"))}
    public = json.loads((folder / "report-subset400.json").read_text())
    assert {key: public[key] for key in module.CARRIED} == {key: own[key] for key in module.CARRIED}
    knn = [r["rows"]["trained"]["levels"]["knn"]["accuracy"] for r in (own, public)]
    assert abs(knn[0] - knn[1]) < 0.03  # bf16
    result = cli("eval", out, "--all", "--subset", 100, "--checkpoint", "best")
    assert "published without checkpoints; leave out --checkpoint" in mistake(result)
    for run_, place in ((out, tmp_path / "again"), (out, out.parent)):
        assert "published already" in mistake(published(run_, "--out", place))
    shutil.rmtree(out / "weights")
    assert "published already" in mistake(published(out, "--out", out.parent))


def test_a_published_shard_is_checked(run, tmp_path, cli):
    out = tmp_path / "docs" / "tiny"
    whole(run)
    assert published(run.folder, "--weights", "--out", out.parent).exit_code == 0
    shard = next((out / "weights").glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one bit of a weight
    assert "target-01-of-01.safetensors: damaged. Fetch the published folder again" in mistake(cli("eval", out))
    shard.unlink()
    (out / "weights" / "other.safetensors").write_bytes(content)
    assert "target-01-of-01.safetensors: missing" in mistake(cli("eval", out))
    (out / "weights" / "digests.json").write_text("[]")
    assert "digests.json: damaged" in mistake(cli("eval", out))


@pytest.mark.parametrize("spoil", [
    lambda r: r["rows"].pop("raw"), lambda r: r["rows"].pop("random"), lambda r: r["rows"]["random"]["last"].pop("knn"),
    lambda r: r["rows"]["raw"]["last"].pop("linear"), lambda r: r["dataset"].update(subset=400)])
def test_a_report_without_its_references_is_not_published(run, tmp_path, spoil):
    report = whole(run)
    spoil(report)
    (run.evaluation / "report.json").write_text(json.dumps(report))
    text = mistake(published(run.folder, "--out", tmp_path / "docs"))
    assert "not whole" in text or "subset" in text
    assert not (tmp_path / "docs").exists()


def test_an_unscored_run_is_not_published(run, tmp_path):
    shutil.rmtree(run.evaluation)
    assert "not evaluated yet; run: mlx-hjepa eval" in mistake(published(run.folder, "--out", tmp_path / "docs"))


def test_large_metrics_are_thinned_but_for_what_is_rare(monkeypatch):
    monkeypatch.setattr(publish, "THINNED_BYTES", 1000)
    lines = [json.dumps({"kind": "train" if i % 10 else "knn", "step": i}) + "\n" for i in range(300)]
    kept = [json.loads(line) for line in publish.thinned("".join(lines)).splitlines()]
    assert [line["step"] for line in kept if line["kind"] == "knn"] == list(range(0, 300, 10))
    assert 20 < sum(line["kind"] == "train" for line in kept) < 40
    assert publish.thinned("".join(lines[:20])) == "".join(lines[:20])


def test_the_device_is_in_the_report(trained):
    assert report_of(trained[0])["device"]["name"] == backend.device()["name"]


def test_two_evaluations_side_by_side_keep_each_others_results(run):
    evaluate(run, Protocols(linear=False))
    file = run.evaluation / "report.json"
    other = json.loads(file.read_text())
    other["scratch"] = {"accuracy": 0.5, "interval": [0.4, 0.6], "top5": 1.0, "epoch": 1, "epochs": 1, "seconds": 7.0,
                        "held_out": 143, "trained_on": 1294}
    other["protocols"]["scratch"] = other["protocols"]["knn"] | {"seconds": 7.0}
    other["rows"]["trained"]["last"]["few_shot"] = {"5": 1}

    def say(text):  # the other one writes while this one works
        if text.startswith("linear"):
            file.write_text(json.dumps(other))

    evaluate(run, Protocols(knn=False), say=say)
    found = json.loads(file.read_text())
    assert found["scratch"]["accuracy"] == 0.5
    assert found["protocols"].keys() == {"knn", "linear", "scratch"}
    assert found["seconds"] == pytest.approx(sum(p["seconds"] for p in found["protocols"].values()))
    assert found["rows"]["trained"]["last"].keys() >= {"knn", "linear", "few_shot"}
