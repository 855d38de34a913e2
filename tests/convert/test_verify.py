from __future__ import annotations

import json
import shutil

import pytest

from mlx_diffgemma import DiffGemmaError, bundled_model
from mlx_diffgemma.checkpoint.headers import read_header, read_headers
from mlx_diffgemma.convert import convert
from mlx_diffgemma.convert import plan as plan_module
from mlx_diffgemma.convert import verify as verify_module
from mlx_diffgemma.convert.record import digest_of
from mlx_diffgemma.convert.verify import verify
from mlx_diffgemma.errors import ConfigError, SourceError, WeightsError
from tests.convert.cases import official

FIRST, SECOND = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A source and its conversion, in three shards; both are left as they are."""
    folder = tmp_path_factory.mktemp("verify")
    source = official(folder / "source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "SHARD_BYTES", 50_000)
        summary = convert(source, folder / "made", quantize=True)
    assert len(summary.plan.shards) == 3
    return folder / "made"


@pytest.fixture
def out(made, tmp_path):
    """A copy to be damaged."""
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def edit(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_a_whole_result_passes_with_its_errors_and_one_step(made):
    seen = []
    found = verify(made, progress=lambda done, total, name: seen.append((done, total)))
    assert found.tensors > 90 and found.nbytes == seen[-1][0] == seen[-1][1]
    assert 0.05 < found.errors["experts"] < 0.12 and found.errors["norms and scalars"] == 0
    assert found.notes == (
        "one denoise step of a canvas of 8 gave finite logits",
        "it has no tokenizer, as its source had none; only the model can be loaded",
    )


def test_the_bundled_model_passes_with_its_tokenizer(tmp_path):
    convert(bundled_model(), tmp_path / "out", quantize=True)
    assert len(verify(tmp_path / "out").notes) == 1


@pytest.mark.parametrize("kept", [0, 7, 8, 100, 5_000, -1], ids=lambda n: f"to {n}")
def test_a_truncated_shard_is_named(out, kept):
    path = out / SECOND
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=SECOND):
        verify(out)


def test_any_flipped_bit_of_a_shard_is_found_and_the_shard_named(out):
    path = out / SECOND
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    # the length, the format's name in the metadata, a name, padding, first and last byte of data
    places = [0, raw.index(b'"mlx"') + 1, raw.index(b"layers"), header - 1, header, len(raw) - 1]
    places += range(header + 100, len(raw), len(raw) // 7)
    for place in places:
        damaged = bytearray(raw)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match=SECOND):
            verify(out)


def test_a_flipped_bit_is_told_with_its_tensor(out):
    name = "model.decoder.layers.0.router.scale"
    info = read_headers(out)[name]
    with info.file.open("r+b") as file:
        file.seek(info.start + 9)
        byte = file.read(1)[0]
        file.seek(info.start + 9)
        file.write(bytes([byte ^ 16]))
    with pytest.raises(WeightsError, match=f"{info.file}: the bytes of {name} are not those"):
        verify(out)


def test_a_renamed_a_missing_and_two_swapped_shards_are_found(out):
    (out / SECOND).rename(out / "model-2.safetensors")
    with pytest.raises(WeightsError, match=f"{SECOND} is missing"):
        verify(out)
    (out / "model-2.safetensors").rename(out / SECOND)
    verify(out)
    (out / FIRST).rename(out / "aside")
    (out / SECOND).rename(out / FIRST)
    (out / "aside").rename(out / SECOND)
    with pytest.raises(WeightsError, match=f"{FIRST} is not what was written: its header"):
        verify(out)


def test_an_extra_shard_is_found(out):
    shutil.copy(out / FIRST, out / "model-00004-of-00003.safetensors")
    with pytest.raises(WeightsError, match=r"00004-of-00003.* was not written by the"):
        verify(out)


@pytest.mark.parametrize(
    "name",
    "config.json chat_template.jinja generation_config.json README.md "
    "model.safetensors.index.json".split(),
)
def test_a_changed_and_a_missing_file_are_named(out, name):
    path = out / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(WeightsError, match=f"{name} is not what was written"):
        verify(out)
    path.unlink()
    with pytest.raises(WeightsError, match=f"{name} is missing"):
        verify(out)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(dtype="float16"),
        lambda r: r["files"].pop("config.json"),
        lambda r: r["source"].update(name="elsewhere"),
        lambda r: r.pop("digest"),
    ],
)
def test_a_changed_record_is_found(out, change):
    edit(out / "conversion.json", change)
    with pytest.raises(WeightsError, match=r"conversion\.json is damaged"):
        verify(out)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '{"digest": 3}'])
def test_a_damaged_record_is_found(out, text):
    (out / "conversion.json").write_text(text)
    with pytest.raises(WeightsError, match=r"conversion\.json is damaged"):
        verify(out)


def test_a_folder_without_a_record_is_no_result(out):
    (out / "conversion.json").unlink()
    with pytest.raises(WeightsError, match="it is not a result of mlx_diffgemma"):
        verify(out)
    with pytest.raises(SourceError, match=r"no folder .*nowhere; name the result to check"):
        verify(out / "nowhere")
    with pytest.raises(SourceError, match="nobodyatall"):
        verify("~nobodyatall/x")


def test_a_record_that_leaves_a_source_tensor_out_is_found(out):
    def change(record):
        record["source_tensors"] += 1
        record["digest"] = digest_of(record)

    edit(out / "conversion.json", change)
    with pytest.raises(WeightsError, match=r"of \d+ source tensors, \d+ are accounted for"):
        verify(out)


def test_a_record_of_other_tensors_is_found(out):
    def change(record):
        record["tensors"]["model.decoder.norm.weight"]["shape"] = [32, 2]
        record["digest"] = digest_of(record)

    edit(out / "conversion.json", change)
    with pytest.raises(WeightsError, match=r"model\.decoder\.norm\.weight is .* recorded as"):
        verify(out)


def test_a_source_that_is_gone_or_another_one_is_said(tmp_path):
    source = official(tmp_path / "source")
    convert(source, tmp_path / "out")
    shutil.rmtree(source)
    assert "the source, source, was not found; name it with" in verify(tmp_path / "out").notes[0]
    official(tmp_path / "source", num_experts=3)
    found = verify(tmp_path / "out")
    assert found.errors == {} and "has changed at model.decoder.layers.0" in found.notes[0]
    (source / "config.json").unlink()
    assert "errors were not measured: " in verify(tmp_path / "out").notes[0]


def test_a_model_that_does_not_fit_in_memory_is_said(made, monkeypatch):
    monkeypatch.setattr(verify_module, "recommended_bytes", lambda: 1)
    assert verify(made).notes[0].startswith("no denoise step was tried: it needs about 0.0 GB")


def test_a_step_that_is_not_finite_is_found(tmp_path):
    source = official(tmp_path / "source")
    info = read_header(source / "model.safetensors")["model.decoder.norm.weight"]
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(info.start)
        file.write(b"\x7f\x7f" * 64)  # the largest bfloat16
    convert(source, tmp_path / "out")
    with pytest.raises(WeightsError, match="logits that are not finite"):
        verify(tmp_path / "out")


def test_a_tokenizer_that_cannot_be_read_is_found(tmp_path):
    source = official(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    convert(source, tmp_path / "out")
    with pytest.raises(DiffGemmaError, match=r"tokenizer in .* cannot be read"):
        verify(tmp_path / "out")


def test_an_unreadable_file_is_one_line(out, monkeypatch):
    monkeypatch.setattr(verify_module, "_header_sum", _forbidden)
    with pytest.raises(SourceError, match=r"x\.safetensors: Permission denied"):
        verify(out)


def _forbidden(path):
    raise PermissionError(13, "Permission denied", "x.safetensors")


def test_a_result_of_another_source_is_found(tmp_path):
    """Same shapes, other values: checksums say nothing about that."""
    source = official(tmp_path / "source")
    convert(source, tmp_path / "out", quantize=True)
    info = read_header(source / "model.safetensors")["model.decoder.embed_tokens.weight"]
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(info.start)
        raw = file.read(info.nbytes)
        file.seek(info.start)
        file.write(raw[info.nbytes // 2 :] + raw[: info.nbytes // 2])
    with pytest.raises(WeightsError, match=r"embed_tokens\.weight differs from"):
        verify(tmp_path / "out")


def test_the_source_is_found_again_wherever_the_result_is_moved_to(tmp_path):
    convert(official(tmp_path / "source"), tmp_path / "out", quantize=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").rename(tmp_path / "elsewhere/renamed")
    assert verify(tmp_path / "elsewhere/renamed").errors["experts"] > 0.05


def test_a_source_that_moved_can_be_named(tmp_path):
    source, out = official(tmp_path / "source"), tmp_path / "out"
    convert(source, out, quantize=True)
    expected = verify(out).errors
    source.rename(tmp_path / "moved")
    assert verify(out).errors == {}
    assert verify(out, tmp_path / "moved").errors == expected
    other = official(tmp_path / "other", num_experts=3)
    with pytest.raises(SourceError, match=r"cannot be compared with its source: .* has changed at"):
        verify(out, other)
    with pytest.raises(SourceError, match=r"no folder .*nowhere"):
        verify(out, tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="differs from"):
        verify(out, official(tmp_path / "trained", seed=1))
    with pytest.raises(ConfigError, match="a revision belongs to"):
        verify(out, revision="main")


def test_a_cache_that_cannot_be_written_or_read_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr("mlx_diffgemma.convert.origin._cache", lambda: tmp_path / "file/below")
    source, out = official(tmp_path / "source"), tmp_path / "out"
    convert(source, out)
    assert "was not found; name it with --hf-path" in verify(out).notes[0]
    assert verify(out, source).errors


def test_an_unfinished_result_is_said_to_be_unfinished(tmp_path):
    def progress(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(official(tmp_path / "source"), tmp_path / "out", progress=progress)
    with pytest.raises(WeightsError, match="is not finished; run it again first"):
        verify(tmp_path / "out")


def test_each_stage_of_a_check_is_said(made):
    said = []
    verify(made, stage=said.append)
    assert said == [
        "checking files and headers",
        "comparing with the source, source",
        "computing one denoise step",
    ]
