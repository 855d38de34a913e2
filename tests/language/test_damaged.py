"""Damaged picture files: a sample of what `python -m tests.language.damaged` reads."""

from __future__ import annotations

import pytest

from tests.language.damaged import FORMATS, bases, run


@pytest.mark.parametrize("seed", [pytest.param(0), pytest.param(1, marks=pytest.mark.long)])
def test_damaged_files_end_in_patches_or_in_one_line(seed):
    found = run(3000 if seed else 150, seed)
    assert not found["findings"], "\n".join(found["findings"])
    assert found["outcomes"]["read"] > 10 and len(found["outcomes"]) > 3


def test_every_format_is_damaged():
    assert {kind for kind, _ in bases()} == set(FORMATS)
