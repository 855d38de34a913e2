"""The facts about a machine; those of a Mac from what its system would answer."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_diffgemma.doctor import machine
from mlx_diffgemma.doctor.machine import accelerator_note, this_machine

SYSCTL = {
    "machdep.cpu.brand_string": "Apple M4 Max",
    "hw.perflevel0.physicalcpu": "12",
    "hw.perflevel1.physicalcpu": "4",
    "iogpu.wired_limit_mb": "40960",
}


def test_this_machine_is_described():
    found = this_machine()
    assert found.packages["mlx"] and found.python.endswith(platform.python_version())
    assert any("manylinux" in tag or "macosx" in tag for tag in found.wheels.values())
    assert 0 < found.recommended_bytes <= found.memory_bytes
    assert found.backend in ("cpu", "metal", "cuda")
    if found.backend == "cpu":
        assert any("GPU" in note for note in found.notes), "a machine without a GPU says so"


def test_a_mac_is_described_by_its_system(monkeypatch):
    metal = SimpleNamespace(
        default_device=lambda: "gpu",
        cpu="cpu",
        metal=SimpleNamespace(is_available=lambda: True),
        device_info=lambda: {"device_name": "Apple M4 Max", "architecture": "applegpu_g16s"},
        __file__="/nowhere/core.so",
    )
    monkeypatch.setattr(machine, "mx", metal)
    monkeypatch.setattr(machine, "_sysctl", lambda name: SYSCTL.get(name, ""))
    monkeypatch.setattr(machine, "recommended_bytes", lambda: 48 << 30)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("26.1", ("", "", ""), "arm64"))
    found = this_machine()
    assert found.system == "macOS 26.1, arm64" and found.chip == found.device == "Apple M4 Max"
    assert found.cores == "12 performance, 4 efficiency"
    assert (found.backend, found.architecture) == ("metal", "applegpu_g16s")
    assert found.wired_limit_bytes == 40 << 30 and found.notes == ()


def test_a_card_of_cuda_is_named_by_its_capability(monkeypatch):
    info = {
        "device_name": "NVIDIA H100 80GB HBM3",
        "compute_capability_major": 9,
        "compute_capability_minor": 0,
    }
    cuda = SimpleNamespace(
        default_device=lambda: "gpu",
        cpu="cpu",
        metal=SimpleNamespace(is_available=lambda: False),
        device_info=lambda: info,
    )
    monkeypatch.setattr(machine, "mx", cuda)
    found = this_machine()
    assert (found.backend, found.architecture, found.device) == (
        "cuda",
        "sm_90",
        "NVIDIA H100 80GB HBM3",
    )
    assert found.notes == ()


@pytest.mark.parametrize(
    ("architecture", "macos", "kernels", "note"),
    [
        ("applegpu_g16s", "15.1", b"plain", None),  # an M4 has no such accelerators
        ("applegpu_g17s", "26.3", b"steel_gemm_fused_nax", None),
        ("applegpu_g17s", "27.0", b"steel_gemm_fused_nax", None),
        ("applegpu_g17s", "26.1", b"steel_gemm_fused_nax", "update macOS"),
        ("applegpu_g17s", "15.6", b"plain", "--force-reinstall"),
        ("applegpu_g17s", "26.3", b"plain", "--force-reinstall"),
        ("applegpu_g18d", "26.3", b"", "--force-reinstall"),
        ("sm_90", "", b"", None),
    ],
)
def test_missing_kernels_for_an_m5_are_told(tmp_path, architecture, macos, kernels, note):
    library = tmp_path / "mlx.metallib"
    library.write_bytes(kernels)
    found = accelerator_note(architecture, macos, library)
    assert (found is None) if note is None else (note in found)


def test_a_card_that_mlx_does_not_see_is_told(monkeypatch):
    exists = Path.exists
    driver = "/proc/driver/nvidia/version"
    monkeypatch.setattr(Path, "exists", lambda p: str(p) == driver or exists(p))
    monkeypatch.setattr(machine, "this_backend", lambda: "cpu")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    assert any("NVIDIA card that MLX does not see" in note for note in this_machine().notes)


def test_nothing_private_is_in_the_facts(monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "node", lambda: "janes-mac")
    monkeypatch.setenv("HOME", "/home/janedoe")
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "/home/janedoe/x")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.chdir(tmp_path)
    text = str(asdict(this_machine()))
    for private in ("janes-mac", "janedoe", str(tmp_path), os.path.dirname(mx.__file__)):
        assert private not in text
    assert this_machine().variables["OMP_NUM_THREADS"] == "3"
