"""The configuration: what it refuses, and how; and that everything it accepts is read by something."""

import copy
from pathlib import Path

import pytest

import mlx_hjepa
from mlx_hjepa import config
from mlx_hjepa.config import SIZES, Config, ConfigError, Level, build, load, parse_yaml, section

PACKAGE = Path(mlx_hjepa.__file__).parent
BASE = {
    "name": "base",
    "data": {"image_size": 16},
    "model": {"dim": 32, "depth": 2, "head_dim": 16, "patch": 4, "levels": [1, 2]},
    "predictor": {"dim": 32, "depth": 1, "head_dim": 16},
    "masking": {"target_tokens": 4, "context_tokens": 6},
    "training": {"epochs": 4, "batch": 8, "warmup_epochs": 1},
}


def made(**changes):
    """The base with keys changed, `section__key=value`."""
    values = copy.deepcopy(BASE)
    for name, value in changes.items():
        *sections, last = name.split("__")
        inner = values
        for part in sections:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return build(values, "base.yaml")


def refusal(**changes) -> str:
    with pytest.raises(ConfigError) as error:
        made(**changes)
    text = str(error.value)
    assert text.startswith("base.yaml: ")
    assert len(text.splitlines()) <= 2
    return text


@pytest.fixture
def write(tmp_path):
    def to_file(text, name="some.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name
    return to_file


MODEL = "model: {size: vit_tiny, levels: [12]}\n"


# ---------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(("key", "nearest"), [
    ("trainnig", "training"),
    ("Training", "training"),
    ("training__lrr", "training.lr"),
    ("training__LR", "training.lr"),
    ("training__batchsize", "training.batch"),
    ("training__wramup_epochs", "training.warmup_epochs"),
    ("data__imagesize", "data.image_size"),
    ("masking__context_token", "masking.context_tokens"),
    ("checkpoints__every_minute", "checkpoints.every_minutes"),
    ("lr", "training.lr"),              # the right name in the wrong place
    ("model__lr", "training.lr"),
])
def test_an_unknown_key_is_an_error_that_names_the_nearest(key, nearest):
    text = refusal(**{key: 1})
    assert text == f"base.yaml: unknown key {key.replace('__', '.')}: did you mean {nearest}? (found 1)"


def test_an_unknown_key_of_a_level_names_the_nearest():
    text = refusal(model__levels=[{"depth": 1, "pol": 2}, 2])
    assert text == "base.yaml: unknown key model.levels.0.pol: did you mean model.levels.0.pool? (found 2)"


def test_a_key_near_nothing_lists_the_keys_of_its_place():
    assert "the keys here are dataset, root, source" in refusal(data__zzz=1)
    assert "the keys here are name, seed, data" in refusal(xyzzy={"a": 1})
    assert "unknown key optimizer: did you mean training.lr?" in refusal(optimizer={"lr": 1})


def test_a_folders_pictures_are_streamed_and_all_others_stay_in_memory():
    for dataset, given, source in (("cifar10", {}, "resident"), ("digits", {}, "resident"), ("folder", {}, "stream"),
                                   ("cifar10", {"data__source": "stream"}, "stream"),
                                   ("folder", {"data__source": "resident"}, "resident")):
        root = {"data__root": "pictures"} if dataset == "folder" else {}
        assert made(data__dataset=dataset, **root, **given).data.source == source
    assert len(refusal(data__dataset="mnist").splitlines()) == 1  # nothing of the source that hangs on it


def test_every_section_refuses_unknown_keys():
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, config.Section):
            assert f"unknown key {name}.qqqq" in refusal(**{f"{name}__qqqq": 1})


# ---------------------------------------------------------------- types and ranges


@pytest.mark.parametrize(("key", "value"), [
    ("training.lr", "fast"), ("training.lr", None), ("training.lr", True), ("training.lr", [1e-3]),
    ("training.lr", float("nan")), ("training.lr", float("inf")),
    ("training.batch", 4.5), ("training.batch", True), ("training.batch", "many"),
    ("training.ema", 0.996), ("training.precision", "fp64"),
    ("augment.flip", "perhaps"), ("augment.flip", 2), ("augment.scale", 0.5), ("augment.scale", ["a", 1]),
    ("data.dataset", "cifar11"), ("data.root", 3), ("data.on_corrupt", True),
    ("model.size", "vit_huge"), ("model.levels", 2), ("model.levels", ["a"]), ("model.levels", [True, 2]),
    ("model.level_weights", "equals"), ("masking.select", "block"),
    ("training", None), ("training", 3), ("masking", []), ("seed", "one"), ("name", 3),
])
def test_a_mistyped_value_is_an_error_that_names_key_and_value(key, value):
    text = refusal(**{key.replace(".", "__"): value})
    assert f" {key}" in text
    assert "found" in text


@pytest.mark.parametrize(("key", "values"), [
    ("seed", [-1, 2**31]),
    ("data.image_size", [0]), ("data.threads", [0]), ("data.split_seed", [-1, 2**31]),
    ("augment.scale", [[0, 1], [0.5, 1.1], [0.9, 0.3]]), ("augment.aspect", [[0, 1], [2, 1]]),
    ("augment.pad", [-1]), ("augment.jitter", [-0.1, 1.1]),
    ("model.drop_path", [-0.1, 1.0]), ("model.mlp_ratio", [0]), ("model.patch", [0]), ("model.level_weights", [[1, 0]]),
    ("predictor.depth", [0]), ("predictor.dim", [0]), ("predictor.head_dim", [0]),
    ("masking.target_blocks", [0, 33]), ("masking.scale", [[0.2, 0.1], [0.5, 2]]), ("masking.target_tokens", [0]),
    ("masking.context_tokens", [0]), ("masking.masks_per_image", [0, 17]), ("masking.overhang", [-1]),
    ("training.epochs", [0]), ("training.batch", [0]), ("training.accumulation", [0]), ("training.lr", [0, -1e-3]),
    ("training.min_lr", [-1e-6]), ("training.warmup_epochs", [-1]), ("training.weight_decay", [-0.1]),
    ("training.weight_decay_end", [-0.1]), ("training.betas", [[0.9, 1.5], [0.9, 1.0], [-0.1, 0.9], [0.9]]),
    ("training.eps", [0]), ("training.clip", [0]), ("training.ema", [[0.9, 1.1]]), ("training.max_bad_steps", [0]),
    ("logging.every_steps", [0]), ("logging.health_every", [0]), ("logging.knn_every", [-1]),
    ("checkpoints.every_minutes", [0]), ("checkpoints.every_epochs", [-1]), ("checkpoints.keep", [0]),
])
def test_a_value_out_of_range_is_an_error_that_names_its_key(key, values):
    for value in values:
        assert key.split(".")[-1] in refusal(**{key.replace(".", "__"): value})


def test_a_run_is_named_by_a_plain_word():
    for bad in ("", "a/b", "..", "a b", "-a", "é"):
        refusal(name=bad)
    assert made(name="vit_small-2.b").name == "vit_small-2.b"


# ---------------------------------------------------------------- cross-checks


@pytest.mark.parametrize(("changes", "text"), [
    ({"model__head_dim": 24}, "model: dim 32 is no multiple of head_dim 24; head_dim can be [4, 8, 16, 32]"),
    ({"predictor__head_dim": 64}, "predictor: dim 32 is no multiple of head_dim 64; head_dim can be [4, 8, 16, 32]"),
    ({"model__dim": 30, "model__head_dim": 15}, "model: dim 30 must be a multiple of 4"),
    ({"data__image_size": 18}, "data.image_size 18 is no multiple of model.patch 4"),
    ({"model__patch": 32}, "data.image_size 16 is no multiple of model.patch 32"),
    ({"masking__target_tokens": 11}, "target_tokens 11 + context_tokens 6 is more than the grid's 16 tokens"),
    ({"masking__overhang": 1}, "masking.overhang needs masking.select: blocks"),
    ({"model__levels": [1]}, "levels: the deepest, 1, must be the encoder's depth, 2"),
    ({"model__levels": [1, 3]}, "levels: the deepest, 3, must be the encoder's depth, 2"),
    ({"model__levels": [2, 1]}, "levels must be in order of depth; found [2, 1]"),
    ({"model__levels": []}, "levels needs at least one depth"),
    ({"model__levels": [{"depth": 2, "pool": 5}]}, "pool 5 is larger than the grid of 4 x 4 patches"),
    ({"model__levels": [1, {"depth": 2, "pool": 2}, {"depth": 2, "pool": 2}]}, "depth 2 with pool 2 is given twice"),
    ({"model__mlp_ratio": 0.01}, "model.mlp_ratio 0.01 leaves a width of 32 no hidden layer"),
    ({"training__batch": 60000}, "training.batch 60000 is larger than the 50000 pictures of cifar10"),
    ({"model__level_weights": [1.0]}, "level_weights has 1 numbers for 2 levels"),
    ({"model__dim": None}, "give size (one of vit_tiny, vit_small, vit_base, vit_wide), or both dim and depth"),
    ({"model__depth": None}, "give size"),
    ({"training__warmup_epochs": 4}, "warmup_epochs 4 leaves nothing of 4 epochs"),
    ({"training__accumulation": 3}, "batch 8 is no multiple of accumulation 3"),
    ({"data__dataset": "folder"}, "dataset: folder needs data.root"),
    ({"data__dataset": "digits", "data__root": "p"}, "the digits come with scikit-learn and have no folder"),
])
def test_keys_that_do_not_fit_each_other(changes, text):
    assert text in refusal(**changes)


def test_the_last_that_still_fits():
    made(masking__target_tokens=10)
    made(model__levels=[1, {"depth": 2, "pool": 4}])
    made(model__levels=[{"depth": 2}, {"depth": 2, "pool": 2}])
    made(masking__overhang=2, masking__select="blocks")
    made(training__warmup_epochs=3.5)
    made(training__accumulation=8)
    made(data__dataset="folder", data__root="here")


# ---------------------------------------------------------------- what is accepted


@pytest.mark.parametrize(("text", "value"), [
    ("1e-4", 1e-4), ("1E-4", 1e-4), ("-1e-4", -1e-4), ("1.5e-3", 1.5e-3), ("1.e3", 1e3), ("2e5", 2e5), (".5", 0.5),
    ("0.05", 0.05), ("1.0e-3", 1e-3), ("+1e2", 100.0),
])
def test_numbers_are_read_as_numbers(text, value):
    found = parse_yaml(f"a: {text}")["a"]
    assert isinstance(found, float)
    assert found == value


@pytest.mark.parametrize("text", ["1e", "e4", "1e-4x", "1-4", "vit_1e4", "."])
def test_words_are_read_as_words(text):
    assert parse_yaml(f"a: {text}")["a"] == text


def test_a_size_names_width_and_depth():
    for name, (dim, depth) in SIZES.items():
        values = {**BASE["model"], "dim": None, "depth": None, "size": name, "levels": [depth]}
        m = made(model=values).model
        assert (m.dim, m.depth) == (dim, depth)


def test_a_level_is_a_depth_or_a_depth_with_a_pool():
    assert made(model__levels=[1, {"depth": 2, "pool": 2}]).model.levels == [Level(depth=1), Level(depth=2, pool=2)]


def test_a_config_cannot_be_changed():
    c = made()
    with pytest.raises(ValueError, match="frozen"):
        c.seed = 3


def test_sections_do_not_share_defaults():
    assert made(training__lr=0.1).training.lr == 0.1
    assert made().training.lr == 1e-3


# ---------------------------------------------------------------- files and overrides


def test_load_names_file_key_and_value(write):
    file = write(MODEL + "training: {lr: -1e-4}\n")
    with pytest.raises(ConfigError) as error:
        load(file)
    assert str(error.value) == f"{file}: training.lr: input should be greater than 0 (found -0.0001)"


@pytest.mark.parametrize(("text", "message"), [
    ("", "a mapping of sections"), ("- 1\n- 2\n", "a mapping of sections"), ("words", "a mapping of sections"),
    ("model: [1, 2", "not valid YAML"), ("a: b: c", "not valid YAML"),
    ("model: !!python/name:os.system x", "not valid YAML"),
    ("training: {lr: 1.0}\n" + MODEL + "training: {batch: 8}\n", "training is given twice"),
    (MODEL + "training: {lr: 1.0, lr: 2.0}\n", "lr is given twice"),
    ("seed: 3\n", "model: field required"), ("1: 2\n" + MODEL, "keys should be strings"),
])
def test_a_file_that_is_no_configuration(write, text, message):
    file = write(text)
    with pytest.raises(ConfigError, match=message) as error:
        load(file)
    assert str(error.value).startswith(f"{file}: ")
    assert len(str(error.value).splitlines()) <= 2


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(ConfigError, match=r"no such file.*configs"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"no such file. Did you mean configs/vit_wide_lunch.yaml\?"):
        load("vit_wide_lunhc")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "bytes.yaml")


def test_the_name_is_the_files_unless_given(write):
    assert load(write(MODEL, "night.yaml")).name == "night"
    assert load(write(MODEL + "name: day\n", "night.yaml")).name == "day"


def test_overrides(write):
    c = load(write(MODEL + "training: {batch: 128}\n"), [
        "training.lr=1e-4", "training.ema=[0.99, 1.0]", "model.levels=[4, {depth: 12, pool: 2}]", "augment.flip=false",
        "model.level_weights=[1, 0.5]", "seed=7", "data.root=/tmp/a=b", "training.weight_decay_end=null",
        "logging={every_steps: 9}", "seed=8"])
    assert c.training.lr == 1e-4
    assert c.training.batch == 128
    assert c.training.ema == (0.99, 1.0)
    assert c.model.levels == [Level(depth=4), Level(depth=12, pool=2)]
    assert c.model.level_weights == [1.0, 0.5]
    assert c.augment.flip is False
    assert c.data.root == "/tmp/a=b"
    assert c.logging.every_steps == 9
    assert c.seed == 8  # the last one counts


@pytest.mark.parametrize(("item", "message"), [
    ("training.lr", "write it as section.key=value"), ("=3", "write it as section.key=value"), ("", "write it as"),
    ("training.lr=[1", "not valid YAML"), ("seed.a=1", "seed is no section"),
    ("model.levels.0=3", "levels is no section"), ("training.lr.x=1", "training.lr"),
    ("training.lrr=1", "did you mean training.lr?"), ("training.=1", "unknown key training."),
    ("training.lr=", "training.lr"), ("training.lr=quick", "training.lr"), ("nothing.here=1", "unknown key nothing"),
    ("model.levels=[1, 2]", "the deepest, 2, must be the encoder's depth, 12"), ("training=3", "training"),
])
def test_a_bad_override(write, item, message):
    file = write("seed: 1\n" + MODEL)
    with pytest.raises(ConfigError) as error:
        load(file, [item])
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_what_an_override_set_is_blamed_on_it(write):
    file = write(MODEL + "data: {source: streem}\n")
    for item, message in (("training.lr=quick", "--set training.lr=quick: training.lr: "),
                          ("training={lrr: 1}", "--set training={lrr: 1}: unknown key training.lrr"),
                          ("data.dataset=cifar", "did you mean cifar10?")):
        with pytest.raises(ConfigError) as error:
            load(file, [item])
        assert message in str(error.value)
        assert f"{file}: data.source: " in str(error.value)
        assert "(found 'streem'): did you mean stream?" in str(error.value)


def test_an_override_leaves_an_empty_section_usable(write):
    assert load(write(MODEL + "training:\n"), ["training.lr=2e-3"]).training.lr == 2e-3


def test_one_section_by_itself():
    assert section(config.Data, "data", {"dataset": "digits"}).dataset == "digits"
    with pytest.raises(ConfigError, match=r"data: dataset: folder needs data\.root"):
        section(config.Data, "data", {"dataset": "folder"})


# ---------------------------------------------------------------- the resolved config


@pytest.mark.parametrize("changes", [
    {},
    {"training__lr": 1e-5, "training__eps": 1e-12, "training__weight_decay": 0.1 + 0.2, "training__min_lr": 1e-7,
      "augment__aspect": [0.75, 4 / 3]},
    {"model__levels": [1, {"depth": 2, "pool": 2}], "model__level_weights": [1, 0.25]},
    {"name": "1e5", "data__root": "yes"},  # words that a YAML reader takes for something else
    {"model__level_weights": "balanced", "training__weight_decay_end": 0.4, "masking__select": "blocks",
     "masking__overhang": 1},
])
def test_the_resolved_config_reads_back_the_same(tmp_path, changes):
    c = made(**changes)
    (tmp_path / "other.yaml").write_text(c.dump())
    assert load(tmp_path / "other.yaml") == c


def test_the_resolved_config_holds_every_key():
    values = parse_yaml(made().dump())
    assert set(values) == set(Config.model_fields)
    for name, field in Config.model_fields.items():
        if isinstance(values[name], dict):
            assert set(values[name]) == set(field.annotation.model_fields), name
    assert values["model"]["levels"] == [{"depth": 1, "pool": 1}, {"depth": 2, "pool": 1}]


# ---------------------------------------------------------------- contradictions


@pytest.mark.parametrize(("overrides", "words"), [
    ({"model": {"size": "vit_tiny", "dim": 384, "depth": None, "head_dim": 64, "levels": [12]}},
     "size vit_tiny has dim 192"),
    ({"training": {"lr": 1e-5, "min_lr": 1e-4}}, "min_lr 0.0001 is above lr"),
    ({"training": {"ema": [1.0, 0.9]}}, "ema falls")])
def test_what_contradicts_itself_is_refused(tiny_config, overrides, words):
    with pytest.raises(config.ConfigError, match=words):
        tiny_config(**overrides)


def test_a_resolved_configuration_can_be_given_another_size(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(config.load("configs/vit_tiny_20ep.yaml").dump())
    with pytest.raises(config.ConfigError, match="size vit_small has dim 384"):
        config.load(file, ["model.size=vit_small"])
    changed = config.load(file, ["model.size=vit_small", "model.dim=null", "model.depth=null"])
    assert changed.model.dim == 384


def test_a_section_left_empty_has_its_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {size: vit_tiny, levels: [12]}\ntraining:\n")
    assert config.load(file).training == config.Training()
