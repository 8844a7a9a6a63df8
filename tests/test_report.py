"""One report of a run: whole, honest about what it scored, and refused where its numbers would mean nothing."""

import functools
import importlib.util
import json
import os
import shutil
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
from mlx_hjepa.evaluate import report as module
from mlx_hjepa.evaluate import summary
from mlx_hjepa.evaluate.features import FrozenEncoder, random_encoder
from mlx_hjepa.evaluate.report import Protocols, Target, evaluate
from mlx_hjepa.evaluate.subject import Subject, splits
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


def report_of(run, name="report"):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")
    return json.loads((run.evaluation / f"{name}.json").read_text(), parse_constant=refuse)


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
    text = (run.evaluation / "report.md").read_text()
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
    text = (run.evaluation / "report.md").read_text()
    for out in (" ".join(result.stdout.split()), text):
        assert "a subset: at most 400 pictures of each split" in out
    for word in ("360 test pictures", "bank of 400", "seed 0", report["weights"], "evaluation took",
                 "![report-knn.png]", "![report-confusion.png]"):
        assert word in text


def test_pictures_are_small_and_only_of_what_ran(run):
    names = {"report-knn.png", "report-levels.png", "report-confusion.png"}
    assert {f.name for f in run.evaluation.glob("*.png")} == names
    for name in names:
        assert (run.evaluation / name).stat().st_size < 150_000
        with Image.open(run.evaluation / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    (run.evaluation / "report.json").unlink()
    summary.write(run, evaluate(run, KNN, Target(subset=400), quiet))
    assert {f.name for f in run.evaluation.glob("*.png")} == {"report-knn.png", "report-levels.png"}
    assert "confusion" not in (run.evaluation / "report.md").read_text()


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


def test_a_class_without_test_pictures_is_no_nan_in_the_json(run, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(module, "probe", functools.partial(module.probe, epochs=5))
    root = folder_of(tmp_path / "p", {"train/a": 20, "train/b": 20, "test/b": 12})
    result = cli("eval", run.folder, "--dataset", "folder", "--root", root, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert report["rows"]["raw"]["last"]["linear"]["per_class"][0] is None
    assert report["rows"]["raw"]["last"]["knn"]["per_class"][0] is None


# ---------------------------------------------------------------- planted faults


def test_a_constant_encoder_is_called_collapsed(run, cli):
    replant(run, mx.zeros_like)
    result = cli("eval", "--quality", "--subset", 200)
    assert result.exit_code == 0, result.output
    report = report_of(run)
    assert report["verdict"] == "collapsed"
    assert report["quality"]["random"]["verdict"] != "collapsed"
    text = (run.evaluation / "report.md").read_text()
    assert "**Features: collapsed** (normalised std" in text
    assert (run.evaluation / "report-spectrum.png").stat().st_size < 150_000


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
    assert not (run.evaluation / "report-folder.json").exists()


def test_a_few_pictures_twice_are_no_leak(run):
    data = load_dataset(run.config.data)
    images = data.test.images.copy()
    images[:3] = data.train.images[:3]
    twice = replace(data, test=Pictures(images, data.test.labels))
    assert len(splits(twice, 0).test_rows) == 360
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
    assert "Give --dataset too" in mistake(cli("eval", "--root", "."))
    assert "data.root" in mistake(cli("eval", "--dataset", "folder"))
    for words in (["--fine-tune-epochs", "0", "0"], ["--subset", "5"]):
        result = cli("eval", *words)
        assert (result.exit_code, "Traceback" in result.stderr) == (2, False)


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
    before = (run.evaluation / "report.json").read_bytes()
    root = folder_of(tmp_path / "p", {"train/a": 20, "train/b": 20, "test/a": 9, "test/b": 9})
    data = {**TINY["data"], "dataset": "folder", "root": str(root)}
    other = Run.create(config.build({**TINY, "name": "other", "data": data}), tmp_path / "results")
    shutil.copytree(run.checkpoints, other.checkpoints, dirs_exist_ok=True)
    shutil.copy(run.environment_file, other.environment_file)
    found = evaluate(other, KNN, Target(data=config.section(config.Data, "data", {
        "dataset": "digits", "image_size": 8, "source": "resident"})), quiet)
    assert (found["dataset"]["name"], found["dataset"]["transfer"]) == ("digits", True)
    assert (found["dataset"]["train"], found["dataset"]["test"]) == (1437, 360)
    assert json.loads(json.dumps(found)) == report_of(other, "report-digits")
    result = cli("eval", "tiny", "--knn", "--dataset", "folder", "--root", root)
    assert result.exit_code == 0, result.output
    assert report_of(run, "report-folder")["classes"] == ["a", "b"]
    assert (run.evaluation / "report-folder.md").is_file()
    assert (run.evaluation / "report.json").read_bytes() == before


def test_without_a_test_split_held_out_pictures_are_scored(run, tmp_path, cli):
    root = folder_of(tmp_path / "p", {"train/a": 40, "train/b": 40})
    result = cli("eval", "tiny", "--knn", "--dataset", "folder", "--root", root)
    assert result.exit_code == 0, result.output
    report = report_of(run, "report-folder")
    assert (report["dataset"]["train"], report["dataset"]["test"]) == (72, 8)
    assert "no test split: scored on 8" in (run.evaluation / "report-folder.md").read_text()


def test_everything_at_once(run, cli, monkeypatch):
    """--all: every protocol's numbers and pictures, and the augmented probe when it is asked for."""
    for name, shorter in (("probe", {"epochs": 5}), ("augmented_probe", {"epochs": 2}), ("episodes", {"episodes": 30}),
                          ("few_labels", {"draws": 2}), ("quality", {"views": 4})):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), **shorter))
    result = cli("eval", "--all", "--augmented", "--subset", 150, "--fine-tune-epochs", 1, 1)
    assert result.exit_code == 0, result.output
    report = report_of(run)
    assert report["protocols"] == {"knn": True, "linear": True, "few_shot": True, "quality": True, "fine_tune": True,
                                   "augmented": True, "fine_tune_epochs": [1, 1]}
    text = (run.evaluation / "report.md").read_text()
    for word in ("Fine-tuned: ", "The same network from scratch: ", "## k-NN", "## Few-shot episodes",
                 "## k labels a class", "## Feature quality", "LiDAR", "Linear probe on fresh crops"):
        assert word in text
    for part in ("knn", "levels", "confusion", "spectrum"):
        assert 0 < (run.evaluation / f"report-{part}.png").stat().st_size < 150_000
    assert "fine-tuned" in result.stdout
    assert "from scratch" in result.stdout


def row(run, accuracy, seed=0, preset="p", n=1000, fingerprint="f", epochs=10):
    scores = {level: {"knn": {"accuracy": accuracy}, "linear": {"accuracy": accuracy}, "effective_rank": 9.0}
              for level in ("last", "levels")}
    return {"run": run, "preset": preset, "seed": seed, "epochs": epochs, "rows": {"trained": scores},
            "dataset": {"name": "cifar10", "test": n, "fingerprint": fingerprint}}


def side_by_side(*reports):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary.comparison(list(reports)))
    lines = (line.strip("│ ") for line in console.export_text().splitlines() if "│" in line)
    return {line.split("│")[0].strip(): line for line in lines}


def test_the_comparison_marks_what_is_within_the_noise():
    # 1.96 standard errors of two proportions near 0.7 of 1,000 are 4 points
    lines = side_by_side(row("best", 0.70), row("near", 0.67), row("far", 0.64))
    assert lines["best"].count("70.0 best") == 4
    assert lines["near"].count("67.0 ~") == 4
    assert "64.0" in lines["far"]
    assert "~" not in lines["far"]
    lines = side_by_side(row("a", 0.70, n=100_000), row("b", 0.67, n=100_000), row("c", 0.30, fingerprint="g"))
    assert "~" not in lines["b"]
    assert lines["c"].count("30.0 best") == 4  # other pictures: no rival


def test_the_comparison_pools_seeds_of_one_preset():
    lines = side_by_side(*(row(f"p{i}", a, i) for i, a in enumerate((0.60, 0.62, 0.64))),
                         *(row(f"q{i}", a, i, "q") for i, a in enumerate((0.63, 0.64, 0.65))),
                         *(row(f"r{i}", a, i, "r") for i, a in enumerate((0.50, 0.51, 0.52))), row("s", 0.9, 0, "s"),
                         row("long", 0.9, 9, epochs=100))
    assert "62.0 ± 2.0 ~" in lines["p"]
    assert "3 seeds" in lines["p"]
    assert "64.0 ± 1.0 best" in lines["q"]
    assert "51.0 ± 1.0" in lines["r"]
    assert "~" not in lines["r"]
    assert "seeds" not in lines["s"]


def test_several_runs_are_put_side_by_side(run, cli, tmp_path):
    shutil.copytree(run.folder, tmp_path / "results" / "twin")
    result = cli("eval", "tiny", "twin", "--knn", "--subset", 400)
    assert result.exit_code == 0, result.output
    assert "side by side" in result.stdout
    found = json.loads(cli("eval", "tiny", "twin", "--knn", "--subset", 400, "--json").stdout)
    assert [r["run"] for r in found] == ["tiny", "twin"]


# ---------------------------------------------------------------- publishing

KEYS = {"name", "preset", "epochs", "seed", "dataset", "views", "linear", "knn", "linear_last", "knn_last",
        "effective_rank", "dim", "random", "raw", "fine_tune", "scratch", "supervised", "encoder", "weights",
        "pictures_seen", "train_seconds", "device", "versions", "commit", "command", "files"}


def published(*words):
    return CliRunner().invoke(publish.main, [str(word) for word in words])


def whole(run):
    """The report as a whole one: what was scored is not what publishing is about."""
    report = report_of(run)
    report["dataset"]["subset"] = None
    (run.evaluation / "report.json").write_text(json.dumps(report))
    return report


def test_a_published_run_is_entered_in_the_results(run, tmp_path):
    report, out = whole(run), tmp_path / "docs"
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
    assert (entry["fine_tune"], entry["scratch"], entry["commit"]) == (None, None, "abc")
    assert entry["weights"] == "tiny/weights"
    assert {"tiny/config.yaml", "tiny/evaluation/report.json", "tiny/evaluation/report.md", "tiny/training_curves.png",
            "tiny/evaluation/report-knn.png", "tiny/metrics.jsonl"} <= set(entry["files"])
    assert all((out / file).is_file() for file in entry["files"])
    assert not any("features" in file for file in entry["files"])
    assert all(json.loads(line) for line in (out / "tiny" / "metrics.jsonl").read_text().splitlines())
    own, public = (evaluate(r, KNN, Target(subset=400), quiet)["rows"]["trained"]["levels"]["knn"]["accuracy"]
                   for r in (run, Run(out / "tiny")))
    assert abs(own - public) < 0.03  # bf16


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


def test_a_second_call_adds_to_the_report_and_one_about_other_weights_moves_it_aside(tmp_path):
    file = tmp_path / "report.json"
    data = {"name": "digits", "subset": None}

    def made(weights, protocol, **more):
        return {"weights": weights, "encoder": "target", "dataset": data, "checkpoint": "step-1", "command": protocol,
                "seconds": 1.0, "protocols": {"knn": protocol == "knn", "linear": protocol == "linear"},
                "rows": {"trained": {"last": {"dim": 4, protocol: {"accuracy": 0.5}}}}, **more}

    file.write_text(json.dumps(made("a", "knn", fine_tune={"accuracy": 0.9})))
    both = module._with_earlier(made("a", "linear"), file)
    assert both["rows"]["trained"]["last"].keys() == {"dim", "knn", "linear"}
    assert both["fine_tune"] == {"accuracy": 0.9}
    assert both["protocols"] == {"knn": True, "linear": True}
    alone = module._with_earlier(made("b", "linear"), file)
    assert "knn" not in alone["rows"]["trained"]["last"]
    assert json.loads((tmp_path / "report-step-1.json").read_text())["weights"] == "a"
