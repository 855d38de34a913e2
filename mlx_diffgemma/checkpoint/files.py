"""Local folders of repo ids, with downloads and uploads. The only file that uses the network."""

from __future__ import annotations

import atexit
import difflib
import fnmatch
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from ..errors import SourceError
from .choice import full_name

_HEADERS = "mlx_diffgemma-headers-"
SIDECAR = "*vision*.safetensors"  # where some publishers keep the vision tower
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
_TEXT = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_PICKLE = (
    "{name} is a pickle file, which is never opened, since it may run code; "
    "save the model as safetensors (transformers' save_pretrained does)"
)
_IMAGES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
# Things that users give instead of a checkpoint. `{name}` is one of the files.
_OTHER_THINGS = {
    "*.gguf": "{name} is a GGUF file, which is made for llama.cpp; use a checkpoint of safetensors "
    "instead, such as mlx-community/diffusiongemma-26B-A4B-it-4bit",
    "adapter_config.json": "these are adapters; give the model that they were trained on as the "
    "model, and this folder as the adapter path",
    "adapter*.safetensors": "{name} holds adapters; give the model that they were trained on as "
    "the model, and the adapters' folder as the adapter path",
    "*.bin": _PICKLE,
    "*.pt": _PICKLE,
    "*.pth": _PICKLE,
    "*.ckpt": _PICKLE,
    "*.npz": "{name} is an archive of NumPy arrays; save the model as safetensors",
    "*.h5": "{name} is a Keras or TensorFlow file; save the model as safetensors",
    "*.msgpack": "{name} is a Flax file; save the model as safetensors",
    "_CHECKPOINT_METADATA": "this is a JAX (Orbax) checkpoint; use the one for transformers, "
    "google/diffusiongemma-26B-A4B-it",
    "*.onnx": "{name} is an ONNX file; use a checkpoint of safetensors instead",
}
# The files of a repository that a text runtime needs; no pickle files, no code.
PATTERNS = ("config.json", *_TEXT, *_WEIGHTS, SIDECAR)
# The files that the converter copies unchanged from its source.
SIDE_PATTERNS = (*_TEXT, *_IMAGES)


def bundled_model() -> Path:
    """Return the folder of the small trained model that comes with the package."""
    return Path(str(resources.files("mlx_diffgemma.demo")))


def resolve(
    source: str | os.PathLike[str],
    revision: str | None = None,
    *,
    for_conversion: bool = False,
    headers_only: bool = False,
) -> Path:
    """Return a folder unchanged, or the local copy of a Hub repository, downloaded if needed.

    Downloads resume, show their progress on stderr, and bring only the files that are needed.
    `HF_HUB_OFFLINE=1` uses what is cached.

    Args:
      source: a folder, a repo id such as `mlx-community/diffusiongemma-26B-A4B-it-4bit`, or its
        short name (`4bit`, `8bit`, ...).
      revision: branch, tag or commit of a repository.
      for_conversion: fetch all files that the converter copies, image processing included.
      headers_only: fetch only the headers of weight files that are not cached, into a temporary
        folder with files of the right length and no tensor data.

    Raises:
      SourceError: if there is no such folder or repository, it cannot be reached, or it is not a
        checkpoint of safetensors.
    """
    text = full_name(os.fspath(source))
    try:
        folder = Path(text).expanduser()
        is_folder, is_there = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # forbidden, too long, ~NAME unknown
        raise SourceError(f"{text} cannot be looked up as a folder: {error}") from error
    if not text:
        raise SourceError("the name of the model is empty; give a folder or a Hub repo id")
    if is_folder:
        if revision is not None:
            raise SourceError(
                f"{text} is a folder, and a revision ({revision!r}) belongs to a Hub repository"
            )
        if not os.access(folder, os.R_OK | os.X_OK):
            raise SourceError(f"{text} cannot be read: permission denied")
        _refuse_other_things(text, [path.name for path in folder.iterdir()], folder)
        return folder
    if is_there:
        if what := other_things([folder.name], place=text):
            raise SourceError(what if what.startswith(text) else f"{text} is a file; {what}")
        raise SourceError(f"{text} is a file; give the folder of the checkpoint, {folder.parent}")
    if match := re.fullmatch(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)(/.*)?", text):
        raise SourceError(f"{text} is a web address; give the Hub repo id, {match[1]}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text) or text.startswith((".", "~", "/")):
        raise SourceError(
            f"no folder {text}, and it is not a Hub repo id (owner/name){_similar(folder)}"
        )
    patterns = (*PATTERNS, *_IMAGES) if for_conversion else PATTERNS
    return _download(text, revision, folder, patterns, headers_only=headers_only)


def _download(
    repo: str,
    revision: str | None,
    folder: Path,
    patterns: tuple[str, ...],
    *,
    headers_only: bool,
) -> Path:
    import httpx2
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        SafetensorsParsingError,
    )

    at = f" at revision {revision}" if revision else ""
    try:
        wanted = [p for p in patterns if not (headers_only and p.endswith(".safetensors"))]
        local = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
        if has_all_weights(local):
            return local
        if not HF_HUB_OFFLINE:
            there = HfApi().list_repo_files(repo, revision=local.name)
            _refuse_other_things(repo, [name for name in there if "/" not in name])
        return _with_headers(local, repo) if headers_only else local
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise SourceError(
            f"{repo}{at} has no safetensors files that can be read: {error}"
        ) from error
    except GatedRepoError as error:
        raise SourceError(
            f"{repo} asks you to accept its terms on huggingface.co and to log in (`hf auth login`)"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"no folder and no Hub repository {repo}; check the name, or log in if it is private"
            f"{_similar(folder)}"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{repo} has no revision {revision}") from error
    except HFValidationError as error:
        raise SourceError(
            f"no folder {repo}, and it is not a valid Hub repo id: {error}"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise SourceError(
            f"{repo} is no folder here, and the Hub cannot be reached"
            f"{' (HF_HUB_OFFLINE is set)' if HF_HUB_OFFLINE else ''}; the local cache does not "
            f"hold the whole repository{at}"
        ) from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{repo}{at} could not be downloaded: {reason}") from error


def other_things(names: Iterable[str], *, place: str | None = None) -> str | None:
    """Return what files without `model*.safetensors` are, and what to use instead; None if they are
    unknown. A single file is called by its place, where given."""
    names = sorted(names)
    for pattern, what in _OTHER_THINGS.items():
        if found := fnmatch.filter(names, pattern):
            return what.format(name=place or found[0])
    return None


def _refuse_other_things(source: str, names: list[str], folder: Path | None = None) -> None:
    """Refuse folders that are known to be something other than a checkpoint of safetensors."""
    if fnmatch.filter(names, _WEIGHTS[0]) or _WEIGHTS[1] in names:
        return
    if what := other_things(names):
        raise SourceError(f"{source} has no {_WEIGHTS[0]}: {what}")
    if folder is not None and "config.json" not in names:
        inside = sorted(path.parent for path in folder.glob("*/config.json"))
        inside += sorted(path.parent for path in folder.glob("snapshots/*/config.json"))
        if inside:
            raise SourceError(f"{source} has no config.json; did you mean {inside[0]}?")


def has_all_weights(local: Path) -> bool:
    """Return whether all weight files that a snapshot lists are in the cache."""
    try:
        listed = json.loads((local / _WEIGHTS[1]).read_text("utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return any(local.glob(_WEIGHTS[0]))  # one file; the index's reader refuses a damaged one
    return all((local / name).is_file() for name in listed)


def _with_headers(local: Path, repo: str) -> Path:
    """Return a temporary copy of a snapshot, whose weight files hold only their header but have the
    right length. Its path names repository and commit, as in the cache."""
    from huggingface_hub import HfApi

    temporary = Path(tempfile.mkdtemp(prefix=_HEADERS))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    folder = temporary / f"models--{repo.replace('/', '--')}" / "snapshots" / local.name
    folder.mkdir(parents=True)
    for path in local.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, folder / path.name)
    # The commit, not the branch, which may have moved since the small files were fetched.
    found = HfApi().get_safetensors_metadata(repo, revision=local.name)
    for name, metadata in found.files_metadata.items():
        tensors = metadata.tensors
        header = {
            tensor: {"dtype": i.dtype, "shape": i.shape, "data_offsets": list(i.data_offsets)}
            for tensor, i in tensors.items()
        }
        raw = json.dumps(header).encode()
        end = max((i.data_offsets[1] for i in tensors.values()), default=0)
        with (folder / Path(name).name).open("wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            file.truncate(8 + len(raw) + end)
    return folder


def is_temporary(folder: Path) -> bool:
    """Return whether a folder is a temporary copy with headers only, removed with this process."""
    return any(part.startswith(_HEADERS) for part in folder.parts)


def cached(repo: str, revision: str | None) -> Path | None:
    """Return the cached snapshot of a repository, if there is one; never download."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def upload(folder: Path, repo: str) -> None:
    """Upload a folder to the Hub as `repo`, which is created if needed.

    Raises:
      SourceError: if the Hub refuses or cannot be reached.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        httpx2.HTTPError,
        OSError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{folder} could not be uploaded to {repo}: {reason}") from error


def _similar(folder: Path) -> str:
    try:
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(folder.name, siblings, n=1)
    return f"; did you mean {folder.parent / close[0]}?" if close else ""


def write_whole(file: Path, content: bytes) -> None:
    """Write a file by way of a temporary one and a rename, so that it is never half written. Links
    and permissions are kept.

    Raises:
      SourceError: if it cannot be written.
    """
    target, beside = file.resolve(), None
    try:
        number, beside = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(number, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(beside, _mode(target))
        os.replace(beside, target)
    except BaseException as error:  # Ctrl-C too must leave no file
        if beside is not None:
            Path(beside).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SourceError(f"{file} cannot be written: {error.strerror}") from error
        raise


def _mode(target: Path) -> int:
    """Return the file's mode, or that of a new file."""
    if target.exists():
        return target.stat().st_mode & 0o7777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
