"""The note on OpenBLAS: where it helps, and nowhere else."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from mlx_diffgemma import bundled_model, load_model
from mlx_diffgemma.checkpoint import blas, load
from mlx_diffgemma.checkpoint.blas import slow_blas

BIG = 10**9
REFERENCE = "7f00-7f01 r-xp 00 08:01 1 /venv/mlx_cpu.libs/libblas-bd8a282c.so.3.10.0\n"
NUMPYS = "7f00-7f01 r-xp 00 08:01 2 /venv/numpy.libs/libscipy_openblas64_-32a4b2a6.so\n"


@pytest.fixture
def maps(tmp_path, monkeypatch) -> Path:
    """What this process has loaded, as Linux tells it."""
    file = tmp_path / "maps"
    file.write_text(REFERENCE + NUMPYS)
    monkeypatch.setattr(blas, "_MAPS", file)
    monkeypatch.setattr(blas.platform, "system", lambda: "Linux")
    return file


def test_a_big_model_on_the_reference_blas_gets_a_line_with_the_command(maps):
    line = slow_blas(BIG)
    assert "\n" not in line and "4 times" in line
    assert "LD_PRELOAD=/usr/lib/" in line and line.endswith("/libopenblas.so.0")


@pytest.mark.parametrize("installed", [[], [Path("/usr/lib/riscv/libopenblas.so.0")]])
def test_the_line_says_to_install_what_is_not_there(maps, monkeypatch, installed):
    monkeypatch.setattr(blas.Path, "glob", lambda self, pattern: iter(installed))
    line = slow_blas(BIG)
    assert ("apt install libopenblas0-pthread" in line) == (not installed)
    assert not installed or line.endswith(f"LD_PRELOAD={installed[0]}")


@pytest.mark.parametrize(
    "library",
    [
        "/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblasp-r0.3.21.so",
        "/usr/lib/x86_64-linux-gnu/libopenblas.so.0",
        "/opt/intel/lib/libmkl_rt.so.2",
    ],
)
def test_nothing_is_said_where_a_fast_one_is_loaded(maps, library):
    with maps.open("a") as file:
        file.write(f"7f02-7f03 r-xp 00 08:01 3 {library}\n")
    assert slow_blas(BIG) is None


def test_nothing_is_said_for_small_models_on_macs_and_where_linux_does_not_tell(maps, monkeypatch):
    assert slow_blas(10**7) is None
    maps.unlink()
    assert slow_blas(BIG) is None
    maps.write_text(REFERENCE)
    assert slow_blas(BIG) is not None
    monkeypatch.setattr(blas.platform, "system", lambda: "Darwin")
    assert slow_blas(BIG) is None


def test_loading_warns_once_and_the_bundled_model_does_not(maps, monkeypatch):
    monkeypatch.setattr(load.mx, "default_device", lambda: load.mx.cpu)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        load_model(bundled_model())
        assert caught == []
        monkeypatch.setattr(blas, "_MATTERS_ABOVE", 1)
        for _ in range(2):
            load_model(bundled_model())
        assert [str(warning.message) for warning in caught] == [slow_blas(BIG)]
        monkeypatch.setattr(load.mx, "default_device", lambda: load.mx.gpu)
        warnings.simplefilter("always")
        load_model(bundled_model())
    assert len(caught) == 1
