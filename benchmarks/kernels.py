"""How many kernels a training step launches, from its compiled graph, and on CUDA from the graphs that MLX launches."""

from __future__ import annotations

import mlx_hjepa  # noqa: F401  # isort: skip  (it chooses the BLAS before MLX is imported)

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import mlx.core as mx

from mlx_hjepa import backend, config
from mlx_hjepa.analyze import timing
from mlx_hjepa.config import Config
from mlx_hjepa.model import vit
from mlx_hjepa.model.hjepa import HJEPA, key_of
from mlx_hjepa.schedule import Schedule
from mlx_hjepa.train.step import Step

VIEWS = {"Reshape", "Flatten", "Unflatten", "Transpose", "Slice", "Split", "Squeeze", "ExpandDims", "Broadcast",
         "BroadcastAxes", "AsStrided", "StopGradient", "CustomTransforms", "Depends", "View", "Copy"}


@contextmanager
def one_kernel_each() -> Iterator[None]:
    """Let layer norms (1 kernel; backward 1), fused attention (1) and GELU's exponential count as on a GPU."""
    def stand_in(x, *_, **__):
        return mx.softmax(x, axis=-1)

    norm = mx.custom_function(stand_in)

    @norm.vjp
    def _(_, cotangent, __):
        return mx.softmax(cotangent, axis=-1)

    kept = mx.fast.layer_norm, mx.fast.scaled_dot_product_attention, vit._sigmoid
    mx.fast.layer_norm = lambda x, *_: norm(x)
    mx.fast.scaled_dot_product_attention, vit._sigmoid = stand_in, vit.exact_sigmoid
    try:
        yield
    finally:
        mx.fast.layer_norm, mx.fast.scaled_dot_product_attention, vit._sigmoid = kept


def step_of(c: Config) -> Step:
    return Step(HJEPA(c, (0.5,) * 3, (0.25,) * 3), Schedule(c.training, 10), backend.precision(c.training.precision))


def graph(c: Config) -> tuple[list[str], int]:
    """The compiled step's operations that are no views, and how many more its concatenations are (one an input)."""
    step = step_of(c)
    state, images = step.initial_state(), mx.zeros((c.training.batch, 32, 32, 3), mx.uint8)
    key, scalars = key_of(0, 0), step.scalars(0, [1.0] * len(c.model.levels))
    mx.eval(images, key, scalars)
    with one_kernel_each(), tempfile.TemporaryDirectory() as folder:
        new, statistics = step(state, images, key, scalars)
        file = Path(folder) / "graph.dot"
        mx.export_to_dot(str(file), *new.arrays(), statistics)
        text = file.read_text()
    names = dict(re.findall(r'(\d+) \[label ="([^"]*)", shape=rectangle\]', text))
    inputs = Counter(re.findall(r'"[A-Z]+" -> (\d+)', text))
    copies = sum(inputs[node] - 1 for node, name in names.items() if name == "Concatenate")
    return [name for name in names.values() if name not in VIEWS], copies


def launches(c: Config) -> float | None:
    """Kernels, copies and fills that a step really launches on CUDA, from the graphs that MLX writes out; None where
    there is no CUDA or nothing was written within five minutes."""
    if backend.kind() != "cuda":
        return None
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import kernels; kernels.dump_graphs()"
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run([sys.executable, "-c", code], input=json.dumps([c.model_dump(mode="json"), folder]),
                                  env={**os.environ, "MLX_SAVE_CUDA_GRAPHS_DOT_FILE": f"{folder}/graph"},
                                  text=True, capture_output=True, check=True, timeout=300)
        except subprocess.SubprocessError:
            return None
    return float(done.stdout.split()[-1]) or None


def dump_graphs(steps: int = 4) -> None:
    """The child process of `launches`: prints the launches a step, counted over `steps` after the first three."""
    values, folder = json.load(sys.stdin)
    beat = timing.pulses(config.build(values), Step)
    list(islice(beat, 3))
    before = set(Path(folder).iterdir())
    list(islice(beat, steps))
    print(sum(graph_nodes(file.read_text()) for file in set(Path(folder).iterdir()) - before) / steps)


def graph_nodes(text: str) -> int:
    """Nodes of a CUDA graph's DOT text that do work: not the nodes that stand for child graphs, nor empty ones."""
    labels = re.findall(r'"graph_\d+_node_\d+"\[[^\]]*label="([^"]*)"', text.replace("\\n", "\n"))
    return sum(not re.search(r"\bEMPTY\b|^\s*\d+\s+graph_\d+\s*$", label) for label in labels)
