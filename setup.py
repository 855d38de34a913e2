"""The description that package indexes show: the README without its relative links, which lead
nowhere there. Everything else of the package is said in pyproject.toml."""

import re
from pathlib import Path

_ELSEWHERE = r"(?![a-z]+:|#)"  # a web address, or a heading of the same page
_IMAGE = re.compile(rf"!\[[^\]]*\]\({_ELSEWHERE}[^)]*\)|<img\s[^>]*src=[\"']{_ELSEWHERE}[^>]*>")
_LINK = re.compile(rf"\[([^\]]*)\]\({_ELSEWHERE}[^)]*\)")


def description(readme: str) -> str:
    """Return a README with its relative images left out and its relative links as plain text."""
    return _LINK.sub(r"\1", _IMAGE.sub("", readme))


if __name__ == "__main__":  # setuptools runs this file; tests import it
    from setuptools import setup

    setup(
        long_description=description(
            Path(__file__).with_name("README.md").read_text(encoding="utf-8")
        ),
        long_description_content_type="text/markdown",
    )
