"""The configuration of a run: strict, typed, and complete.

An unknown or mistyped key is an error that names the nearest right one. `load` reads a file and `--set a.b=value`.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

PICTURES = {"cifar10": 50_000, "cifar100": 50_000, "digits": 1_437}  # of the training splits
SIZES = {"vit_tiny": (192, 12), "vit_small": (384, 12), "vit_base": (768, 12), "vit_wide": (384, 6)}


class ConfigError(Exception):
    """A mistake in a configuration, in one or two lines that say what to do."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as true, and pydantic would take true for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("cannot be true or false")
        return value


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("must be two numbers, the smaller first")
    return pair


Unit = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
UnitRange = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]],
                      AfterValidator(_ordered)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_ordered)]


class Data(Section):
    """Where the pictures come from. `root`: a folder of pictures, or an unpacked CIFAR archive. `source`: by default a
    folder's are streamed, others kept in the accelerator's memory. `hold_out`: validation pictures train nothing."""

    dataset: Literal["cifar10", "cifar100", "digits", "folder"] = "cifar10"
    root: str | None = None
    source: Literal["stream", "resident"] = Field(
        default_factory=lambda known: "stream" if known.get("dataset") == "folder" else "resident")
    image_size: Count = 32
    split_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    hold_out: bool = False
    threads: Count = 4
    on_corrupt: Literal["skip", "error"] = "error"

    @model_validator(mode="after")
    def _has_the_root_it_needs(self):
        if self.dataset == "folder" and not self.root:
            raise ValueError("dataset: folder needs data.root, the folder of pictures")
        if self.dataset == "digits" and self.root:
            raise ValueError("data.root: the digits come with scikit-learn and have no folder; leave it out")
        return self


class Augment(Section):
    """What the step does to each picture: a crop, a mirror image, colours."""

    crop: Literal["random_resized", "pad", "none"] = "random_resized"
    scale: UnitRange = (0.3, 1.0)
    aspect: PositiveRange = (0.75, 4 / 3)
    pad: Annotated[int, Field(ge=0, le=64)] = 4
    flip: bool = True
    jitter: Unit = 0.0


class Level(Section):
    """One rung of the hierarchy: an encoder depth and a pooling window."""

    depth: Count
    pool: Count = 1


def _level(value: Any) -> Any:
    return {"depth": value} if isinstance(value, int) and not isinstance(value, bool) else value


class Model(Section):
    """The encoder. `size` names a width and a depth; `dim` and `depth` give them explicitly."""

    size: Literal["vit_tiny", "vit_small", "vit_base", "vit_wide"] | None = None
    dim: Count | None = None
    depth: Count | None = None
    head_dim: Count = 64
    patch: Count = 4
    mlp_ratio: Positive = 4.0
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    levels: list[Annotated[Level, BeforeValidator(_level)]]
    level_weights: Literal["equal", "balanced"] | list[Positive] = "equal"

    @model_validator(mode="before")
    @classmethod
    def _resolve_size(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("size") in SIZES:
            named = dict(zip(("dim", "depth"), SIZES[values["size"]], strict=True))
            for key, value in named.items():
                if values.get(key) not in (None, value):
                    raise ValueError(f"size {values['size']} has {key} {value}, not {values[key]}; set one to null")
            return {**values, **named}
        return values

    @model_validator(mode="after")
    def _check(self):
        if self.dim is None or self.depth is None:
            raise ValueError(f"give size (one of {', '.join(SIZES)}), or both dim and depth")
        _check_heads("dim", self.dim, self.head_dim)
        depths = [level.depth for level in self.levels]
        if not depths:
            raise ValueError("levels needs at least one depth")
        if max(depths) != self.depth:
            raise ValueError(f"levels: the deepest, {max(depths)}, must be the encoder's depth, {self.depth}")
        if sorted(depths) != depths:
            raise ValueError(f"levels must be in order of depth; found {depths}")
        pairs = [(level.depth, level.pool) for level in self.levels]
        if twice := [pair for pair in pairs if pairs.count(pair) > 1]:
            raise ValueError(f"levels: depth {twice[0][0]} with pool {twice[0][1]} is given twice")
        if isinstance(self.level_weights, list) and len(self.level_weights) != len(depths):
            raise ValueError(f"level_weights has {len(self.level_weights)} numbers for {len(depths)} levels")
        return self


def _check_heads(key: str, dim: int, head_dim: int) -> None:
    if dim % 4:
        raise ValueError(f"{key} {dim} must be a multiple of 4 (2-D sin-cos positions)")
    if dim % head_dim:
        divisors = [d for d in range(4, 257, 4) if dim % d == 0]
        raise ValueError(f"{key} {dim} is no multiple of head_dim {head_dim}; head_dim can be {divisors}")


class Predictor(Section):
    """The narrow transformer from context tokens and mask tokens to target tokens."""

    dim: Count = 192
    depth: Count = 4
    head_dim: Count = 64

    @model_validator(mode="after")
    def _check(self):
        _check_heads("dim", self.dim, self.head_dim)
        return self


class Masking(Section):
    """Which tokens are seen and which are predicted; `masks` of this package gives the rules."""

    select: Literal["random", "blocks"] = "random"
    target_blocks: Annotated[int, Field(ge=1, le=32)] = 4
    scale: UnitRange = (0.15, 0.2)
    aspect: PositiveRange = (0.75, 1.5)
    target_tokens: Count = 28
    context_tokens: Count = 28
    overhang: Annotated[int, Field(ge=0)] = 0
    masks_per_image: Annotated[int, Field(ge=1, le=16)] = 1


class Training(Section):
    """The optimisation. `batch`: pictures an update, in `accumulation` parts; `sigreg`: weight of hjepa.sigreg."""

    epochs: Count = 20
    batch: Count = 256
    accumulation: Count = 1
    lr: Positive = 1e-3
    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    warmup_epochs: Annotated[float, Field(ge=0)] = 2.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    weight_decay_end: Annotated[float, Field(ge=0)] | None = None
    betas: tuple[Unit, Unit] = (0.9, 0.95)
    eps: Positive = 1e-8
    clip: Positive = 1.0
    ema: tuple[Unit, Unit] = (0.996, 0.9995)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    sigreg: Annotated[float, Field(ge=0)] = 0.0
    max_bad_steps: Count = 20

    @model_validator(mode="after")
    def _check(self):
        if max(self.betas) >= 1:
            raise ValueError(f"betas must be below 1; found {list(self.betas)}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} leaves nothing of {self.epochs} epochs")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}")
        if self.ema[0] > self.ema[1]:
            raise ValueError(f"ema falls from {self.ema[0]:g} to {self.ema[1]:g}; it must rise or stay")
        if self.batch % self.accumulation:
            raise ValueError(f"batch {self.batch} is no multiple of accumulation {self.accumulation}")
        return self


class Logging(Section):
    """What is written while training. `health_every` and `knn_every` count epochs; knn_every 0 is never."""

    every_steps: Count = 50
    health_every: Positive = 1.0
    knn_every: Annotated[int, Field(ge=0)] = 5
    tensorboard: bool = False
    wandb: bool = False


class Checkpoints(Section):
    """When a checkpoint is written, and how many are kept beside the best one."""

    every_minutes: Positive = 10.0
    every_epochs: Annotated[int, Field(ge=0)] = 5
    keep: Count = 2


class Config(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data: Data = Data()
    augment: Augment = Augment()
    model: Model
    predictor: Predictor = Predictor()
    masking: Masking = Masking()
    training: Training = Training()
    logging: Logging = Logging()
    checkpoints: Checkpoints = Checkpoints()

    @property
    def grid(self) -> int:
        """Patches along one side of a picture."""
        return self.data.image_size // self.model.patch

    @model_validator(mode="after")
    def _check(self):
        size, patch, g, m, batch = self.data.image_size, self.model.patch, self.grid, self.masking, self.training.batch
        if size % patch:
            raise ValueError(f"data.image_size {size} is no multiple of model.patch {patch}")
        for level in self.model.levels:
            if level.pool > g:
                raise ValueError(f"model.levels: pool {level.pool} is larger than the grid of {g} x {g} patches")
        for dim in (self.model.dim, self.predictor.dim):
            if round((dim or 0) * self.model.mlp_ratio) < 1:
                raise ValueError(f"model.mlp_ratio {self.model.mlp_ratio:g} leaves a width of {dim} no hidden layer")
        if (held := PICTURES.get(self.data.dataset)) and batch > held:
            raise ValueError(f"training.batch {batch} is larger than the {held} pictures of {self.data.dataset}")
        if m.target_tokens + m.context_tokens > g * g:
            raise ValueError(f"masking: target_tokens {m.target_tokens} + context_tokens {m.context_tokens} is more "
                             f"than the grid's {g * g} tokens")
        if m.overhang and m.select != "blocks":
            raise ValueError("masking.overhang needs masking.select: blocks")
        return self

    def dump(self) -> str:
        """The resolved configuration as YAML."""
        values = self.model_dump(mode="json")
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as a word; this loader reads it as the number that was meant. A key given twice, of which
    PyYAML would take the last, is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the words that `_Loader` would read as numbers."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(
        r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$|^[-+]?\.\d+([eE][-+]?\d+)?$"), list("-+0123456789."))


def parse_yaml(text: str) -> Any:
    """YAML text as plain values; raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def load(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """Read a configuration file and apply `a.b=value` overrides.

    Raises ConfigError, which names the file, the key, the value and the nearest valid key.
    """
    path = Path(path)
    try:
        values = parse_yaml(path.read_text())
    except FileNotFoundError:
        near = difflib.get_close_matches(path.stem, [f.stem for f in Path("configs").glob("*.yaml")], 1)
        hint = f"Did you mean configs/{near[0]}.yaml?" if near else "`ls configs` lists the presets"
        raise ConfigError(f"{path}: no such file. {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of sections such as data, model, training")
    values = {"name": path.stem, **{k: v for k, v in values.items() if v is not None}}  # a section may be left empty
    for item in overrides:
        _override(values, item)
    return build(values, str(path), overrides)


def build(values: dict, where: str = "config", overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """A Config from plain values; raises ConfigError. What an override set is blamed on it."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        told = [e for e in error.errors() if e["type"] != "default_factory_not_called"][:2]  # that one only follows
        raise ConfigError("\n".join(_explain(where, e, overrides) for e in told)) from None


def section(kind: type[Section], name: str, values: dict) -> Any:
    """One section by itself; raises ConfigError."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(name, error.errors()[0])) from None


def _override(values: dict, item: str) -> None:
    key, found, text = item.partition("=")
    if not found or not key:
        raise ConfigError(f"--set {item}: write it as section.key=value, for example training.lr=1e-3")
    *sections, last = key.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {item}: {section} is no section")
    try:
        values[last] = parse_yaml(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {item}: the value is not valid YAML") from None


def _explain(where: str, error: Any, overrides: tuple[str, ...] | list[str] = ()) -> str:
    path = [str(p) for p in error["loc"] if not str(p).startswith(("function-", "list[", "literal["))]
    key, value = ".".join(path), error.get("input")
    for item in overrides:
        override = item.partition("=")[0]
        if key and (f"{override}.".startswith(f"{key}.") or f"{key}.".startswith(f"{override}.")):
            where = f"--set {item}"
    shown = "" if isinstance(value, (dict, BaseModel)) or error["type"] == "missing" else f" (found {value!r})"
    if error["type"] == "extra_forbidden":
        known = _keys_beside(path)
        near = difflib.get_close_matches(path[-1].lower(), known, 1, 0.5)
        wanted = {path[-1], *(value if isinstance(value, dict) else ())}
        elsewhere = [k for k in _all_keys() if k.split(".")[-1] in wanted]
        hint = (f"did you mean {'.'.join([*path[:-1], near[0]])}?" if near else
                f"did you mean {elsewhere[0]}?" if elsewhere else f"the keys here are {', '.join(known)}")
        return f"{where}: unknown key {key}: {hint}{shown}"
    message = error["msg"].removeprefix("Value error, ")
    words = re.findall("'([^']*)'", str(error.get("ctx", {}).get("expected")))
    near = difflib.get_close_matches(str(value), words, 1, 0.5)
    shown += f": did you mean {near[0]}?" if near else ""
    return f"{where}: {key + ': ' if key else ''}{message[0].lower() + message[1:]}{shown}"


def _keys_beside(path: list[str]) -> list[str]:
    model: Any = Config
    for part in path[:-1]:
        if part.isdigit():
            return list(Level.model_fields)
        field = model.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return [part] if field is None else list(Level.model_fields)
        model = field.annotation
    return list(model.model_fields)


def _all_keys() -> list[str]:
    sections = {name: getattr(field.annotation, "model_fields", None) for name, field in Config.model_fields.items()}
    return [key for name, fields in sections.items() for key in ([f"{name}.{k}" for k in fields] if fields else [name])]
