"""One server for the tests that need nothing special."""

from __future__ import annotations

import pytest

from tests.serve.cases import serving


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running
        assert not running.bugs
