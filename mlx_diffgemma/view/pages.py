"""The check of a trace's files: they never replace a file that is not a trace."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ConfigError, SourceError

FORMAT = "mlx_diffgemma.trace/1"
TITLE = "<title>A run of mlx_diffgemma</title>"  # in trace.html
_HEAD = 2048  # bytes read to recognise a file


def check_page(page: Path) -> Path:
    """Refuse a page that cannot be written, or that would replace another file.

    Returns:
      The path of the plain object beside it.

    Raises:
      ConfigError: if the name does not end in .html.
      SourceError: if there is no such folder, no file can be made in it, or there is a file with
        this name, or with that of the plain object, that is neither empty nor a trace.
    """
    if os.path.isdir(page):
        raise SourceError(f"--trace {page} is a folder; name a file in it that ends in .html")
    if page.suffix != ".html":
        raise ConfigError(f"--trace must name a file that ends in .html, got {str(page)!r}")
    if not os.path.isdir(page.parent):
        raise SourceError(f"--trace {page}: there is no folder {page.parent}; make it first")
    if not os.access(page.parent, os.W_OK):
        raise SourceError(f"--trace {page}: no file can be made in the folder {page.parent}")
    beside = page.with_suffix(".json")
    if os.path.isdir(beside):
        raise SourceError(f"--trace {page} also writes {beside}, which is a folder")
    for file, mark in ((page, TITLE), (beside, f'{{"format": "{FORMAT}"')):
        if _is_another(file, mark.encode()):
            also = "" if file == page else f" also writes {beside}:"
            raise SourceError(
                f"--trace {page}{also} this file exists and is not a trace; choose another name"
            )
    return beside


def _is_another(file: Path, mark: bytes) -> bool:
    """Return whether a file exists that is neither empty nor a trace."""
    if not os.path.lexists(file) or not file.exists():
        return False
    if not file.is_file():
        return True
    try:
        with file.open("rb") as stream:
            head = stream.read(_HEAD)
    except OSError:
        return True
    return bool(head) and mark not in head


def model_name(source: str | Path) -> str:
    """Return a model's name for a file that may be shared: a repository's id, or a folder's last
    part."""
    folder = Path(source).expanduser()
    if not folder.exists():
        return str(source)
    parts = folder.resolve().parts
    if cached := [part for part in parts if part.startswith("models--")]:  # of huggingface_hub
        return cached[-1].removeprefix("models--").replace("--", "/")
    return parts[-1]
