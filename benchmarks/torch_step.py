"""The same step in PyTorch, the other side of versus_torch.py, which runs this file as a process of its own.

Written as PyTorch's users would for speed: torch.compile over augmentation, masks and loss, autocast over fp32 weights
with residuals kept in half precision, fused attention, fused AdamW, foreach clipping and EMA. Names of weights are the
package's; shapes, FLOPs and numbers are those of mlx_hjepa (tests/test_timing.py compares the losses).
"""

from __future__ import annotations

import copy
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlx_hjepa import config
from mlx_hjepa.config import Config
from mlx_hjepa.data.augment import LUMA, YIQ
from mlx_hjepa.model.masks import TABLE, rectangle_table
from mlx_hjepa.model.vit import EPS, positions
from mlx_hjepa.schedule import Schedule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLOUR = 0.5, 0.25  # mean and deviation of the made-up pictures
PICTURES = 10_000


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS).to(x.dtype)  # autocast would make it fp32


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x (B, N, D), index (B, k) -> (B, k, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


# ---------------------------------------------------------------- model


class Block(nn.Module):
    def __init__(self, dim: int, hidden: int, head_dim: int):
        super().__init__()
        self.heads = dim // head_dim
        self.norm1, self.norm2 = nn.LayerNorm(dim, EPS), nn.LayerNorm(dim, EPS)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.attn["qkv"](self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        x = x + self.attn["proj"](y)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)), approximate="tanh"))


class Encoder(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        m = c.model
        self.depths = sorted({level.depth for level in m.levels})
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(m.patch**2 * 3, m.dim)})
        self.blocks = nn.ModuleList(Block(m.dim, round(m.dim * m.mlp_ratio), m.head_dim) for _ in range(m.depth))
        self.register_buffer("place", torch.from_numpy(positions(c.grid, m.dim)), persistent=False)

    def forward(self, patches: Tensor, index: Tensor | None = None) -> list[Tensor]:
        x = self.patch_embed["proj"](patches)
        place = self.place.to(x.dtype)
        x = x + (place if index is None else place[index])
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i + 1 in self.depths:
                outputs.append(x)
        return outputs


class Predictor(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        p, dim, sources = c.predictor, c.model.dim, len({level.depth for level in c.model.levels})
        self.levels = len(c.model.levels)
        self.embed = nn.ModuleList(nn.Linear(dim, p.dim, bias=i == 0) for i in range(sources))
        self.mask_token = nn.Parameter(torch.randn(p.dim) * 0.02)
        self.blocks = nn.ModuleList(Block(p.dim, round(p.dim * c.model.mlp_ratio), p.head_dim) for _ in range(p.depth))
        self.norm, self.heads = nn.LayerNorm(p.dim, EPS), nn.Linear(p.dim, self.levels * dim)
        self.register_buffer("place", torch.from_numpy(positions(c.grid, p.dim)), persistent=False)

    def forward(self, context: list[Tensor], seen: Tensor, wanted: Tensor) -> Tensor:
        x = sum(embed(norm(c)) for embed, c in zip(self.embed, context, strict=True))
        place = self.place.to(x.dtype)
        x = torch.cat([x + place[seen], self.mask_token.to(x.dtype) + place[wanted]], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.heads(self.norm(x[:, seen.shape[1]:])).view(*wanted.shape, self.levels, -1)


class HJepa(nn.Module):
    """Encoder, predictor and EMA target; forward gives the loss of uint8 pictures (B, H, W, 3)."""

    def __init__(self, c: Config):
        super().__init__()
        if c.augment.crop != "random_resized" or c.masking.select != "random":
            raise ValueError("the PyTorch side knows augment.crop: random_resized and masking.select: random")
        self.c, self.encoder, self.predictor = c, Encoder(c), Predictor(c)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        row, column = np.divmod(np.arange(c.grid**2), c.grid)
        weights = c.model.level_weights if isinstance(c.model.level_weights, list) else [1.0] * len(c.model.levels)
        turn = {"yiq": YIQ, "back": np.linalg.inv(YIQ), "luma": LUMA, "sizes": rectangle_table(c.grid, c.masking),
                "row": row, "column": column, "weights": np.array(weights, np.float32) / sum(weights)}
        for name, values in turn.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(values)), persistent=False)
        for i, level in enumerate(c.model.levels):
            window = row // level.pool * -(-c.grid // level.pool) + column // level.pool
            members = (np.arange(window.max() + 1)[:, None] == window).astype(np.float32)
            self.register_buffer(f"window{i}", torch.from_numpy(window), persistent=False)
            self.register_buffer(f"members{i}", torch.from_numpy(members / members.sum(1, keepdims=True)),
                                 persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            patches = self.prepare(images)
            seen, wanted = self.draw(len(images), images.device)
        return self.loss(patches, seen, wanted)

    def loss(self, patches: Tensor, seen: Tensor, wanted: Tensor) -> Tensor:
        b = len(patches)
        with torch.no_grad():
            goal = self.goal(patches, wanted)
        visible = gather(patches, seen.view(b, -1)).view(*seen.shape, -1)
        guess = self.predictor(self.encoder(visible, seen), seen, wanted)
        levels = F.smooth_l1_loss(guess.float(), goal.float(), reduction="none").mean(dim=(0, 1, 3))
        return (levels * self.weights).sum()

    def goal(self, patches: Tensor, wanted: Tensor) -> Tensor:
        outputs = dict(zip(self.target.depths, map(norm, self.target(patches)), strict=True))
        index, rows = wanted.view(len(patches), -1), []
        for i, level in enumerate(self.c.model.levels):
            whole = outputs[level.depth]
            if level.pool > 1:
                pooled = getattr(self, f"members{i}").to(whole.dtype) @ whole
                rows.append(gather(pooled, getattr(self, f"window{i}")[index]))
            else:
                rows.append(gather(whole, index))
        return torch.stack(rows, dim=2).view(*wanted.shape, len(rows), -1)

    def draw(self, pictures: int, device: torch.device) -> tuple[Tensor, Tensor]:
        m, grid = self.c.masking, self.c.grid
        rows, n = pictures * m.masks_per_image, grid**2
        which, y, x = torch.rand(3, rows, m.target_blocks, 1, device=device)
        height, width = self.sizes[(which.squeeze(-1) * TABLE).long()].split(1, dim=-1)
        top, left = (y * (grid - height + 1)).floor(), (x * (grid - width + 1)).floor()
        inside = ((self.row >= top) & (self.row < top + height) & (self.column >= left) & (self.column < left + width))
        noise = torch.rand(rows, n, device=device)
        order = torch.where(inside.any(dim=1), noise, noise + 1).argsort(dim=1)
        return order[:, n - m.context_tokens:], order[:, :m.target_tokens]

    def prepare(self, images: Tensor) -> Tensor:
        a, size, patch = self.c.augment, self.c.data.image_size, self.c.model.patch
        x, (b, height, width, _) = images.float(), images.shape
        area, aspect, up, across, mirror = torch.rand(5, b, 1, device=images.device)
        pixels = (a.scale[0] + area * (a.scale[1] - a.scale[0])) * (height * width)
        low, high = (math.log(v) for v in a.aspect)
        ratio = torch.exp(low + aspect * (high - low))
        tall, wide = (pixels / ratio).sqrt().clamp(max=height), (pixels * ratio).sqrt().clamp(max=width)
        rows = interpolation(up * (height - tall), tall, size, height, None)
        columns = interpolation(across * (width - wide), wide, size, width, mirror < 0.5 if a.flip else None)
        x = columns @ x.transpose(1, 2).reshape(b, width, height * 3)
        x = (rows @ x.view(b, size, height, 3).transpose(1, 2).reshape(b, height, size * 3)).view(b, size, size, 3)
        if a.jitter:
            x = self.jitter(x)
        x, g = (x / 255 - COLOUR[0]) / COLOUR[1], size // patch
        return x.view(b, g, patch, g, patch, 3).transpose(2, 3).reshape(b, g * g, -1)

    def jitter(self, x: Tensor) -> Tensor:
        spread = torch.tensor([0.4, 0.4, 0.2, 0.1], device=x.device) * self.c.augment.jitter
        u = ((2 * torch.rand(len(x), 4, device=x.device) - 1) * spread)[..., None, None, None].unbind(1)
        x = x * (1 + u[0])
        mean = (x @ self.luma).mean(dim=(1, 2), keepdim=True)
        x = mean + (x - mean) * (1 + u[1])
        grey = x @ self.luma
        x = grey + (x - grey) * (1 + u[2])
        cos, sin = (f(u[3].view(-1) * (2 * math.pi)) for f in (torch.cos, torch.sin))
        one, zero = torch.ones_like(cos), torch.zeros_like(cos)
        turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).view(-1, 3, 3)
        matrix = self.back @ turn @ self.yiq
        return (x.view(len(x), -1, 3) @ matrix.transpose(1, 2)).view(x.shape).clamp(0, 255)


def interpolation(start: Tensor, extent: Tensor, size: int, length: int, mirror: Tensor | None) -> Tensor:
    """As data.augment.interpolation."""
    place = torch.arange(size, device=start.device, dtype=torch.float32)[None]
    if mirror is not None:
        place = torch.where(mirror, size - 1 - place, place)
    centre = (start + (place + 0.5) * (extent / size) - 0.5).clamp(0, length - 1)
    reach = (extent / size).clamp(min=1)[..., None]
    line = torch.arange(length, device=start.device, dtype=torch.float32)
    weights = (1 - (centre[..., None] - line).abs() / reach).clamp(min=0)
    return weights / weights.sum(dim=-1, keepdim=True)


# ---------------------------------------------------------------- step


class Step:
    """One update by AdamW, with clipping and EMA; mode: eager, default or reduce-overhead of torch.compile."""

    def __init__(self, c: Config, precision: str, device: str, mode: str):
        torch.set_float32_matmul_precision("high")  # MLX uses TF32 too
        self.c, self.device, self.mode, self.dtype = c, torch.device(device), mode, DTYPES[precision]
        self.schedule, self.number = Schedule(c.training, 1_000), 0
        self.model = HJepa(c).to(self.device)
        self.loss = self.model if mode == "eager" else torch.compile(
            self.model, mode=None if mode == "default" else mode, dynamic=False)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        groups = [{"params": [p for p in self.weights if p.ndim >= 2]},
                  {"params": [p for p in self.weights if p.ndim < 2], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=c.training.lr, betas=c.training.betas, eps=c.training.eps,
                                           weight_decay=c.training.weight_decay, fused=True)
        images = np.random.default_rng(0).integers(0, 256, (PICTURES, 32, 32, 3), dtype=np.uint8)
        self.images = torch.from_numpy(images).to(self.device)

    def __call__(self) -> None:
        t, step = self.c.training, self.number % self.schedule.total
        chosen = torch.randint(PICTURES, (t.batch,), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(step)
        self.optimizer.param_groups[0]["weight_decay"] = self.schedule.weight_decay(step)
        if self.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(self.images[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, t.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.model.target.parameters()), list(self.model.encoder.parameters()),
                                 1 - self.schedule.momentum(step))
        self.number += 1

    def run(self, steps: int) -> float:
        """Seconds of so many steps, from an idle device to an idle device."""
        self.wait()
        start = time.perf_counter()
        for _ in range(steps):
            self()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


def peak_gb(device: str, before: int) -> float:
    """Of the tensors on CUDA, of the driver's memory on MPS; on a CPU how much the process grew."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if device == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    return (resident() - before) / 1e9


def resident() -> int:
    """Bytes of this process's memory at its largest. Linux's ru_maxrss would begin with that of the parent process."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def serve() -> None:
    """Lines of JSON on stdin: the first says what to build, then numbers of steps, to be answered by their seconds."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print must not come between

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    asked = json.loads(sys.stdin.readline())
    before = resident()
    try:
        step = Step(config.build(asked["config"]), asked["precision"], asked["device"], asked["mode"])
        first = step.run(1)
        if asked["device"] == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step.run(3)
        answer(first_step_s=first, version=torch.__version__)
        for line in sys.stdin:
            answer(seconds=step.run(int(line)), peak_gb=peak_gb(asked["device"], before))
    except Exception as error:
        answer(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        raise


if __name__ == "__main__":
    serve()
