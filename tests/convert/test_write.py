from __future__ import annotations

import errno
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_diffgemma import load_model
from mlx_diffgemma.checkpoint.headers import read_header
from mlx_diffgemma.convert import convert
from mlx_diffgemma.convert import plan as plan_module
from mlx_diffgemma.convert import record as record_module
from mlx_diffgemma.convert import shards as shards_module
from mlx_diffgemma.convert import write as write_module
from mlx_diffgemma.convert.sources import Plain
from mlx_diffgemma.convert.verify import verify
from mlx_diffgemma.errors import ConfigError, SourceError, WeightsError
from tests.convert.cases import SIDE_FILES, load_all, official, same, sums

MODES = {
    "mixed": {},
    "uniform 4-bit": {"recipe": "uniform"},
    "uniform 8-bit": {"recipe": "uniform", "q_bits": 8},
    "5-bit groups of 32": {"recipe": "uniform", "q_bits": 5, "q_group_size": 32},
    "mxfp4": {"q_mode": "mxfp4"},
    "mxfp8": {"q_mode": "mxfp8", "recipe": "uniform"},
    "nvfp4": {"q_mode": "nvfp4"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return official(tmp_path_factory.mktemp("write") / "source")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


class StoppedError(Exception):
    """As a power cut, between two moves."""


def stop_after(count: int):
    calls = []

    def progress(done: int, total: int, name: str) -> None:
        calls.append(name)
        if len(calls) == count:
            raise StoppedError

    return progress


# What is written


def test_bf16_to_bf16_is_bit_equal(source, out):
    convert(source, out)
    before, after = load_all(source), load_all(out)
    assert len(after) == len(before)
    for name, array in before.items():
        target = f"{name}.weight" if name.endswith(("gate_up_proj", "experts.down_proj")) else name
        assert same(after[target], array), target


def test_shards_and_the_other_spelling_give_the_same_tensors(source, out, tmp_path):
    convert(source, out)
    expected = load_all(out)
    for name, options in (("shards", {"shards": 3}), ("spelling", {"per_layer": True})):
        convert(official(tmp_path / name, **options), tmp_path / f"from-{name}")
        found = load_all(tmp_path / f"from-{name}")
        assert found.keys() == expected.keys()
        assert all(same(found[key], array) for key, array in expected.items())
        load_model(tmp_path / f"from-{name}")


def test_uniform_4_bit_is_bit_equal_to_mlx_quantize(source, out):
    convert(source, out, quantize=True, recipe="uniform")
    before, after = load_all(source), load_all(out)
    packed = 0
    for name, array in before.items():
        module = name.removesuffix(".weight")
        if f"{module}.scales" not in after:
            assert array.ndim == 1 or "vision" in name
            continue
        packed += 1
        expected = mx.quantize(array, group_size=64, bits=4)
        for leaf, wanted in zip(("weight", "scales", "biases"), expected, strict=True):
            assert same(after[f"{module}.{leaf}"], wanted), (module, leaf)
    assert packed == 4 + 7 + 6 + 2 + 4  # embedding and self-conditioning, heads, MLP, routers, ...


@pytest.mark.parametrize("mode", MODES)
def test_logits_are_those_of_the_model_packed_in_memory(source, out, mode):
    convert(source, out, quantize=True, **MODES[mode])
    block = json.loads((out / "config.json").read_text())["quantization"]
    default = {key: block[key] for key in ("group_size", "bits", "mode")}
    reference = load_model(source, fused=False)
    # The loader makes float32 of what is not packed; packing is defined on the bf16 tensors.
    reference.set_dtype(mx.bfloat16)
    nn.quantize(
        reference,
        class_predicate=lambda path, module: (
            ({"mode": "affine", **block[path]} if path in block else default)
            if hasattr(module, "to_quantized")
            else False
        ),
    )
    found = load_model(out, fused=False)
    assert found.config.quantization is not None
    logits = []
    for model in (reference, found):
        model.set_dtype(mx.float32)
        context = model.prefill(mx.array([[3, 1, 4, 1, 5]]))
        canvas = mx.arange(8, dtype=mx.int32)[None]
        first = model.denoise(canvas, context)
        soft = model.soft_embedding(first)
        logits.append([first, model.denoise(canvas, context, self_conditioning=soft)])
    for mine, wanted in zip(logits[1], logits[0], strict=True):
        assert mine.dtype == mx.float32 and mx.array_equal(mine, wanted).item()


def test_8_bit_and_back_is_within_the_error_of_the_format(source, out, tmp_path):
    convert(source, out, quantize=True, recipe="uniform", q_bits=8)
    convert(out, tmp_path / "back", dequantize=True)
    before, after = load_all(source), load_all(tmp_path / "back")
    assert len(before) == len(after)
    assert "quantization" not in json.loads((tmp_path / "back/config.json").read_text())
    for name, array in before.items():
        target = f"{name}.weight" if name.endswith(("gate_up_proj", "experts.down_proj")) else name
        found = np.array(after[target].astype(mx.float32))
        real = np.array(array.astype(mx.float32))
        if array.ndim == 1 or "vision" in name:
            assert np.array_equal(found, real), name
            continue
        groups = real.reshape(*real.shape[:-1], -1, 64)
        # Half a step, then half a unit of bf16's eight bits each for scale, bias and result; the
        # scale is counted up to 255 times.
        step = (groups.max(-1) - groups.min(-1)) / 255
        largest = np.abs(groups).max(-1)
        bound = (0.5 * step + (255 * step + 2 * largest) * 2.0**-8)[..., None]
        assert (np.abs(found.reshape(groups.shape) - groups) <= bound).all(), name
        error = np.linalg.norm(found - real) / np.linalg.norm(real)
        assert error < 0.015, (name, error)


def test_a_packed_result_can_be_packed_anew(source, out, tmp_path):
    convert(source, out, quantize=True, recipe="uniform", q_bits=8)
    with pytest.raises(ConfigError, match="is packed already"):
        convert(out, tmp_path / "again")
    convert(out, tmp_path / "again", quantize=True, q_mode="nvfp4")
    block = json.loads((tmp_path / "again/config.json").read_text())["quantization"]
    assert block["mode"] == "nvfp4"
    load_model(tmp_path / "again")


@pytest.mark.parametrize(("dtype", "kind"), [("float16", mx.float16), ("float32", mx.float32)])
def test_dtype_is_that_of_everything_that_is_not_packed(source, out, dtype, kind):
    convert(source, out, quantize=True, dtype=dtype)
    found = load_all(out)
    for name, array in found.items():
        packed = name.endswith(".weight") and f"{name.removesuffix('.weight')}.scales" in found
        assert array.dtype == (mx.uint32 if packed else kind), name


def test_side_files_come_along_and_the_record_is_whole_and_without_times(source, out):
    convert(source, out, quantize=True)
    for name, text in SIDE_FILES.items():
        assert (out / name).read_text() == text
    assert (out / "generation_config.json").read_bytes() == (
        source / "generation_config.json"
    ).read_bytes()
    record = json.loads((out / "conversion.json").read_text())
    assert record["source"].items() >= {"name": "source", "layout": "bf16"}.items()
    assert record["recipe"]["name"] == "mixed" and record["dtype"] == "bfloat16"
    assert set(record["versions"]) == {"mlx", "mlx-diffgemma"}
    assert set(record["tensors"]) == set(load_all(out))
    assert set(record["files"]) == {p.name for p in out.iterdir()} - {
        "conversion.json",
        "model.safetensors",
    }
    assert all(len(entry["sha256"]) == 64 for entry in record["tensors"].values())
    assert not any(word in json.dumps(record) for word in ("time", "date", "2025-", "2026-"))
    assert [p.name for p in out.parent.iterdir()] == ["out"]  # no partial folder is left


def test_two_runs_give_the_same_bytes(source, out, tmp_path):
    convert(source, out, quantize=True)
    convert(source, tmp_path / "again", quantize=True)
    assert sums(out) == sums(tmp_path / "again")


def test_the_summary_says_the_error_of_each_packed_part(source, out):
    summary = convert(source, out, quantize=True)
    assert set(summary.errors) == {
        "embedding",
        "experts",
        "dense MLP",
        "router",
        "attention",
        "self-conditioning",
    }
    assert 0.05 < summary.errors["experts"] < 0.12  # 4 bits
    assert all(error < 0.012 for part, error in summary.errors.items() if part != "experts")


def test_large_tensors_are_read_in_slices_to_the_same_bytes(source, out, tmp_path, monkeypatch):
    convert(source, out, quantize=True)
    slices: list[int] = []
    read = Plain.read

    def counted(self, start, stop):
        slices.append((stop - start) * int(np.prod(self.shape[1:], dtype=int)) * 4)
        return read(self, start, stop)

    limit = 4 * 64 * 128  # one expert's gate and up
    monkeypatch.setattr(plan_module, "SLICE_BYTES", limit)
    monkeypatch.setattr(Plain, "read", counted)
    convert(source, tmp_path / "again", quantize=True)
    assert max(slices) <= limit < 2 * limit and len(slices) > len(load_all(source))
    assert sums(out) == sums(tmp_path / "again")


# Interruptions


def test_a_run_stopped_after_any_move_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch):
    plan = write_module.prepare(source, quantize=True)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the process stops, not the disk
    monkeypatch.setattr(plan_module, "SHARD_BYTES", plan.tensor_bytes // 3)
    convert(source, tmp_path / "whole", quantize=True)
    expected, moves = sums(tmp_path / "whole"), len(plan.moves)
    assert len([name for name in expected if name.endswith(".safetensors")]) >= 3
    for count in range(1, moves + 1):
        target = tmp_path / f"at-{count}"
        with pytest.raises(StoppedError):
            convert(source, target, quantize=True, progress=stop_after(count))
        assert not target.exists()
        summary = convert(source, target, quantize=True)
        assert summary.resumed_moves == count and sums(target) == expected
        shutil.rmtree(target)


def test_a_torn_journal_line_and_what_follows_damage_are_done_again(source, tmp_path):
    convert(source, tmp_path / "whole", quantize=True)
    target, journal = tmp_path / "out", tmp_path / "out.partial/journal"
    for damage, kept in (
        (lambda raw: raw[:-20], 4),
        (lambda raw: raw + b'{"move": "mod', 5),
        (lambda raw: raw.replace(raw.split(b"\n")[3], b"\0" * 40), 2),
    ):
        with pytest.raises(StoppedError):
            convert(source, target, quantize=True, progress=stop_after(5))
        journal.write_bytes(damage(journal.read_bytes()))
        assert convert(source, target, quantize=True).resumed_moves == kept
        assert sums(target) == sums(tmp_path / "whole")
        shutil.rmtree(target)


def test_a_lost_shard_is_written_again_even_after_another_interruption(source, tmp_path):
    convert(source, tmp_path / "whole", quantize=True)
    target = tmp_path / "out"
    with pytest.raises(StoppedError):
        convert(source, target, quantize=True, progress=stop_after(9))
    (tmp_path / "out.partial/out/model.safetensors").unlink()
    with pytest.raises(StoppedError):
        convert(source, target, quantize=True, progress=stop_after(3))
    assert convert(source, target, quantize=True).resumed_moves == 3
    assert sums(target) == sums(tmp_path / "whole")


@pytest.mark.parametrize(
    ("module", "name"),
    [(record_module, "_write"), (record_module, "sync_folder"), (write_module, "sync_folder")],
    ids=["in a side file", "before the rename", "after it"],
)
def test_an_interruption_while_finishing_goes_on_as_well(
    source, tmp_path, monkeypatch, module, name
):
    convert(source, tmp_path / "whole", quantize=True)
    real, count = getattr(module, name), 0
    while True:
        count += 1
        calls = []

        def stopping(*arguments, calls=calls, last=count):
            calls.append(arguments)
            if len(calls) == last:
                raise StoppedError
            return real(*arguments)

        monkeypatch.setattr(module, name, stopping)
        try:
            convert(source, tmp_path / "out", quantize=True)
        except StoppedError:
            monkeypatch.setattr(module, name, real)
            convert(source, tmp_path / "out", quantize=True)
            assert sums(tmp_path / "out") == sums(tmp_path / "whole")
            assert {p.name for p in tmp_path.iterdir()} == {"out", "whole"}
            shutil.rmtree(tmp_path / "out")
        else:
            break
    assert count >= (3 if name == "_write" else 2)


def test_the_old_result_is_safe_where_moving_it_aside_is_interrupted(source, out, monkeypatch):
    convert(source, out)
    before = sums(out)
    rename = Path.rename

    def stopping(self, target):
        if self.name == "out" and self.parent.name == "out.partial":
            raise StoppedError
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopping)
    with pytest.raises(StoppedError):
        convert(source, out, quantize=True, force=True)
    monkeypatch.setattr(Path, "rename", rename)
    assert not out.exists() and sums(out.with_name("out.old-1")) == before
    convert(source, out, quantize=True)
    assert load_model(out).config.quantization is not None


# What is there already


def test_the_same_plan_again_says_that_it_is_there(source, out):
    convert(source, out)
    written = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert convert(source, out).was_there
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == written


def test_a_finished_result_is_never_overwritten_and_force_moves_it_aside(source, out):
    convert(source, out)
    before = sums(out)
    with pytest.raises(SourceError, match="--force moves it aside"):
        convert(source, out, quantize=True)
    assert sums(out) == before
    convert(source, out, quantize=True, force=True)
    convert(source, out, quantize=True, force=True)
    assert sums(out.with_name("out.old-1")) == before
    assert sums(out.with_name("out.old-2")) == sums(out) != before


def test_another_source_of_the_same_shape_is_not_taken_for_the_same(source, out, tmp_path):
    convert(source, out)
    other = official(tmp_path / "other", seed=1)
    with pytest.raises(SourceError, match="its source is another one or has changed"):
        convert(other, out)
    mine = official(tmp_path / "mine", seed=2)
    convert(mine, tmp_path / "second")
    later = (tmp_path / "second/conversion.json").stat().st_mtime_ns + 10**9
    os.utime(mine / "model.safetensors", ns=(later, later))  # trained on
    with pytest.raises(SourceError, match="its source is another one or has changed"):
        convert(mine, tmp_path / "second")


def test_work_under_way_for_other_settings_survives_a_look_at_the_result(source, out):
    convert(source, out)
    with pytest.raises(StoppedError):
        convert(source, out, quantize=True, force=True, progress=stop_after(5))
    assert convert(source, out).was_there
    assert convert(source, out, quantize=True, force=True).resumed_moves == 5


def test_a_folder_or_file_that_is_no_result_is_not_touched(source, out):
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    for force in (False, True):
        with pytest.raises(SourceError, match="is not empty and is not the result of a conversion"):
            convert(source, out, force=force)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    (out / "thesis.tex").unlink()
    convert(source, out)  # an empty folder is no loss
    file = out.with_name("file")
    file.write_text("x")
    with pytest.raises(SourceError, match="is a file; name a new folder"):
        convert(source, file)
    with pytest.raises(SourceError, match=r"(Not a directory|File exists); nothing was written"):
        convert(source, file / "below")


def test_the_source_itself_is_refused_as_the_place_of_the_result(source, tmp_path):
    own = official(tmp_path / "folder/source")
    for target in (own, own / "../source", own.parent):
        with pytest.raises(ConfigError, match="is the source itself or holds it"):
            convert(own, target, force=True)
    convert(own, own / "mlx_model")  # as by default, where the source is the current folder
    assert verify(own / "mlx_model").errors
    with pytest.raises(SourceError, match="nobodyatall"):
        convert(source, "~nobodyatall/x")


# Clear errors, and partial work that is kept


def test_another_setting_or_a_changed_source_is_an_error_until_force(tmp_path):
    source, out = official(tmp_path / "source"), tmp_path / "out"
    with pytest.raises(StoppedError):
        convert(source, out, progress=stop_after(5))
    kept = sums(tmp_path / "out.partial/out")
    with pytest.raises(SourceError, match=r"out\.partial holds .* other settings or versions"):
        convert(source, out, dtype="float32")
    stat = (source / "model.safetensors").stat()
    os.utime(source / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(SourceError, match="the source is another one or has changed since"):
        convert(source, out)
    assert sums(tmp_path / "out.partial/out") == kept
    assert convert(source, out, force=True).resumed_moves == 0
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial/journal").write_text("{]\n")
    with pytest.raises(SourceError, match="whose journal is damaged"):
        convert(source, tmp_path / "x")
    convert(source, tmp_path / "x", force=True)


def test_a_source_that_changes_during_the_run_is_an_error(tmp_path):
    source, out = official(tmp_path / "source"), tmp_path / "out"

    def progress(done: int, total: int, name: str) -> None:
        if done == total:
            (source / "chat_template.jinja").write_text("another one")

    with pytest.raises(SourceError, match="has changed while it was converted"):
        convert(source, out, progress=progress)
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    with pytest.raises(SourceError, match="the source is another one or has changed since"):
        convert(source, out)


def test_too_little_disk_is_seen_before_the_first_byte(source, out, monkeypatch):
    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(SourceError, match=r"bytes are still to be written, and .* has 1,000 free"):
        convert(source, out)
    monkeypatch.undo()
    convert(source, out)


def test_a_disk_that_fills_up_leaves_work_to_go_on_from(source, out, tmp_path, monkeypatch):
    """Nothing is recorded after a sync has failed, though later ones may succeed."""
    convert(source, tmp_path / "whole")
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 20:  # one for the head of the journal, then two for each tensor
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(shards_module, "_SYNC_BYTES", 1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        SourceError, match=r"is full; free .* same command again, which resumes from out\.partial"
    ):
        convert(source, out)
    monkeypatch.setattr(os, "fsync", fsync)
    assert convert(source, out).resumed_moves == 9
    assert sums(out) == sums(tmp_path / "whole")


def test_finished_tensors_are_recorded_in_groups(source, out, monkeypatch):
    fsync, calls = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append(1), fsync(descriptor)))
    convert(source, out)
    in_one_group = len(calls)
    monkeypatch.setattr(shards_module, "_SYNC_BYTES", 1)
    convert(source, out, force=True)
    assert in_one_group < 20 < 100 < len(calls)


def test_a_write_that_fails_with_no_space_leaves_work_to_go_on_from(source, out, monkeypatch):
    def full(array):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards_module, "_raw", full)
    with pytest.raises(SourceError, match=r"the disk of .* is full"):
        convert(source, out)
    monkeypatch.undo()
    convert(source, out)


def test_another_failure_of_the_disk_is_one_line_that_names_the_place(source, out, monkeypatch):
    real, calls = shards_module._raw, []

    def broken(array):
        calls.append(array)
        if len(calls) == last:
            raise OSError(errno.EIO, "Input/output error")
        return real(array)

    monkeypatch.setattr(shards_module, "_raw", broken)
    last = 9
    with pytest.raises(SourceError, match=r"partial: Input/output error; out.partial keeps the"):
        convert(source, out)
    monkeypatch.undo()
    assert convert(source, out).resumed_moves == 8


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_work_is_promised_only_where_there_is_some(source, out, monkeypatch, code):
    def broken(array):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(shards_module, "_raw", broken)
    with pytest.raises(SourceError) as caught:
        convert(source, out)
    assert "partial keeps" not in str(caught.value) and "resumes" not in str(caught.value)
    assert list(out.parent.iterdir()) == []
    assert (code == errno.EIO) == str(caught.value).endswith(
        "Input/output error; nothing was written"
    )


def test_a_target_that_cannot_be_written_leaves_and_promises_nothing(source, out, monkeypatch):
    """By the system's errors, since the tests may run as root, whom permissions do not stop."""
    mkdir, opened = Path.mkdir, Path.open

    def no_folder(self, *arguments, **options):
        if self.name == "out.partial":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        mkdir(self, *arguments, **options)

    def no_file(self, *arguments, **options):
        if self.name == "journal":
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", no_folder)
    with pytest.raises(SourceError, match=r"out.partial: Permission denied; nothing was written$"):
        convert(source, out)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "open", no_file)
    with pytest.raises(SourceError, match=r"journal: Read-only file system; nothing was written$"):
        convert(source, out)
    assert list(out.parent.iterdir()) == []


def test_a_failure_does_not_cost_the_work_of_an_earlier_run(source, out, tmp_path, monkeypatch):
    with pytest.raises(StoppedError):
        convert(source, out, progress=stop_after(5))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(SourceError, match=r"bytes are still to be written"):
        convert(source, out)
    monkeypatch.undo()
    assert convert(source, out).resumed_moves == 5


def test_a_source_that_becomes_unreadable_leaves_work_to_go_on_from(tmp_path):
    source, out = official(tmp_path / "source", shards=2), tmp_path / "out"
    second = source / "model-00002-of-00002.safetensors"
    hidden = tmp_path / "hidden"

    def progress(done: int, total: int, name: str) -> None:
        if second.exists() and done > total / 3:
            second.rename(hidden)

    with pytest.raises(WeightsError, match="cannot be read: No such file"):
        convert(source, out, progress=progress)
    hidden.rename(second)
    assert convert(source, out).resumed_moves > 5


def test_a_second_run_at_the_same_time_is_refused(source, out):
    refused = []

    def progress(done: int, total: int, name: str) -> None:
        if not refused:
            with pytest.raises(SourceError, match="another conversion is writing") as caught:
                convert(source, out)
            refused.append(caught)

    convert(source, out, progress=progress)
    assert refused and load_model(out)


def test_progress_counts_the_bytes_of_the_source(source, out):
    seen = []
    convert(source, out, progress=lambda done, total, name: seen.append((done, total, name)))
    stored = sum(array.nbytes for array in load_all(source).values())
    assert seen[-1][:2] == (stored, stored) and len({name for *_, name in seen}) == len(seen)
    assert all(a[0] < b[0] for a, b in pairwise(seen))


def test_a_folder_that_only_has_the_name_of_partial_work_is_not_touched(source, out):
    partial = out.with_name(f"{out.name}.partial")
    (partial / "out").mkdir(parents=True)
    (partial / "thesis.txt").write_text("years of work")
    with pytest.raises(SourceError, match="is not an unfinished conversion"):
        convert(source, out)
    partial.rename(partial.with_name("aside"))
    convert(source, out)
    partial.with_name("aside").rename(partial)
    assert convert(source, out).was_there
    assert (partial / "thesis.txt").read_text() == "years of work"


def test_values_that_are_not_finite_are_refused_by_name(tmp_path, out):
    source = official(tmp_path / "source")
    info = read_header(source / "model.safetensors")["model.decoder.norm.weight"]
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(info.start)
        file.write(b"\xc0\x7f")
    with pytest.raises(WeightsError, match=r"decoder\.norm\.weight holds values that are not"):
        convert(source, out)


def test_what_cannot_be_a_folder_is_refused_before_the_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "usb")
    for name in ("/", "/usb", "a\0b", str(tmp_path / ("n" * 300))):  # no name, or a whole disk
        with pytest.raises(SourceError, match="cannot be the folder of a result"):
            convert(source, name)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    convert(source, tmp_path / "link")
    assert verify(tmp_path / "disk") and (tmp_path / "link").is_symlink()
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(SourceError):
        convert(source, tmp_path / "a")
