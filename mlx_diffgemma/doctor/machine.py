"""What this machine is, as far as results and speed depend on it. Nothing private: no path, no name
of a user or of the machine."""

from __future__ import annotations

import mmap
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from ..checkpoint.blas import slow_blas
from ..checkpoint.memory import recommended_bytes

Backend = Literal["metal", "cuda", "cpu"]

_BUILDS = ("mlx", "mlx-metal", "mlx-cuda-13", "mlx-cuda-12", "mlx-cpu")
_PACKAGES = ("mlx-diffgemma", *_BUILDS, "mlx-lm", "transformers", "numpy")
# Variables of MLX and of the BLAS that change results or speed; all are numbers.
_VARIABLES = (
    "MLX_ENABLE_TF32",
    "MLX_MAX_OPS_PER_BUFFER",
    "MLX_MAX_MB_PER_BUFFER",
    "MLX_METAL_FAST_SYNCH",
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
)
# From this generation of Apple's GPUs on (M5), MLX uses the neural accelerators in them, with
# kernels of their own.
_ACCELERATED_FROM = 17
_ACCELERATED_KERNELS = b"_nax"  # part of the names of these kernels
_ACCELERATED_MACOS = (26, 2)


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts about a machine."""

    system: str  # "macOS 26.2, arm64"
    chip: str
    cores: str
    device: str  # that MLX computes on
    backend: Backend
    architecture: str  # of the device
    memory_bytes: int
    recommended_bytes: int  # the most that the device recommends to use
    wired_limit_bytes: int | None  # set by the user; None for macOS's default, or elsewhere
    python: str
    packages: dict[str, str]  # name -> version
    wheels: dict[str, str]  # package of MLX -> tags of its wheel
    variables: dict[str, str]
    notes: tuple[str, ...]  # for the user


def this_machine() -> Machine:
    """Return the facts about this machine."""
    info, backend = mx.device_info(), this_backend()
    is_mac = platform.system() == "Darwin"
    chip = (_sysctl("machdep.cpu.brand_string") if is_mac else "") or _processor(info, backend)
    device = "CPU" if backend == "cpu" else str(info.get("device_name", "")) or "GPU"
    architecture = _architecture(info)
    wired = _sysctl("iogpu.wired_limit_mb") if is_mac else ""
    return Machine(
        system=f"{_system()}, {platform.machine()}",
        chip=chip or "unknown",
        cores=_cores(is_mac),
        device=device,
        backend=backend,
        architecture=architecture,
        memory_bytes=_memory_bytes(),
        recommended_bytes=recommended_bytes(),
        wired_limit_bytes=int(wired) << 20 if wired.isdecimal() and int(wired) else None,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        packages=dict(_versions()),
        wheels=dict(_wheels()),
        variables={
            name: os.environ[name] for name in _VARIABLES if os.environ.get(name, "").isdecimal()
        },
        notes=tuple(_notes(backend, architecture)),
    )


def this_backend() -> Backend:
    """Return the backend of MLX's default device."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def accelerator_note(architecture: str, macos: str, library: Path) -> str | None:
    """Return what keeps MLX from using an M5's neural accelerators, or from using them rightly;
    None if nothing does.

    Args:
      architecture: of the GPU, such as applegpu_g17s.
      macos: version of macOS.
      library: MLX's file of Metal kernels.

    Source: mlx issues 4525, 3821 and pull request 3622.
    """
    found = re.match(r"applegpu_g(\d+)", architecture)
    if found is None or int(found[1]) < _ACCELERATED_FROM:
        return None
    version = tuple(int(part) for part in macos.split(".")[:2] if part.isdecimal())
    if not _holds(library, _ACCELERATED_KERNELS):
        return (
            "MLX is installed without kernels for this chip's neural accelerators and is slower "
            "than it could be; with macOS 26.2 or later run: pip install --force-reinstall "
            "mlx mlx-metal"
        )
    if version < _ACCELERATED_MACOS:
        return (
            f"MLX's kernels for this chip's neural accelerators need macOS 26.2, this is {macos}; "
            "update macOS"
        )
    return None


def _notes(backend: Backend, architecture: str) -> Iterator[str]:
    if backend == "metal":
        library = Path(mx.__file__).parent / "lib" / "mlx.metallib"
        if note := accelerator_note(architecture, platform.mac_ver()[0], library):
            yield note
    elif backend == "cpu":
        if platform.system() == "Darwin":
            yield "MLX sees no GPU here (Metal is not available): everything runs on the CPU"
        elif Path("/proc/driver/nvidia/version").exists():
            yield (
                "this machine has an NVIDIA card that MLX does not see; "
                "run: pip install 'mlx-diffgemma[cuda]'"
            )
        else:
            yield "this machine has no GPU that MLX sees: everything runs on the CPU"
        if slow_blas(1 << 30):  # its own line holds a path
            yield (
                "MLX multiplies with the slow reference BLAS here; with OpenBLAS it is about 4 "
                "times faster: apt install libopenblas0-pthread, then put "
                "LD_PRELOAD=libopenblas.so.0 before the command"
            )


def _holds(file: Path, word: bytes) -> bool:
    """Return whether a large file holds some bytes."""
    try:
        with (
            file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return content.find(word) >= 0
    except (OSError, ValueError):  # no such file, or an empty one
        return False


def _system() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _processor(info: dict[str, Any], backend: Backend) -> str:
    """Return the name of the processor where there is no sysctl for it."""
    if backend == "cpu" and info.get("device_name"):
        return str(info["device_name"])
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor()


def _architecture(info: dict[str, Any]) -> str:
    """Return the GPU's generation: Metal names it, CUDA numbers it."""
    if "compute_capability_major" in info:
        return f"sm_{info['compute_capability_major']}{info.get('compute_capability_minor', 0)}"
    return str(info.get("architecture", platform.machine()))


def _cores(is_mac: bool) -> str:
    fast, slow = (
        (_sysctl(f"hw.perflevel{level}.physicalcpu") for level in (0, 1)) if is_mac else ("", "")
    )
    if fast:
        return f"{fast} performance, {slow or 0} efficiency"
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{count}"


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _sysctl(name: str) -> str:
    """Return a value of macOS's kernel; empty where there is none."""
    try:
        finished = subprocess.run(
            ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return finished.stdout.strip() if finished.returncode == 0 else ""


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _wheels() -> Iterator[tuple[str, str]]:
    """Yield the tags of the wheels that MLX was installed from: Python, and the system they were
    built for."""
    for name in _BUILDS:
        try:
            text = metadata.distribution(name).read_text("WHEEL") or ""
        except metadata.PackageNotFoundError:
            continue
        yield name, ", ".join(re.findall(r"^Tag: (\S+)$", text, re.MULTILINE)) or "not a wheel"
