from __future__ import annotations

import pytest

from mlx_diffgemma.convert import origin


@pytest.fixture(autouse=True, scope="session")
def cache_of_sources(tmp_path_factory):
    """Where conversions of these tests remember their sources; not the cache of who runs them."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(origin, "_cache", lambda: folder)
        yield folder
