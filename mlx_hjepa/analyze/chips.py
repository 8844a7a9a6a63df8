"""Apple's chips, and how fast a step could be on one that nobody measured: a roofline band, always a projection.

The figures are public ones; `mark` says whether somebody measured one, or only named, computed or scaled it.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from mlx_hjepa import backend
from mlx_hjepa.analyze.timing import Costs, flops_per_picture, parameters
from mlx_hjepa.config import Config
from mlx_hjepa.run import UserError

METAL = "philipturner/metal-benchmarks"
PAGES = "community pages (hmc-tech, michaelstinkerings.org)"
APPLE = "Apple"
LATER = "tables copied from Apple's (goodnewsapodcast.com, parallax#449, inference-atlas#194)"
BENCHMARK = "TristanBilot/mlx-benchmark 85c5376: fp32 Linear, 512 inputs; reduction"
FLOPS_A_CORE = 256  # fp32 and fp16 alike, a core and cycle: 128 multiply-adds

# name, GHz, its source; memory GB/s by GPU cores, its source; in MLX fp32 matrix product TFLOP/s by GPU cores, and
# reduction GB/s at so many
TABLE: list[tuple[Any, ...]] = [
    ("M1", 1.278, METAL, {8: 68}, APPLE, {8: 1.62}, 56, 8),
    ("M1 Pro", 1.296, METAL, {16: 200, 14: 200}, APPLE, {16: 4.14}, 158, 16),
    ("M1 Max", 1.296, METAL, {32: 400, 24: 400}, APPLE, {32: 7.24}, 305, 32),
    ("M1 Ultra", 1.296, METAL, {64: 800, 48: 800}, APPLE, {48: 12.2}, 522, 48),
    ("M2", 1.398, METAL, {10: 100}, APPLE, {10: 1.89}, 93, 10),
    ("M2 Pro", 1.398, METAL, {19: 200, 16: 200}, APPLE, {16: 4.31}, 168, 16),
    ("M2 Max", 1.398, METAL, {38: 400, 30: 400}, APPLE, {38: 8.95}, 337, 38),
    ("M2 Ultra", 1.398, METAL, {76: 800, 60: 800}, APPLE, {76: 19.3}, 589, 76),
    ("M3", 1.398, PAGES, {10: 102}, LATER, {10: 2.82}, 93, 10),
    ("M3 Pro", 1.398, PAGES, {18: 154, 14: 154}, LATER, {14: 3.21}, 130, 14),
    ("M3 Max", 1.398, PAGES, {40: 400, 30: 300}, LATER, {40: 8.95}, 341, 40),
    ("M3 Ultra", 1.398, PAGES, {80: 819, 60: 819}, LATER, {60: 16.2}, 563, 60),
    ("M4", 1.525, PAGES, {10: 120, 8: 120}, LATER, {10: 3.31}, 92, 10),
    ("M4 Pro", 1.58, PAGES, {20: 273, 16: 273}, LATER, {20: 6.45, 16: 5.25}, 239, 20),
    ("M4 Max", 1.58, PAGES, {40: 546, 32: 410}, LATER, {40: 12.8}, 423, 40),
    ("M5", 1.578, PAGES, {10: 153.6}, LATER, {}, 122, 10),
    ("M5 Pro", 1.58, PAGES, {20: 307}, LATER, {}, None, 20),
    ("M5 Max", 1.58, PAGES, {40: 614, 32: 460}, LATER, {}, None, 40),
]
MEASURED_M5 = "michaelstinkerings.org"
PEAK = {("M5", 10): 3.76}  # TFLOP/s in fp32 that somebody measured (MEASURED_M5)
HALF = {  # measured bf16 products: TFLOP/s, GPU cores, source; M5's ran on its matrix units, slower or not used in fp32
    "M3 Ultra": (18.9, 80, "mlx#3196: large; the GPU cores are not told, the most are assumed"),
    "M5": (6.5, 10, f"{MEASURED_M5}: 1280^3"), "M5 Pro": (13.5, 20, "mlx#3295: 1280^3")}

# Of the matrix rate, a training step: 2 to 3.5 TFLOP/s on an M1 Max up to width 384, assumed; 0.32 to 0.47 of the peak
# at 1024, a 154M language model on six chips (MLX-vs-Pytorch, mlx-examples#127), measured
NARROW, NARROW_SHARE = 384, (2.0 / 7.24, 3.5 / 7.24)
WIDE, WIDE_SHARE = 1024, (0.32 * 10.6 / 7.24, 0.47 * 10.6 / 7.24)
MATRIX_OF_PEAK = (0.53, 0.68, 0.85)  # where no product was measured: what the chips above reach
REDUCTION_OF_SPEC = 0.76
MEMORY_SHARE = (0.35, 0.6, 1.0)  # of a reduction's rate: a softmax reached the first on an M1 Max, a reduction the last
LAUNCH = (3e-6, 5e-6, 10e-6)  # seconds a kernel, an assumed range; a plain one in sequence (pytorch#82707) is 3
FIRST_STEP = 30.0  # seconds, compilation included: a guess
LAUNCHES = (148, 63, 53)  # kernels of a step: fixed, an encoder block, a predictor block (benchmarks/throughput.py)
SIGREG = (35, 5)  # those of training.sigreg: fixed, a level's depth (4 in fp32, 6 in bf16)
JITTER = 28  # those of augment.jitter


class Figure(NamedTuple):
    value: float
    source: str
    mark: str  # measured, scaled from 32 GPU cores, published, computed; of fp32


@dataclass(frozen=True)
class Chip:
    """peak and matrix (by precision, "fp32" or "half") in TFLOP/s, memory and reduction in GB/s; missing or None where
    nobody published one."""

    name: str
    cores: int
    peak: Figure
    memory: Figure
    matrix: dict[str, Figure]
    reduction: Figure | None

    def precision(self, name: str) -> str:
        """`auto` as it would be on this chip."""
        return backend.auto_precision("metal", f"applegpu_g{12 + int(self.name[1])}") if name == "auto" else name


class Band(NamedTuple):
    """Seconds a step; label says what it is."""

    low: float
    mid: float
    high: float
    label: str


@dataclass(frozen=True)
class Projected:
    """A chip's speed with a configuration, as `timing.project` takes it."""

    config: Config
    chip: Chip

    @property
    def costs(self) -> Costs:
        return Costs(first_step=FIRST_STEP)

    @property
    def basis(self) -> str:
        return band(self.config, self.chip, self.config.training.batch).label

    def step(self, batch: int) -> tuple[float, float, float]:
        return band(self.config, self.chip, batch)[:3]


def _figure(value: float, source: str, at: int, cores: int) -> Figure:
    return Figure(value, source, "measured" if cores == at else f"scaled from {at} GPU cores")


def _chips() -> list[Chip]:
    chips = []
    for name, ghz, clock, memories, spec, products, reduction, at in TABLE:
        for cores, memory in memories.items():
            peak = Figure(cores * FLOPS_A_CORE * ghz / 1e3, f"cores x 256 x {ghz} GHz; clock: {clock}", "computed")
            if (name, cores) in PEAK:
                peak = Figure(PEAK[name, cores], MEASURED_M5, "measured")
            matrix, near = {}, cores if cores in products else at
            if products:
                matrix["fp32"] = known = _figure(products[near] * cores / near, BENCHMARK, near, cores)
                matrix["half"] = known._replace(mark=f"{known.mark}, in fp32")  # the ALUs' peak is the same
            if name in HALF and cores == HALF[name][1]:
                matrix["half"] = Figure(HALF[name][0], HALF[name][2], "measured")
            source = BENCHMARK if products else f"{MEASURED_M5}: copy"
            moved = _figure(reduction * min(1, cores / at), source, at, cores) if reduction else None
            chips.append(Chip(name, cores, peak, Figure(memory, spec, "published"), matrix, moved))
    return chips


CHIPS = _chips()


def find(name: str) -> Chip:
    """The chip of a name such as `M1 Max`, `Apple M1 Max`, `m1 max 24` (GPU cores; the most when left out).

    Raises UserError with the nearest name.
    """
    words = re.sub(r"[^a-z0-9]+", " ", name.lower().replace("apple", "")).split()
    number = int(words.pop()) if words and words[-1].isdigit() else None
    named = [c for c in CHIPS if c.name.lower() == " ".join(words)]
    if not named:
        near = difflib.get_close_matches(" ".join(words), [c.name.lower() for c in CHIPS], 1, 0.4)
        known = next((c.name for c in CHIPS if c.name.lower() in near), None)
        raise UserError(f"--chip {name}: unknown. " + (f"Did you mean {known}? " if known else "")
                        + f"Known: {', '.join(row[0] for row in TABLE)}")
    if number is None:
        return named[0]
    if not (found := [c for c in named if c.cores == number]):
        raise UserError(f"--chip {name}: {named[0].name} has {' or '.join(str(c.cores) for c in named)} GPU cores")
    return found[0]


def band(config: Config, chip: Chip, batch: int) -> Band:
    """A step's roofline: the largest of launches, FLOPs over the matrix rate that training reaches, and bytes over
    memory bandwidth; for the best, a middle and the worst case."""
    precision = chip.precision(config.training.precision)
    flops = flops_per_picture(config).total * batch
    shares, (matrix, mark) = _shares(config.model.dim or 0), _matrix(chip, precision)
    reduction = chip.reduction.value if chip.reduction else REDUCTION_OF_SPEC * chip.memory.value
    moved = traffic(config, 4 if precision == "fp32" else 2) * batch + 40 * sum(parameters(config))
    cases = zip(LAUNCH, shares[::-1], matrix[::-1], MEMORY_SHARE[::-1], strict=True)  # the best first
    times = [max(launch * kernels(config), flops / (share * rate * 1e12), moved / (memory * reduction * 1e9))
             for launch, share, rate, memory in cases]
    return Band(times[0], times[1], times[2], (
        f"projection for {chip.name} ({chip.cores} GPU cores) in {precision}, a roofline; matrix rate: {mark}; "
        "share of it that training reaches: assumed; first step: a guess"))


def kernels(config: Config) -> int:
    """About how many kernels a step launches."""
    fixed, encoder, predictor = LAUNCHES
    pull = SIGREG[0] + SIGREG[1] * len({level.depth for level in config.model.levels}) if config.training.sigreg else 0
    fixed += JITTER if config.augment.jitter else 0
    return fixed + encoder * (config.model.depth or 0) + predictor * config.predictor.depth + pull


def traffic(config: Config, size: int = 4) -> float:
    """Bytes moved for one picture: each activation kept for the gradient is written and read in both directions, in the
    target encoder written and read once. About 17 values a token, width and block, and the scores; of `size` bytes."""
    m, p, k = config.model, config.predictor, config.masking
    assert m.dim is not None
    assert m.depth is not None
    seen, both, draws = k.context_tokens, k.context_tokens + k.target_tokens, k.masks_per_image
    context = m.depth * seen * (17 * m.dim + m.dim // m.head_dim * seen)
    predictor = p.depth * both * (17 * p.dim + p.dim // p.head_dim * both)
    return size * (4 * draws * (context + predictor) + 2 * m.depth * config.grid**2 * 17 * m.dim)


def _shares(dim: int) -> tuple[float, float, float]:
    """The share of the matrix rate that a training step of this width reaches: worst, middle, best."""
    place = min(1.0, max(0.0, math.log(max(dim, 1) / NARROW) / math.log(WIDE / NARROW)))
    low, high = (n + place * (w - n) for n, w in zip(NARROW_SHARE, WIDE_SHARE, strict=True))
    return low, math.sqrt(low * high), high


def _matrix(chip: Chip, precision: str) -> tuple[tuple[float, float, float], str]:
    """TFLOP/s of a large product: worst, middle, best, one number where it was measured; and where it comes from."""
    if found := chip.matrix.get("fp32" if precision == "fp32" else "half"):
        return (found.value,) * 3, found.mark
    low, mid, high = (share * chip.peak.value for share in MATRIX_OF_PEAK)
    return (low, mid, high), "not measured, from the peak"
