"""A run that hangs fails its test."""

from __future__ import annotations

import pytest

from mlx_diffgemma.engine.run import Channel
from tests.engine.cases import PATIENCE


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    monkeypatch.setattr(Channel.take, "__defaults__", (PATIENCE,))
