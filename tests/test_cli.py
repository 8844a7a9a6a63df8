"""The commands as a user types them: help, JSON, and mistakes answered in a line or two with exit status 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click import Group, Option
from click.testing import CliRunner

from mlx_hjepa import __version__, config, doctor
from mlx_hjepa.cli import main
from mlx_hjepa.run import Run, UserError
from mlx_hjepa.train import trainer


def commands(command=main, words=""):
    """Every command by the words that call it."""
    found = {words: command}
    if isinstance(command, Group):
        for word, inner in command.commands.items():
            found |= commands(inner, f"{words} {word}".strip())
    return found


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """A function that runs a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(main, list(words))


@pytest.fixture
def tiny_file(tmp_path, tiny_config):
    (tmp_path / "tiny.yaml").write_text(tiny_config().dump())
    return "tiny.yaml"


def mistake(result) -> str:
    """What a user reads after a mistake: one or two lines, no traceback, nothing for a program to read."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) <= 2
    assert "Traceback" not in result.stderr
    return result.stderr


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("words", commands(), ids=lambda words: words or "mlx-hjepa")
def test_help_says_what_a_command_does_and_its_defaults(cli, words):
    command = commands()[words]
    result = cli(*words.split(), "--help")
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert command.help
    assert command.help.split(".")[0] in text
    for option in (p for p in command.params if isinstance(p, Option) and not p.hidden):
        assert option.opts[0] in text
        if isinstance(option.default, (str, int, float)) and not option.is_flag:
            assert f"[default: {option.default}" in text, option.name
    assert cli(*words.split(), "-h").output == result.output


def test_the_commands_of_the_design_are_there():
    assert {"train", "eval", "data", "doctor"} <= set(main.commands)
    assert {o for p in main.commands["train"].params for o in p.opts} >= {"--set", "--resume", "--keep-awake"}
    assert {o for p in main.commands["eval"].params for o in p.opts} >= {
        "--knn", "--linear", "--checkpoint", "--encoder", "--json"}


def test_version(cli):
    assert __version__ in cli("--version").output


# ---------------------------------------------------------------- mistakes


def test_a_word_that_is_no_command_or_option(cli):
    for words in (["trian"], ["train"], ["train", "a.yaml", "--lr", "3"], ["eval", "--encoder", "best"],
                  ["data", "--dataset", "cifar11"], ["eval", "--subset", "3"]):
        result = cli(*words)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert result.stderr.splitlines()[1].startswith("See: main ")
        assert len(result.stderr.splitlines()) == 2


@pytest.mark.parametrize(("words", "message"), [
    (["none.yaml"], "none.yaml: no such file"),
    (["bad.yaml"], "bad.yaml: unknown key training.lrr: did you mean training.lr?"),
    (["tiny.yaml", "--set", "training.lr"], "--set training.lr: write it as section.key=value"),
    (["tiny.yaml", "--set", "training.lr=quick"], "training.lr: input should be a valid number"),
    (["tiny.yaml", "--set", "trainin.lr=1"], "unknown key trainin: did you mean training?"),
    (["tiny.yaml", "--set", "masking.context_tokens=13"], "more than the grid's 16 tokens"),
    (["tiny.yaml", "--resume"], "no run named tiny under results"),
    (["folder", "--resume"], "folder: no run here"),
    (["folder"], "folder: no run here"),
])
def test_train_refuses_before_any_work(cli, tmp_path, tiny_file, words, message):
    (tmp_path / "bad.yaml").write_text("model: {size: vit_tiny, levels: [12]}\ntraining: {lrr: 1.0e-3}\n")
    (tmp_path / "folder").mkdir()
    assert message in mistake(cli("train", *words))
    assert not (tmp_path / "results").exists()


def test_train_leaves_no_run_behind_that_never_began(cli, tmp_path, tiny_file):
    assert "training.batch 2000 is larger" in mistake(cli("train", tiny_file, "--set", "training.batch=2000"))
    assert not (tmp_path / "results").exists()
    assert "none: " in mistake(cli("train", tiny_file, "--set", "data={dataset: folder, root: none, image_size: 16}"))
    assert list((tmp_path / "results").iterdir()) == []


def test_a_failed_start_does_not_remove_the_run_that_it_resumes(cli, tmp_path, tiny_config):
    run = Run.create(tiny_config(data={"dataset": "folder", "root": "none"}), tmp_path / "results")
    assert "none: " in mistake(cli("train", "results/tiny", "--resume"))
    assert run.folder.is_dir()


def test_a_run_folder_needs_resume(cli, tmp_path, tiny_config):
    Run.create(tiny_config(), tmp_path / "results")
    text = mistake(cli("train", "results/tiny"))
    assert "results/tiny is a run" in text
    assert "--resume" in text


@pytest.mark.parametrize("item", [
    "training.lr=5.0e-3", "training.epochs=3", "seed=4", "model.levels=[2]", "masking.context_tokens=5",
    "data.split_seed=1", "augment.flip=false", "predictor.depth=2",
])
@pytest.mark.parametrize("what", ["results/tiny", "tiny.yaml"])
def test_a_resume_with_another_training_key_names_the_key(cli, tmp_path, tiny_config, tiny_file, what, item):
    Run.create(tiny_config(), tmp_path / "results")
    text = mistake(cli("train", what, "--resume", "--set", item))
    assert f"started with another {item.split('=')[0]};" in text


def test_a_resume_may_change_what_is_logged_and_kept(tmp_path, tiny_config):
    run = Run.create(tiny_config(), tmp_path)
    trainer.same_run(tiny_config(logging={"every_steps": 7}, checkpoints={"keep": 9}), run)
    with pytest.raises(UserError, match=r"another training\.lr;"):
        trainer.same_run(tiny_config(training={"lr": 0.5}), run)


def test_eval_without_a_run(cli, tmp_path, tiny_config):
    assert "no run under results/ yet. Train one: mlx-hjepa train" in mistake(cli("eval"))
    assert "nothing: no run here" in mistake(cli("eval", "nothing", "--knn"))
    Run.create(tiny_config(), tmp_path / "results")
    for words in ([], ["tiny", "--json"], ["--checkpoint", "best"], ["--checkpoint", "nowhere"]):
        mistake(cli("eval", *words))


def test_data_that_is_not_there(cli):
    assert "needs data.root" in mistake(cli("data", "--dataset", "folder"))
    assert "none" in mistake(cli("data", "--dataset", "folder", "--root", "none", "--json"))
    assert "none" in mistake(cli("data", "--dataset", "cifar10", "--root", "none"))


# ---------------------------------------------------------------- JSON


def test_data_as_json(cli):
    result = cli("data", "--dataset", "digits", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert (facts["name"], facts["train"], facts["test"], facts["picture"]) == ("digits", 1437, 360, [8, 8, 3])
    assert len(facts["fingerprint"]) == 64


def test_data_for_people(cli):
    result = cli("data", "--dataset", "digits")
    assert result.exit_code == 0
    facts = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert (facts["name"], facts["train"], facts["picture"]) == ("digits", "1437", "8, 8, 3")
    assert result.output.count("raw pixels win") == 1, "the note is said once"


def test_doctor_as_json(cli, monkeypatch):
    whole = doctor.findings
    monkeypatch.setattr(doctor, "findings", lambda: whole(measure=False))
    result = cli("doctor", "--json")
    assert result.exit_code in (0, 1)  # 1: this machine has an error
    found = json.loads(result.stdout)
    assert found["device"]["kind"] in ("metal", "cuda", "cpu")
    assert {f["level"] for f in found["findings"]} <= {"ok", "warn", "error"}
    assert any(f["what"].startswith("MLX ") for f in found["findings"])


@pytest.mark.parametrize(("level", "status"), [("ok", 0), ("warn", 0), ("error", 1)])
def test_doctor_fails_where_training_cannot_work(cli, monkeypatch, level, status):
    monkeypatch.setattr(doctor, "findings", lambda: [doctor.Finding(level, "a thing", "do this")])
    for words in ([], ["--json"]):
        result = cli("doctor", *words)
        assert result.exit_code == status
        assert "a thing" in result.stdout
        assert "do this" in result.stdout


def test_every_error_class_of_the_package_is_caught(cli, tmp_path, monkeypatch):
    for kind in (UserError, config.ConfigError):
        def fail(kind=kind):
            raise kind("say\nwhat to do")
        monkeypatch.setattr(doctor, "findings", fail)
        assert mistake(cli("doctor", "--json")) == "error: say\nwhat to do\n"


def test_where_mlx_does_not_load_it_is_said_in_two_lines_and_doctor_says_more(monkeypatch, tmp_path):
    blocked = "import sys; sys.modules['mlx'] = sys.modules['mlx.core'] = None; from mlx_hjepa.cli import main; main()"

    def run(*arguments):
        return subprocess.run([sys.executable, "-c", blocked, *arguments], capture_output=True, text=True, cwd=tmp_path)

    config = Path("configs/digits_demo.yaml").resolve()
    for arguments in (["train", str(config)], ["data", "--dataset", "digits"]):
        done = run(*arguments)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: MLX does not load")
        assert len(done.stderr.splitlines()) == 2
    done = run("doctor")
    assert done.returncode == 1
    assert "error  MLX does not load" in done.stdout
    assert "Traceback" not in done.stderr


def test_all_can_leave_fine_tuning_out(monkeypatch, tmp_path, tiny_config):
    monkeypatch.chdir(tmp_path)
    Run.create(tiny_config())
    asked = []
    monkeypatch.setattr("mlx_hjepa.cli._scored", lambda run, protocols, what, quiet: asked.append(protocols))
    monkeypatch.setattr("mlx_hjepa.evaluate.features.load", lambda *_: None)  # there are no weights
    monkeypatch.setattr("mlx_hjepa.evaluate.summary.compare", lambda reports: {})
    for epochs in ([], ["--fine-tune-epochs", "0", "0"]):
        assert CliRunner().invoke(main, ["eval", "tiny", "--all", *epochs]).exit_code == 0
    assert [(p.fine_tune, p.knn, p.augmented, p.context) for p in asked] == [(True,) * 4, (False, True, True, True)]


def test_a_run_is_resumed_by_its_name_and_by_its_own_configuration(monkeypatch, tmp_path, tiny_config):
    monkeypatch.chdir(tmp_path)
    resumed = []
    monkeypatch.setattr(trainer, "train", lambda settings, run, resume, again: resumed.append((run.name, resume)))
    first, second = (Run.create(tiny_config()) for _ in range(2))
    second.metrics_file.write_text('{"kind": "start", "step": 0}\n')
    for given in ("tiny", str(first.folder), str(first.config_file)):
        assert CliRunner().invoke(main, ["train", given, "--resume"]).exit_code == 0
    assert resumed == [("tiny", True)] * 3


def test_a_damaged_configuration_does_not_hide_the_newest_run(monkeypatch, tmp_path, tiny_config):
    monkeypatch.chdir(tmp_path)
    run, damaged = (Run.create(tiny_config()) for _ in range(2))
    damaged.config_file.write_text("")
    assert Run.newest().folder == run.folder
