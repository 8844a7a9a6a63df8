"""The machine: BLAS, device, precision, memory and power.

`prepare` runs before MLX is imported, so this module imports MLX only inside functions.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

MINIMUM_MLX = "0.32.1"  # before it the gradient of a LayerNorm's bias was at times wrong on Apple GPUs (mlx#3630)
NO_OPENBLAS = "MLX_HJEPA_NO_OPENBLAS"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
PACKAGE = Path(__file__).resolve().parent

_streams: list[Any] = []
_reason = "reference (libopenblas.so.0 not found)"  # why the CPU back-end has no OpenBLAS


# ---------------------------------------------------------------- before MLX is imported


def prepare() -> None:
    """What has to happen before `import mlx.core`; the package's first line calls it."""
    load_openblas()
    keep_pages()
    kernel_cache()
    queue_widely()


def load_openblas() -> str | None:
    """Load OpenBLAS so that MLX's Linux CPU back-end takes its matrix products from there.

    The wheel brings the reference BLAS, some 40 times slower; symbols loaded globally before it win. Returns what is in
    use ("openblas 0.3.21, 2 threads"), or None where it is not wanted (macOS, CUDA), not found, or MLX was imported
    first: then it is too late, and `blas()` says so.
    """
    global _reason
    if sys.platform != "linux" or cuda_package():
        return None
    if found := _openblas(None):  # a second call, or LD_PRELOAD
        return found
    if os.environ.get(NO_OPENBLAS, "0") not in ("", "0"):
        _reason = f"reference ({NO_OPENBLAS} is set)"
    elif "mlx.core" in sys.modules:
        _reason = "reference (mlx was imported before mlx_hjepa: too late for OpenBLAS)"
    else:
        return _openblas("libopenblas.so.0")
    return None


def _openblas(library: str | None) -> str | None:
    """The version and threads of OpenBLAS in a library, or among the symbols already loaded (None)."""
    try:
        blas = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        blas.openblas_get_config.restype = ctypes.c_char_p
        version = re.search(r"\d[\d.]*", blas.openblas_get_config().decode())
        return f"openblas {version[0] if version else '?'}, {blas.openblas_get_num_threads()} threads"
    except (OSError, AttributeError):
        return None


def keep_pages() -> None:
    """Let the Linux CPU back-end keep the memory of arrays that are freed.

    glibc gives large ones back to the kernel, and each step then waits for fresh pages. On GPUs MLX caches them itself.
    """
    if sys.platform == "linux" and not cuda_package():
        with contextlib.suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def queue_widely() -> None:
    """Let the Linux CPU back-end queue operations by their depth in the graph, so that two streams work at a time
    (`both_cores`): of a graph wider than 20, MLX's own limit, it queues all of one stream's before the other's."""
    if sys.platform == "linux" and not cuda_package():
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "100000")


def blas() -> str:
    """Where matrix products come from: "openblas 0.3.21, 2 threads", "reference (why)", "accelerate", "cublas"."""
    if sys.platform == "darwin":
        return "accelerate"
    return "cublas" if cuda_package() else load_openblas() or _reason


def kernel_cache() -> Path | None:
    """Keep CUDA kernels, compiled at run time, over reboots: minutes saved at the first step. None without CUDA."""
    if not cuda_package():
        return None
    # a folder for each version: MLX itself adds none to a folder it is told
    os.environ.setdefault("MLX_PTX_CACHE_DIR", str(cache_folder() / "ptx" / (version("mlx") or "unknown")))
    return Path(os.environ["MLX_PTX_CACHE_DIR"])


def cache_folder() -> Path:
    """Where downloads and compiled kernels stay: $MLX_HJEPA_CACHE, else ~/.cache/mlx-hjepa."""
    return Path(os.environ.get("MLX_HJEPA_CACHE") or "~/.cache/mlx-hjepa").expanduser()


def cuda_package() -> str | None:
    """The installed CUDA back-end of MLX: its package's name, or None."""
    return next((name for name in ("mlx-cuda-13", "mlx-cuda-12") if version(name)), None)


@cache
def version(package: str) -> str | None:
    """An installed package's version, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def older(found: str, minimum: str) -> bool:
    """Whether a version comes before another, by its leading numbers: 0.32.1.dev5 counts as 0.32.1."""
    def numbers(text: str) -> list[int]:
        leading = re.match(r"\d+(\.\d+)*", text)
        parts = [int(n) for n in leading[0].split(".")] if leading else []
        return parts + [0] * (4 - len(parts))
    return numbers(found) < numbers(minimum)


# ---------------------------------------------------------------- device


def kind() -> Literal["metal", "cuda", "cpu"]:
    """The back-end that MLX computes on by default."""
    import mlx.core as mx

    if mx.default_device().type != mx.DeviceType.gpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def streams() -> list[Any]:
    """The streams that a step or an encoder is traced for: the default one, and a second inside `both_cores`."""
    import mlx.core as mx

    return list(_streams) or [mx.default_stream(mx.default_device())]


@contextlib.contextmanager
def both_cores() -> Iterator[None]:
    """Inside, what is traced on a Linux CPU with two cores computes half a batch on each; elsewhere it does nothing.

    MLX's CPU back-end has one thread for each stream, and OpenBLAS's further ones serve one stream at a time: so each
    stream's products keep to its own. With more than two cores it was not measured.
    """
    if _streams or kind() != "cpu" or sys.platform != "linux" or len(os.sched_getaffinity(0)) != 2:
        yield
        return
    threads = _product_threads(1)
    _streams.extend(_two())
    try:
        yield
    finally:
        _streams.clear()
        _product_threads(threads)


@cache
def _two() -> list[Any]:
    import mlx.core as mx

    return [mx.default_stream(mx.cpu), mx.new_stream(mx.cpu)]


def _product_threads(count: int | None) -> int | None:
    """Have OpenBLAS take so many threads; returns how many it took, None where it is not in use."""
    if count is None or not _openblas(None):
        return None
    library = ctypes.CDLL(None)
    before = library.openblas_get_num_threads()
    library.openblas_set_num_threads(count)
    return before


def precision(name: str) -> str:
    """`auto` as this machine's best: see `auto_precision`; any other name is returned as it is."""
    return auto_precision(kind(), _info().get("architecture", "")) if name == "auto" else name


def auto_precision(kind: str, architecture: str) -> str:
    """bf16 on CUDA and from M3 on (applegpu_g15); fp32 on M1 and M2, which emulate bf16, and on CPUs."""
    if kind == "metal":
        generation = re.match(r"applegpu_g(\d+)", architecture)
        return "bf16" if generation and int(generation[1]) >= 15 else "fp32"
    return "bf16" if kind == "cuda" else "fp32"


def slow_heads(head_dim: int) -> str | None:
    """Why MLX's fused attention, which targets and evaluation use, does not take heads of this width here; None when
    it does, and on CPUs (mlx/backend/{metal,cuda}/scaled_dot_product_attention.cpp)."""
    fits = {"metal": head_dim in (64, 72, 80, 96, 128, 192, 256), "cuda": head_dim % 8 == 0 and head_dim <= 128}
    slower = f"model.head_dim {head_dim} is off MLX's fused attention, which makes targets slower; 64 is on it"
    return None if fits.get(kind(), True) else slower


def device() -> dict[str, Any]:
    """What this machine is: kind, name, gpu_cores, memory (bytes), threads, blas, os and versions; null if unknown."""
    from mlx_hjepa import __version__

    chip = kind()
    name = _info().get("device_name") if chip == "cuda" else _cpu_name()
    return {
        "kind": chip,
        "name": name or _info().get("device_name") or platform.machine(),
        "architecture": _info().get("architecture"),
        "gpu_cores": _gpu_cores() if chip == "metal" else None,
        "memory": _memory(),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "blas": blas(),
        "os": f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform(),
        "python": platform.python_version(),
        "versions": {**{p: version(p) for p in ("mlx", "mlx-data", "numpy")}, "mlx-hjepa": __version__},
    }


def environment() -> dict[str, Any]:
    """`device` and what ran: command, commit and dirty (tracked files changed), null outside a checkout."""
    commit, dirty = None, None
    top = output("git", "-C", str(PACKAGE), "rev-parse", "--show-toplevel")
    if top and Path(top).resolve() == PACKAGE.parent:  # not the checkout of another project that we are installed into
        commit = output("git", "-C", str(PACKAGE), "rev-parse", "HEAD")
        changes = output("git", "-C", str(PACKAGE), "status", "--porcelain", "--untracked-files=no")
        dirty = None if commit is None or changes is None else bool(changes)
    return {**device(), "commit": commit, "dirty": dirty,
            "command": shlex.join([Path(sys.argv[0]).name.replace("cli.py", "mlx-hjepa"), *sys.argv[1:]])}


def peak_memory_gb() -> float:
    """The most memory that MLX's arrays held since the start or the last reset, in GB (1e9 bytes)."""
    import mlx.core as mx

    return mx.get_peak_memory() / 1e9


def set_cache_limit(gb: float | None = None) -> float:
    """Bound the freed buffers that MLX keeps for reuse, by default to a quarter of the memory. Returns the limit in GB.

    MLX's own limit is nearly all of the memory, which starves a laptop's other programs; a step of fixed shapes needs
    far less."""
    import mlx.core as mx

    gb = _memory() / 4e9 if gb is None else gb
    mx.set_cache_limit(int(gb * 1e9))
    return gb


def _info() -> dict[str, Any]:
    import mlx.core as mx

    try:
        return mx.device_info()
    except (AttributeError, RuntimeError, ValueError):
        return {}


def _memory() -> int:
    if found := _info().get("memory_size") or _info().get("total_memory"):
        return int(found)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return 8 * 10**9


def _cpu_name() -> str | None:
    if sys.platform == "darwin":
        return output("sysctl", "-n", "machdep.cpu.brand_string")
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        return found[1] if found else None
    except OSError:
        return None


@cache
def _gpu_cores() -> int | None:
    found = re.search(r'"gpu-core-count" = (\d+)', output("ioreg", "-rd1", "-c", "AGXAccelerator") or "")
    return int(found[1]) if found else None


def output(*command: str) -> str | None:
    """What a command prints, or None if it fails or takes over two seconds."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=2, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None


# ---------------------------------------------------------------- power


def on_battery(supplies: Path = Path("/sys/class/power_supply")) -> bool | None:
    """Whether the machine draws from its battery; None where that cannot be told."""
    if sys.platform == "darwin":
        drawing = re.search(r"drawing from '(\w+)", output("pmset", "-g", "batt") or "")
        return drawing[1] == "Battery" if drawing else None
    states = []
    for online in supplies.glob("*/online"):
        with contextlib.suppress(OSError):
            if (online.parent / "type").read_text().strip() == "Mains":
                states.append(online.read_text().strip() == "1")
    return not any(states) if states else None


@contextlib.contextmanager
def keep_awake(say: Callable[[str], None] = print) -> Iterator[None]:
    """Keep a Mac from sleeping inside the block; the display may (kept on, it competes with the GPU work)."""
    process = None
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):
            # a session of its own: Ctrl-C, which lets training save and stop, must not end it first
            process = subprocess.Popen(["caffeinate", "-i", "-s", "-w", str(os.getpid())], start_new_session=True)
    if process is None:
        say("keep-awake does nothing here: it needs macOS's caffeinate")
    try:
        yield
    finally:
        if process is not None:
            process.terminate()
            process.wait()
