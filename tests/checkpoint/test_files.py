"""Repo id or folder -> local folder, against a small server on this machine that plays the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

from mlx_diffgemma import bundled_model
from mlx_diffgemma.checkpoint.files import PATTERNS, resolve
from mlx_diffgemma.errors import SourceError

ROOT = Path(__file__).parents[2]


def refusal(source, revision: str | None = None) -> str:
    with pytest.raises(SourceError) as raised:
        resolve(source, revision)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- folders ---


def test_a_folder_is_used_as_it_is(tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path == resolve(str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    assert resolve(tmp_path.name) == Path(tmp_path.name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == tmp_path / "model"


def test_a_folder_that_looks_like_a_repo_id_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name") == Path("owner/name")


def test_a_revision_of_a_folder_is_refused(tmp_path):
    message = refusal(tmp_path, "main")
    assert "'main'" in message and "belongs to a Hub repository" in message


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "notes.txt"])
def test_a_file_of_a_checkpoint_is_refused_with_its_folder(tmp_path, name):
    (tmp_path / name).touch()
    said = f"{name} is a file; give the folder of the checkpoint, {tmp_path}"
    assert said in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["model-Q4_0.gguf", "pytorch_model.bin", "adapters.safetensors"])
def test_a_file_of_another_kind_is_named_once(tmp_path, name):
    (tmp_path / name).touch()
    said = refusal(tmp_path / name)
    assert said.startswith(f"{tmp_path / name} ") and said.count(name) == 1


OTHER_THINGS = [
    ("gemma-Q4_K_M.gguf", "gemma-Q4_K_M.gguf is a GGUF file, which is made for llama.cpp; use a"),
    ("pytorch_model.bin", "pytorch_model.bin is a pickle file, which is never opened"),
    ("model.pt", "model.pt is a pickle file"),
    ("consolidated.00.pth", "consolidated.00.pth is a pickle file"),
    ("epoch=3.ckpt", "epoch=3.ckpt is a pickle file"),
    ("adapter_config.json", "these are adapters; give the model that they were trained on"),
    ("adapter_model.safetensors", "adapter_model.safetensors holds adapters"),
    ("adapters.safetensors", "adapters.safetensors holds adapters"),
    ("weights.npz", "weights.npz is an archive of NumPy arrays"),
    ("tf_model.h5", "tf_model.h5 is a Keras or TensorFlow file"),
    ("flax_model.msgpack", "flax_model.msgpack is a Flax file"),
    ("_CHECKPOINT_METADATA", "this is a JAX (Orbax) checkpoint"),
    ("model.onnx", "model.onnx is an ONNX file"),
]


@pytest.mark.parametrize(("name", "said"), OTHER_THINGS)
def test_other_things_are_named_as_files_and_as_folders_with_and_without_a_config(
    tmp_path, name, said
):
    (tmp_path / name).touch()
    assert said in refusal(tmp_path / name)
    for names in (("README.md",), ("config.json", "tokenizer.json")):
        for other in names:
            (tmp_path / other).touch()
        assert f"{tmp_path} has no model*.safetensors: {said}" in refusal(tmp_path)


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_a_checkpoint_with_other_things_beside_it_is_a_checkpoint(tmp_path, weights):
    for name in (weights, *(name for name, _ in OTHER_THINGS)):
        (tmp_path / name).touch()
    assert resolve(tmp_path) == tmp_path


@pytest.mark.parametrize("inside", ["checkpoint", "snapshots/abc"])
def test_a_folder_around_a_checkpoint_names_it(tmp_path, inside):
    (tmp_path / inside).mkdir(parents=True)
    (tmp_path / inside / "config.json").touch()
    assert refusal(tmp_path).endswith(f"no config.json; did you mean {tmp_path / inside}?")


@pytest.mark.parametrize("rest", ["", "/", "/tree/main"])
def test_a_web_address_is_refused_with_the_repo_id(rest):
    assert "give the Hub repo id, owner/name" in refusal(f"https://huggingface.co/owner/name{rest}")


def test_an_empty_name_is_refused():
    """It is what a shell makes of a variable that is not set."""
    assert "the name of the model is empty" in refusal("")


@pytest.mark.parametrize("source", ["no-such-folder", "./a/b", "/a/b", "a/b/c", "a b/c", "~/x"])
def test_what_is_neither_folder_nor_repo_id_says_what_was_looked_for(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(source)
    assert f"no folder {source}, and it is not a Hub repo id (owner/name)" in message


def test_a_misspelt_folder_is_suggested(tmp_path):
    (tmp_path / "diffusiongemma-4bit").mkdir()
    message = refusal(tmp_path / "difusiongemma-4bit")
    assert message.endswith(f"did you mean {tmp_path / 'diffusiongemma-4bit'}?")


@pytest.mark.parametrize(
    "source",
    ["x" * 5000, "~no-such-user-at-all/model", "a\0b", "a\nb/c"],
    ids=["too long", "nobody's home", "zero byte", "line break"],
)
def test_a_path_that_cannot_be_is_one_line(source):
    refusal(source)


def test_only_data_is_ever_asked_for():
    assert not any(re.search(r"\.(bin|py|pt|pth|pkl|gguf)$|\*$", p) for p in PATTERNS)


def test_the_bundled_model_is_a_folder():
    assert resolve(bundled_model()).joinpath("config.json").is_file()


# --- the Hub ---

SHARD = "model-00001-of-00002.safetensors"
# Files of the same content would be fetched once; the shard is longer than the pieces it comes in.
FILES = {
    "config.json": b"config",
    "generation_config.json": b"generation",
    "tokenizer.json": b"tokenizer",
    "chat_template.jinja": b"template",
    SHARD: bytes(range(256)) * (24 << 12),
    "model-00002-of-00002.safetensors": b"second",
    "model.safetensors.index.json": b"index",
}
UNNEEDED = {
    "README.md": b"x",
    "pytorch_model.bin": b"x",
    "modeling_evil.py": b"x",
    "consolidated.safetensors": b"x",
    "onnx/model.safetensors": b"x",
    "tokenizer_config.json.py": b"x",
}
NEW, OLD = "a" * 40, "b" * 40
REVISIONS = {"main": NEW, NEW: NEW, "v1": OLD, OLD: OLD}


@dataclass
class Hub:
    """What the server has been asked for, and where it is to fail."""

    address: str = ""
    files: list[str] = field(default_factory=list)  # resolve/REVISION/FILE of each GET
    ranges: list[str] = field(default_factory=list)
    contents: dict[str, bytes] = field(default_factory=lambda: FILES | UNNEEDED)
    sent: dict[str, int] = field(default_factory=dict)  # bytes of each file
    drops: int = 0  # connections to break in the middle of the first shard


@pytest.fixture
def hub():
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def reply(self, content: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
            if repo == "owner/broken":
                return self.reply(b"", 500)
            if repo == "owner/gated":
                return self.reply(b"{}", 403, X_Error_Code="GatedRepo")
            if repo != "owner/name":
                return self.reply(b"{}", 404, X_Error_Code="RepoNotFound")
            return self.answer(path)

        def answer(self, path: str) -> None:
            if match := re.fullmatch(r"/api/models/owner/name(?:/revision/(.+))?", path):
                commit = REVISIONS.get(match[1] or "main")
                if commit is None:
                    return self.reply(b"{}", 404, X_Error_Code="RevisionNotFound")
                siblings = [{"rfilename": name} for name in state.contents]
                info = {"id": "owner/name", "sha": commit, "siblings": siblings}
                return self.reply(json.dumps(info).encode(), Content_Type="application/json")
            if re.match(r"/api/models/owner/name/tree/", path):
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
                    for name, data in state.contents.items()
                ]
                return self.reply(json.dumps(tree).encode(), Content_Type="application/json")
            match = re.fullmatch(r"/owner/name/resolve/([^/]+)/(.+)", path)
            commit, name = REVISIONS[match[1]], match[2]
            if name not in state.contents:
                return self.reply(b"", 404, X_Error_Code="EntryNotFound")
            data = state.contents[name]
            if self.command == "GET":
                state.files.append(f"{commit}/{name}")
            start, whole = 0, len(data)
            if asked := self.headers.get("Range"):
                first, last = re.match(r"bytes=(\d+)-(\d*)", asked).groups()
                start, data = int(first), data[: int(last) + 1 if last else None]
                state.ranges.append(asked)
            headers = {"ETag": f'"{digest(data)}"', "X_Repo_Commit": commit}
            if asked:
                headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{whole}"
            if self.command == "GET" and name == SHARD and state.drops:
                state.drops -= 1
                self.send_response(206 if asked else 200)
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                self.wfile.write(data[start : start + len(data) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)
                return None
            if self.command == "GET":
                state.sent[name] = state.sent.get(name, 0) + len(data) - start
            return self.reply(data[start:], 206 if asked else 200, **headers)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@cache
def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


PROGRAM = """
import json, sys, time
time.sleep = lambda seconds: None  # the Hub's client waits longer and longer between attempts
from mlx_diffgemma.errors import SourceError
from mlx_diffgemma.checkpoint.files import resolve
for source, revision in json.loads(sys.argv[1]):
    try:
        print(json.dumps(["folder", str(resolve(source, revision))]))
    except SourceError as error:
        print(json.dumps(["error", str(error)]))
"""


def run_elsewhere(
    address: str, folder: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Python with a Hub at `address` and a cache of its own."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))},
            "PYTHONPATH": str(ROOT),
            "NO_PROXY": "127.0.0.1",
            "HF_ENDPOINT": address,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_CACHE": str(folder / "hub"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **environment,
        },
        timeout=90,
    )


def resolve_elsewhere(
    address: str, folder: Path, *asked: tuple[str, str | None], **environment: str
) -> list[tuple[str, str]]:
    """In a process of its own, since huggingface_hub reads its environment when imported."""
    finished = run_elsewhere(address, folder, "-c", PROGRAM, json.dumps(asked), **environment)
    assert finished.returncode == 0, finished.stderr
    results = [tuple(json.loads(line)) for line in finished.stdout.splitlines()]
    assert all("\n" not in text for _, text in results)
    return results


def contents(folder: str) -> dict[str, bytes]:
    base = Path(folder)
    return {str(p.relative_to(base)): p.read_bytes() for p in base.rglob("*") if p.is_file()}


def test_only_needed_files_come_over_a_connection_that_breaks_and_offline_they_are_used(
    hub, tmp_path
):
    hub.drops = 1
    [(kind, folder)] = resolve_elsewhere(hub.address, tmp_path, ("owner/name", None))
    assert kind == "folder", folder
    assert contents(folder) == FILES
    assert {name.partition("/")[2] for name in hub.files} == set(FILES)
    assert {name.partition("/")[0] for name in hub.files} == {NEW}
    assert hub.drops == 0
    [resumed] = hub.ranges
    assert int(re.search(r"\d+", resumed)[0]) > 0, "what had arrived is not fetched again"

    offline = resolve_elsewhere(
        "http://127.0.0.1:9",
        tmp_path,
        ("owner/name", None),
        ("owner/other", None),
        ("owner/name", "v1"),
        HF_HUB_OFFLINE="1",
    )
    assert offline[0] == ("folder", folder)
    for kind, message in offline[1:]:
        assert kind == "error"
        assert "the local cache does not hold" in message and "(HF_HUB_OFFLINE is set)" in message
    assert "does not hold the whole repository at revision v1" in offline[2][1]


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_revision_is_honoured(hub, tmp_path, revision):
    [(kind, folder)] = resolve_elsewhere(hub.address, tmp_path, ("owner/name", revision))
    assert kind == "folder" and Path(folder).name == OLD
    assert {name.partition("/")[0] for name in hub.files} == {OLD}


def test_what_the_hub_refuses_is_said_in_one_line_each(hub, tmp_path):
    (tmp_path / "owner" / "missing1").mkdir(parents=True)
    asked = ("missing", "gated", "broken", "name", "bad--name")
    results = resolve_elsewhere(
        hub.address, tmp_path, *[(f"owner/{n}", "v9" if n == "name" else None) for n in asked]
    )
    assert [kind for kind, _ in results] == ["error"] * len(asked)
    missing, gated, broken, revision, invalid = (message for _, message in results)
    assert "no folder and no Hub repository owner/missing" in missing
    assert "did you mean owner/missing1?" in missing
    assert "owner/gated asks you to accept its terms" in gated and "hf auth login" in gated
    assert "owner/broken is no folder here" in broken and "the Hub cannot be reached" in broken
    assert revision == "owner/name has no revision v9"
    assert "owner/bad--name, and it is not a valid Hub repo id" in invalid
    assert hub.files == []


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    [(kind, message)] = resolve_elsewhere("http://127.0.0.1:9", tmp_path, ("owner/name", None))
    assert kind == "error"
    assert message == (
        "owner/name is no folder here, and the Hub cannot be reached; the local cache does not "
        "hold the whole repository"
    )
    assert "HF_HUB_OFFLINE" not in message


def test_a_dry_run_brings_headers_and_no_weights(tmp_path, monkeypatch):
    """What the Hub's client reads from the first bytes of each file becomes files of full
    length."""
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo

    from mlx_diffgemma.checkpoint.headers import read_headers

    stored = read_headers(bundled_model())
    first = min(info.start for info in stored.values())
    tensors = {
        name: TensorInfo(
            info.dtype, list(info.shape), (info.start - first, info.start - first + info.nbytes)
        )
        for name, info in stored.items()
    }
    asked = []

    class Api:
        def list_repo_files(self, repo, *, revision):
            return ["config.json", "model.safetensors", "model-Q4_0.gguf"]

        def get_safetensors_metadata(self, repo, *, revision):
            asked.append((repo, revision))
            files = {"model.safetensors": SafetensorsFileMetadata(metadata={}, tensors=tensors)}
            return SimpleNamespace(files_metadata=files)

    commit = tmp_path / "snapshots" / ("c" * 40)
    commit.mkdir(parents=True)
    (commit / "config.json").write_text("{}")
    patterns = []

    def snapshot_download(repo, *, revision, allow_patterns):
        patterns.extend(allow_patterns)
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    folder = resolve("owner/name", headers_only=True)
    assert not any(pattern.endswith(".safetensors") for pattern in patterns)
    assert asked == [("owner/name", "c" * 40)]
    assert (folder / "config.json").read_text() == "{}"
    found = read_headers(folder)
    assert {n: (i.dtype, i.shape) for n, i in found.items()} == {
        n: (i.dtype, i.shape) for n, i in stored.items()
    }


@pytest.mark.parametrize(
    ("name", "said"), [("x-Q4_0.gguf", "a GGUF file"), ("adapters.safetensors", "holds adapters")]
)
def test_a_repository_of_other_things_is_named(hub, tmp_path, name, said):
    hub.contents = {"config.json": b"{}", name: b"x" * 99}
    [(kind, message)] = resolve_elsewhere(hub.address, tmp_path, ("owner/name", None))
    assert kind == "error"
    assert "owner/name has no model*.safetensors: " in message and said in message
    assert name not in hub.sent


def bundled_files(shards: int) -> dict[str, bytes]:
    """The bundled model as a repository, in so many weight files."""
    import mlx.core as mx

    files = {
        path.name: path.read_bytes() for path in bundled_model().iterdir() if path.suffix == ".json"
    }
    if shards == 1:
        return files | {"model.safetensors": (bundled_model() / "model.safetensors").read_bytes()}
    tensors, weight_map = mx.load(str(bundled_model() / "model.safetensors")), {}
    with TemporaryDirectory() as folder:
        for i in range(shards):
            name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {n: tensors[n] for n in sorted(tensors)[i::shards]}
            mx.save_safetensors(f"{folder}/{name}", part)
            files[name] = Path(folder, name).read_bytes()
            weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    return files | {"model.safetensors.index.json": json.dumps(index).encode()}


HEADER_READ = 100_001  # bytes that the Hub's client asks of each file, to see its header


@pytest.mark.parametrize("shards", [1, 3])
def test_info_of_a_repository_fetches_headers_and_no_weights(hub, tmp_path, shards):
    hub.contents = bundled_files(shards)
    finished = run_elsewhere(
        hub.address, tmp_path, "-m", "mlx_diffgemma.info", "--model", "owner/name", "--json"
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert (found["parameters"], found["files"]) == (1_952_292, shards)
    assert (found["model"], found["folder"]) == ("owner/name", None)
    weights = {name: n for name, n in hub.contents.items() if name.endswith(".safetensors")}
    assert len(weights) == shards
    for name, data in weights.items():
        assert hub.sent[name] <= HEADER_READ < len(data) / 5
    assert hub.ranges == ["bytes=0-100000"] * shards
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


def test_info_of_a_cached_repository_fetches_nothing_more(hub, tmp_path):
    hub.contents = bundled_files(3)
    [(kind, folder)] = resolve_elsewhere(hub.address, tmp_path, ("owner/name", None))
    assert kind == "folder", folder
    hub.sent.clear()
    finished = run_elsewhere(
        hub.address, tmp_path, "-m", "mlx_diffgemma.info", "--model", "owner/name", "--json"
    )
    found = json.loads(finished.stdout)
    assert (found["model"], found["folder"]) == ("owner/name", folder)
    assert hub.sent == {}

    # One shard is gone: headers again, and no shard is copied or fetched.
    next(Path(folder).glob("model-00002*")).unlink()
    finished = run_elsewhere(
        hub.address, tmp_path, "-m", "mlx_diffgemma.info", "--model", "owner/name", "--json"
    )
    assert json.loads(finished.stdout)["parameters"] == 1_952_292
    assert max(hub.sent.values()) <= HEADER_READ
