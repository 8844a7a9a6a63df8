"""What is right and wrong with this machine: the findings of `mlx-hjepa doctor`."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

from mlx_hjepa import backend
from mlx_hjepa.backend import MINIMUM_MLX, NO_OPENBLAS, PACKAGE, older

MINIMUM_MACOS = "14"
LOW_DISK = 5e9


class Finding(NamedTuple):
    level: Literal["ok", "warn", "error"]
    what: str
    advice: str = ""


def findings(measure: bool = True) -> list[Finding]:
    """What is right and wrong with this machine for training. `measure` times matrix products (about a second)."""
    found = [*_check_system(), *_check_mlx()]
    if not any(f.level == "error" for f in found):
        found += [_check_device(), *_check_linux_cpu(measure)]
        found += _check_data_cache()
    return [*found, _check_mlx_data(), *_check_disk()]


def _check_system() -> list[Finding]:
    if sys.platform != "darwin":
        return []
    if platform.machine() == "x86_64" or backend.output("sysctl", "-n", "sysctl.proc_translated") == "1":
        return [Finding("error", "this is an x86 Python; MLX needs Apple silicon's own",
                        "install an arm64 Python (python.org, or Homebrew in /opt/homebrew) and make .venv anew")]
    macos = platform.mac_ver()[0]
    if older(macos, MINIMUM_MACOS):
        return [Finding("error", f"macOS {macos} is older than {MINIMUM_MACOS}, which MLX needs", "update macOS")]
    return [Finding("ok", f"macOS {macos}, arm64 Python {platform.python_version()}")]


def _check_mlx() -> list[Finding]:
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        extra = "" if sys.platform == "darwin" else "[cpu]"
        return [Finding("error", f"MLX does not load: {error}", f"pip install 'mlx{extra}>={MINIMUM_MLX}'")]
    found = backend.version("mlx") or "0"
    if older(found, MINIMUM_MLX):
        return [Finding("warn", f"MLX {found} is older than {MINIMUM_MLX}: its LayerNorm gradients can be wrong",
                        f"pip install --upgrade 'mlx>={MINIMUM_MLX}'")]
    return [Finding("ok", f"MLX {found}")]


def _check_device() -> Finding:
    here = backend.device()
    cores = f", {here['gpu_cores']} GPU cores" if here["gpu_cores"] else ""
    what = f"{here['name']}{cores}, {here['memory'] / 1e9:.0f} GB, {here['kind']}, auto = {backend.precision('auto')}"
    if here["kind"] != "cpu":
        return Finding("ok", what)
    return Finding("warn", f"no GPU: {what}, {here['threads']} threads",
                   "fine for the digits demo; train CIFAR presets on Apple silicon or an NVIDIA GPU")


def _check_linux_cpu(measure: bool) -> list[Finding]:
    if sys.platform != "linux" or backend.kind() != "cpu":
        return []
    found = backend.blas()
    worth = f": {matmul_gflops():.0f} GFLOP/s in fp32" if measure else ""
    if found.startswith("openblas"):
        without = _gflops_without_openblas() if measure else None
        findings = [Finding("ok", found + worth + (f", {without:.0f} without it" if without else ""))]
    else:
        late = "imported before" in found
        advice = "import mlx_hjepa before mlx" if late else "sudo apt-get install libopenblas0"
        findings = [Finding("warn", f"BLAS: {found}{worth}", f"{advice} (products some 40 times faster)")]
    if shutil.which("g++"):
        findings.append(Finding("ok", "g++ for mx.compile"))
    else:
        findings.append(Finding("warn", "no g++: MLX silently leaves the step uncompiled", "sudo apt-get install g++"))
    return findings


def matmul_gflops(size: int = 1024) -> float:
    """fp32 matrix product on the CPU, the better of two after a small one that starts the threads, in GFLOP/s."""
    import mlx.core as mx

    def seconds(n: int) -> float:
        a = mx.ones((n, n))
        mx.eval(a)
        start = time.perf_counter()
        mx.eval(mx.matmul(a, a, stream=mx.cpu))
        return time.perf_counter() - start

    seconds(64)
    return 2 * size**3 / min(seconds(size) for _ in range(2)) / 1e9


def _gflops_without_openblas() -> float | None:
    code = (f"import os, sys; os.environ['{NO_OPENBLAS}'] = '1'; sys.path.insert(0, {str(PACKAGE.parent)!r}); "
            "from mlx_hjepa import doctor; print(doctor.matmul_gflops(512))")
    try:
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20).stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _check_mlx_data() -> Finding:
    if backend.version("mlx-data"):
        return Finding("ok", f"mlx-data {backend.version('mlx-data')}")
    return Finding("warn", "no mlx-data: pictures are read as resident arrays and by Pillow",
                   "pip install mlx-data (wheels: Python 3.10 to 3.13, macOS on Apple silicon and Linux x86-64)")


def _check_disk() -> list[Finding]:
    findings = []
    for what, folder in (("here", Path.cwd()), (f"in {backend.cache_folder()}", backend.cache_folder())):
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if free < LOW_DISK:
            findings.append(Finding("warn", f"{free / 1e9:.1f} GB of disk left {what}",
                                    "a long run and its data want 5 GB: free some, or set MLX_HJEPA_CACHE elsewhere"))
    return findings or [Finding("ok", "disk space")]


def _check_data_cache() -> list[Finding]:
    from mlx_hjepa.data.cifar import ARCHIVES, cache_problems

    findings = []
    if backend.cache_folder().is_file():
        return [Finding("error", f"MLX_HJEPA_CACHE: {backend.cache_folder()} is a file", "let it name a folder")]
    for problem in cache_problems(backend.cache_folder()):
        what, _, advice = problem.replace("\n", " ").rpartition(". ")
        findings.append(Finding("warn", what or advice, advice if what else "delete its folder and run again"))
    cache = backend.cache_folder()
    held = [name for name, a in ARCHIVES.items() if (cache / a.file).exists() or (cache / a.folder).exists()]
    return findings or [Finding("ok", f"data cache {cache}: {' and '.join(held) or 'no CIFAR in it yet'}")]
