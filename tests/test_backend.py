"""The machine: precision rules, the order of OpenBLAS and MLX, and what `doctor` finds wrong."""

import contextlib
import ctypes
import dataclasses
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import mlx_hjepa
from mlx_hjepa import backend, doctor
from mlx_hjepa.data.cifar import ARCHIVES

ROOT = Path(mlx_hjepa.__file__).resolve().parents[1]


def openblas_is_here() -> bool:
    """Whether MLX's CPU back-end can have OpenBLAS, found out without the code under test."""
    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        return False
    return sys.platform == "linux" and not any(d.name.startswith("mlx-cuda") for d in metadata.distributions())


needs_openblas = pytest.mark.skipif(not openblas_is_here(), reason="no OpenBLAS for MLX's CPU back-end here")


def python(code: str, **env: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60,
                          env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(("kind", "architecture", "expected"), [
    ("metal", "applegpu_g13s", "fp32"), ("metal", "applegpu_g14g", "fp32"), ("metal", "applegpu_g15d", "bf16"),
    ("metal", "applegpu_g16s", "bf16"), ("metal", "applegpu_g17p", "bf16"), ("metal", "unheard of", "fp32"),
    ("cuda", "sm_90", "bf16"), ("cpu", "x86_64", "fp32"), ("cpu", "applegpu_g16s", "fp32"),
])
def test_auto_precision_by_architecture(kind, architecture, expected):
    assert backend.auto_precision(kind, architecture) == expected


def test_a_named_precision_passes_through():
    assert [backend.precision(p) for p in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
    assert backend.precision("auto") == backend.auto_precision(backend.kind(), backend.device()["architecture"])


@pytest.mark.parametrize(("found", "minimum", "expected"), [
    ("0.32.0", "0.32.1", True), ("0.32.1", "0.32.1", False), ("0.9.9", "0.32.1", True), ("0.33", "0.32.1", False),
    ("1.0", "0.32.1", False), ("0.32.1.dev2026+abc", "0.32.1", False), ("13.6.1", "14", True), ("14.0", "14", False),
])
def test_version_comparison_is_by_numbers(found, minimum, expected):
    assert backend.older(found, minimum) is expected


def test_the_module_does_not_import_mlx():
    assert python("import sys, mlx_hjepa.backend; print('mlx.core' in sys.modules)") == "False"


# the library that MLX's matrix product reaches is seen by its speed: some 40 times the reference BLAS's
@needs_openblas
def test_openblas_is_loaded_before_mlx_and_used():
    code = "from mlx_hjepa import backend, doctor; print(backend.blas()); print(doctor.matmul_gflops(512))"
    name, fast = python(code).splitlines()
    other, slow = python(code, **{backend.NO_OPENBLAS: "1"}).splitlines()
    assert (name.split()[0], other.split()[0]) == ("openblas", "reference")
    assert float(fast) > 3 * float(slow)


@needs_openblas
def test_openblas_after_mlx_is_told_as_too_late():
    code = "import mlx.core; from mlx_hjepa import backend; print(backend.load_openblas()); print(backend.blas())"
    nothing, reason = python(code).splitlines()
    assert nothing == "None"
    assert "too late" in reason


@needs_openblas
@pytest.mark.parametrize(("cores", "kind", "inside"), [(2, "cpu", (2, 1)), (1, "cpu", (1, 2)), (8, "cpu", (1, 2)),
                                                       (2, "cuda", (1, 2))])
def test_products_keep_to_their_streams_thread_while_there_are_two(cores, kind, inside):
    code = f"""
import ctypes, os
os.environ["OPENBLAS_NUM_THREADS"] = "2"
from mlx_hjepa import backend
os.sched_getaffinity = lambda _: range({cores})
backend.kind = lambda: {kind!r}
now = lambda: (len(backend.streams()), ctypes.CDLL(None).openblas_get_num_threads())
try:
    with backend.both_cores():
        with backend.both_cores():
            pass
        print(now(), end=" ")
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print(now())"""
    assert python(code) == f"{inside} (1, 2)"


@pytest.mark.skipif(sys.platform != "linux" or bool(backend.cuda_package()), reason="the Linux CPU back-end")
def test_operations_of_both_streams_are_queued_unless_told_otherwise():
    code = "import os, mlx_hjepa; print(os.environ['MLX_BFS_MAX_WIDTH'])"
    assert int(python(code)) > 2_000
    assert python(code, MLX_BFS_MAX_WIDTH="7") == "7"


@pytest.mark.skipif(sys.platform != "linux" or bool(backend.cuda_package()), reason="the Linux CPU back-end")
def test_freed_memory_stays_with_the_process():
    code = """
import resource
{}
import mlx.core as mx
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    mx.eval(mx.zeros((100, 512, 1024)) + mx.array(1.0))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), faults(), faults())
"""
    for first, most in (("import mlx_hjepa", 500), ("", None)):
        new, *again = map(int, python(code.format(first)).split())
        assert new > 50_000  # 200 MB in pages of 4 kB
        assert max(again) < most if most else min(again) > 10_000


def test_device_and_environment_describe_this_machine():
    here = backend.environment()
    assert here["kind"] in ("metal", "cuda", "cpu")
    assert min(here["memory"] / 1e9, here["threads"]) >= 1
    assert all(here["versions"][package] for package in ("mlx", "numpy", "mlx-hjepa"))
    assert here["commit"] is None or len(here["commit"]) == 40


def test_every_probe_may_fail(monkeypatch):
    monkeypatch.setattr(backend, "output", lambda *command: None)
    monkeypatch.setattr(backend, "_info", lambda: {})
    monkeypatch.setattr(backend, "_cpu_name", lambda: None)
    here = backend.environment()
    assert here["name"]
    assert here["memory"] > 0
    assert (here["commit"], here["dirty"], here["architecture"]) == (None, None, None)


def test_the_cache_limit_is_set_and_returned():
    import mlx.core as mx

    limit = backend.set_cache_limit()
    assert limit == pytest.approx(backend.device()["memory"] / 4e9)
    assert mx.set_cache_limit(int(limit * 1e9)) == int(limit * 1e9)  # returns the one before


def test_cuda_kernels_are_kept_by_mlx_version(monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "version", {"mlx-cuda-13": "0.40", "mlx": "0.40"}.get)
    monkeypatch.setenv("MLX_HJEPA_CACHE", str(tmp_path))
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", "/elsewhere")
    assert backend.kernel_cache() == Path("/elsewhere")
    monkeypatch.delenv("MLX_PTX_CACHE_DIR")
    assert backend.kernel_cache() == tmp_path / "ptx" / "0.40"
    assert backend.load_openblas() is None
    monkeypatch.setattr(backend, "version", {}.get)
    assert backend.kernel_cache() is None


@pytest.mark.parametrize(("files", "expected"), [
    ({"AC/type": "Mains", "AC/online": "1", "BAT0/type": "Battery"}, False),
    ({"AC/type": "Mains", "AC/online": "0", "BAT0/type": "Battery"}, True),
    ({}, None),
])
def test_on_battery_on_linux(monkeypatch, tmp_path, files, expected):
    monkeypatch.setattr(sys, "platform", "linux")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert backend.on_battery(tmp_path) is expected


@pytest.mark.parametrize(("source", "expected"), [("Battery Power", True), ("AC Power", False), (None, None)])
def test_on_battery_on_macos(monkeypatch, source, expected):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(backend, "output", lambda *command: source and f"Now drawing from '{source}'\n -Internal")
    assert backend.on_battery() is expected


def test_keep_awake_never_keeps_the_display_on_and_ends(monkeypatch):
    started, ended = [], []
    process = SimpleNamespace(terminate=lambda: ended.append("terminate"), wait=lambda: ended.append("wait"))
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: started.append(command) or process)
    with contextlib.suppress(KeyError), backend.keep_awake():
        assert not ended
        raise KeyError
    assert started == [["caffeinate", "-i", "-s", "-w", str(os.getpid())]]
    assert ended == ["terminate", "wait"]


def test_keep_awake_elsewhere_says_one_line(monkeypatch):
    said = []
    monkeypatch.setattr(sys, "platform", "linux")
    with backend.keep_awake(said.append):
        pass
    assert [len(line.splitlines()) for line in said] == [1]


# ---------------------------------------------------------------- doctor


def faults(monkeypatch, archives=None) -> str:
    """Everything that doctor does not call ok, as text; each finding must advise."""
    monkeypatch.setattr("mlx_hjepa.data.cifar.ARCHIVES", archives or {})
    found = [f for f in doctor.findings(measure=False) if f.level != "ok"]
    assert all(f.advice and "\n" not in f.what + f.advice for f in found)
    return "\n".join(f"{f.level}: {f.what}: {f.advice}" for f in found)


@pytest.fixture
def sound(monkeypatch, tmp_path):
    """A Linux machine with a CPU only, with nothing wrong."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(backend, "kind", lambda: "cpu")
    monkeypatch.setattr(backend, "blas", lambda: "openblas 0.3.21, 2 threads")
    monkeypatch.setattr(backend, "version", lambda package: "0.33.0")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**12))
    monkeypatch.setenv("MLX_HJEPA_CACHE", str(tmp_path))


def test_a_sound_cpu_machine_lacks_only_a_gpu(monkeypatch, sound):
    assert faults(monkeypatch).count("\n") == 0
    assert "no GPU" in faults(monkeypatch)


@pytest.mark.parametrize(("probe", "fake", "expected"), [
    ("blas", lambda: "reference (libopenblas.so.0 not found)", "apt-get install libopenblas0"),
    ("blas", lambda: "reference (mlx was imported before mlx_hjepa: too late)", "import mlx_hjepa before mlx"),
    ("shutil.which", lambda name: None, "no g++"),
    ("version", lambda package: "0.32.0", "MLX 0.32.0 is older than 0.32.1"),
    ("version", lambda package: None if package == "mlx-data" else "0.33", "no mlx-data"),
    ("shutil.disk_usage", lambda folder: SimpleNamespace(free=4 * 10**9), "4.0 GB of disk left"),
])
def test_doctor_finds(monkeypatch, sound, probe, fake, expected):
    assert expected not in faults(monkeypatch)
    monkeypatch.setattr(probe if probe.startswith("shutil") else f"mlx_hjepa.backend.{probe}", fake)
    assert expected in faults(monkeypatch)


def test_doctor_finds_what_is_wrong_with_a_mac(monkeypatch, sound):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(backend, "kind", lambda: "metal")
    monkeypatch.setattr(backend, "output", lambda *command: "0" if "sysctl.proc_translated" in command else None)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("14.5", ("", "", ""), "arm64"))
    assert faults(monkeypatch) == ""
    monkeypatch.setattr(platform, "mac_ver", lambda: ("13.6", ("", "", ""), "arm64"))
    assert "macOS 13.6 is older than 14" in faults(monkeypatch)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert "error: this is an x86 Python" in faults(monkeypatch)


def test_doctor_finds_a_damaged_archive(monkeypatch, sound, tmp_path):
    whole = b"pictures"
    archive = dataclasses.replace(ARCHIVES["cifar10"], sha256=hashlib.sha256(whole).hexdigest())
    for content, damaged in ((whole, False), (b"pictureS", True), (b"pict", True)):
        (tmp_path / archive.file).write_bytes(content)
        assert (f"{archive.file}: SHA-256" in faults(monkeypatch, {"cifar10": archive})) is damaged


def test_doctor_says_what_the_cache_holds(monkeypatch, sound, tmp_path):
    archive = ARCHIVES["cifar10"]
    monkeypatch.setattr("mlx_hjepa.data.cifar.cache_problems", lambda cache: [])
    for make, held in ((None, "no CIFAR in it yet"), ((tmp_path / archive.file).touch, "cifar10")):
        if make:
            make()
        assert f"data cache {tmp_path}: {held}" in [f.what for f in doctor.findings(measure=False)]


def test_doctor_finds_a_cache_that_is_a_file(monkeypatch, sound, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLX_HJEPA_CACHE", str(tmp_path / "file"))
    assert "is a file: let it name a folder" in faults(monkeypatch)


@needs_openblas
def test_doctor_measures_what_openblas_is_worth(monkeypatch):
    monkeypatch.setattr("mlx_hjepa.data.cifar.ARCHIVES", {})
    line = next(f.what for f in doctor.findings() if f.what.startswith("openblas"))
    assert re.search(r": \d+ GFLOP/s in fp32, \d+ without it$", line)


@pytest.mark.parametrize(("kind", "width", "slow"), [
    ("metal", 64, False), ("metal", 32, True), ("cuda", 32, False), ("cuda", 36, True), ("cuda", 192, True),
    ("cpu", 36, False)])
def test_heads_off_the_fused_attention_are_told(monkeypatch, kind, width, slow):
    monkeypatch.setattr(backend, "kind", lambda: kind)
    assert (backend.slow_heads(width) is not None) == slow
