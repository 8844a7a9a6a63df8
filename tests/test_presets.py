"""What ships: every preset loads and its step runs; the package's imports go forward only, as the design says."""

import ast
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_hjepa
from mlx_hjepa import config
from mlx_hjepa.model.hjepa import HJEPA, key_of
from mlx_hjepa.schedule import Schedule
from mlx_hjepa.train.step import STATISTICS, Step

PACKAGE = Path(mlx_hjepa.__file__).resolve().parent
CONFIGS = PACKAGE.parent / "configs"
PRESETS = sorted(CONFIGS.rglob("*.yaml"))
NATIVE = ["vit_small_100ep", "vit_small_300ep", "vit_tiny_20ep", "vit_tiny_5ep", "vit_wide_20ep", "vit_wide_lunch"]

each_preset = pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)


def preset(name):
    return config.load(next(file for file in PRESETS if file.stem == name))


def tiny_copy(c):
    """The preset with its grid, levels, pools, masks and augmentation, 32 wide and no deeper than its levels need."""
    values = c.model_dump(mode="json")
    depths = sorted({level["depth"] for level in values["model"]["levels"]})
    levels = [{**level, "depth": depths.index(level["depth"]) + 1} for level in values["model"]["levels"]]
    values["model"] |= {"size": None, "dim": 32, "head_dim": 16, "depth": len(depths), "levels": levels}
    values["predictor"] |= {"dim": 32, "head_dim": 16, "depth": 1}
    values["training"] |= {"batch": 4, "accumulation": min(2, c.training.accumulation)}
    return config.build(values, c.name)


# ---------------------------------------------------------------- presets


def test_the_presets_that_commands_and_guides_name_are_there():
    assert {file.stem for file in CONFIGS.glob("*.yaml")} >= {"digits_demo", *NATIVE}
    assert {file.stem for file in (CONFIGS / "compat").glob("*.yaml")} == {
        "m1_max_quick_val", "m1_max_full_20epoch", "m1_max_full_100epoch"}


@each_preset
def test_a_preset_loads_under_its_files_name(file, tmp_path):
    c = config.load(file)
    assert c.name == file.stem
    (tmp_path / "resolved.yaml").write_text(c.dump())
    assert config.load(tmp_path / "resolved.yaml") == c


@pytest.mark.parametrize(("name", "published"), [
    ("vit_wide_20ep", "wide4_s0"), ("vit_wide_lunch", "lunch06_s0"), ("digits_demo", "digits_demo"),
    ("vit_small_100ep", "small_s0"), ("vit_small_300ep", "long300_w8"), ("vit_tiny_5ep", "t5_s0"),
    ("vit_tiny_20ep", "tiny20_s0")])
def test_a_preset_is_what_its_published_scores_were_reached_with(name, published):
    then = config.load(PACKAGE.parent / "docs" / "results" / published / "config.yaml")
    now = preset(name)
    data = then.data.model_copy(update={"root": None, "source": now.data.source})  # both sources give the same batches
    unscored = {"name": name, "data": data, "checkpoints": now.checkpoints, "logging": now.logging}
    assert then.model_copy(update=unscored) == now


@each_preset
def test_the_step_of_a_preset_runs_on_a_tiny_copy(file):
    c = tiny_copy(config.load(file))
    step = Step(HJEPA(c, (0.5,) * 3, (0.25,) * 3), Schedule(c.training, 10), "fp32")
    side = 8 if c.data.dataset == "digits" else 32
    images = mx.array(np.random.default_rng(0).integers(0, 256, (4, side, side, 3), dtype=np.uint8))
    before = step.initial_state()
    after, statistics = step(before, images, key_of(0, 0), step.scalars(0, [1.0] * len(c.model.levels)))
    values = np.array(statistics)
    assert len(values) == len(STATISTICS) + len(c.model.levels)
    assert np.isfinite(values).all()
    found = dict(zip(STATISTICS, values, strict=False))
    assert found["bad"] == 0
    assert found["grad_norm"] > 0
    assert 0.05 < found["loss"] < 2
    for old, new in ((before.parameters, after.parameters), (before.target, after.target)):
        assert np.isfinite(np.array(new)).all()
        assert (np.array(old) != np.array(new)).mean() > 0.5


def test_presets_are_at_the_size_of_their_pictures_and_keep_them_in_memory():
    for name in NATIVE:
        c = preset(name)
        assert (c.data.dataset, c.data.image_size, c.model.patch, c.data.source) == ("cifar10", 32, 4, "resident")
    c = preset("digits_demo")
    assert (c.data.dataset, c.data.image_size, c.augment.flip) == ("digits", 8, False)


@pytest.mark.parametrize(("name", "dim", "levels", "epochs"), [
    ("vit_tiny_5ep", 192, [2, 4, 6, 8, 10, 12], 5), ("vit_tiny_20ep", 192, [2, 4, 6, 8, 10, 12], 20),
    ("vit_small_100ep", 384, [2, 4, 6, 8, 10, 12], 100), ("vit_small_300ep", 384, [2, 4, 6, 8, 10, 12], 300),
    ("vit_wide_20ep", 384, [1, 2, 3, 4, 5, 6], 20),
])
def test_presets_are_what_their_names_say(name, dim, levels, epochs):
    c = preset(name)
    assert (c.model.dim, [level.depth for level in c.model.levels], c.training.epochs) == (dim, levels, epochs)
    assert {level.pool for level in c.model.levels} == {1}


@pytest.mark.parametrize(("name", "dim", "pools", "epochs", "batch", "lr", "decay", "predictor"), [
    ("m1_max_quick_val", 192, [1, 2], 5, 32, 1e-4, 0.04, 2),
    ("m1_max_full_20epoch", 192, [1, 2], 20, 32, 1.5e-4, 0.04, 4),
    ("m1_max_full_100epoch", 384, [1, 2, 4], 100, 24, 1.5e-4, 0.05, 6),
])
def test_compat_presets_keep_the_notes_settings_with_its_defects_corrected(
        name, dim, pools, epochs, batch, lr, decay, predictor):
    c = preset(name)
    assert (c.data.image_size, c.model.patch, c.model.dim, c.model.depth) == (224, 16, dim, 12)
    assert (c.training.epochs, c.training.batch, c.training.lr, c.training.weight_decay) == (epochs, batch, lr, decay)
    assert (c.model.head_dim, c.predictor.head_dim, c.predictor.depth) == (64, 64, predictor)
    assert c.training.ema == (0.996, 1.0)
    assert [(level.depth, level.pool) for level in c.model.levels] == [(12, pool) for pool in pools]
    assert c.model.level_weights == [1, 0.5, 0.25][: len(pools)]


# ---------------------------------------------------------------- imports


def module_name(file):
    parts = ("mlx_hjepa", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


@cache
def imported(module):
    """(module or package, name or None) of every import in a module's source, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if MODULES[module].stem == "__init__" else module.rpartition(".")[0]
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, *([base] if base else [])])
            found += [(base, alias.name) for alias in node.names]
    return found


@cache
def needs(module):
    """The package's modules that a module imports, directly or by way of others."""
    seen, waiting = set(), [module]
    while waiting:
        for base, name in imported(waiting.pop()):
            for target in (base, f"{base}.{name}"):
                if target in MODULES and target not in seen and target != "mlx_hjepa":  # its `load` reaches far, lazily
                    seen.add(target)
                    waiting.append(target)
    return seen


def inside(module, *packages):
    return any(module == f"mlx_hjepa.{p}" or module.startswith(f"mlx_hjepa.{p}.") for p in packages)


def test_the_import_reader_sees_all_kinds_of_imports():
    assert "mlx_hjepa.train.trainer" in needs("mlx_hjepa.cli")  # inside a function, of a package without __init__
    assert "mlx_hjepa.backend" in needs("mlx_hjepa")  # relative
    assert "mlx_hjepa.model.vit" in needs("mlx_hjepa.train.step")  # by way of another module


def test_evaluate_analyze_and_plots_import_nothing_from_train():
    readers = [module for module in MODULES if inside(module, "evaluate", "analyze", "plots")]
    assert len(readers) > 4
    for module in readers:
        assert not {need for need in needs(module) if inside(need, "train", "cli")}, module


def test_imports_go_forward_only():
    later = ["data", "model", "train", "evaluate", "analyze", "plots", "cli"]
    for module in MODULES:
        if inside(module, "config", "schedule", "metrics", "run"):
            assert not {need for need in needs(module) if inside(need, *later)}, module
        if inside(module, "data"):
            assert not {need for need in needs(module) if inside(need, *later[1:])}, module
        if inside(module, "model"):
            assert not {need for need in needs(module) if inside(need, *later[2:])}, module


def test_train_takes_from_evaluate_only_what_the_online_probe_needs():
    for module in MODULES:
        if inside(module, "train"):
            taken = {base for base, _ in imported(module) if inside(base, "evaluate", "analyze", "plots")}
            assert taken <= {"mlx_hjepa.evaluate.features", "mlx_hjepa.evaluate.knn"}, module


def private(name):
    return name is not None and name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("module", MODULES)
def test_no_module_uses_a_siblings_underscore_names(module):
    siblings = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("mlx_hjepa")):
            assert not [alias.name for alias in node.names if private(alias.name)]
            siblings |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in siblings:
            assert not private(node.attr), f"{node.value.id}.{node.attr}"
