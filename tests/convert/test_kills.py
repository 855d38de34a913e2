from __future__ import annotations

from tests.convert.kills import run


def test_killed_runs_go_on_to_the_same_bytes(tmp_path):
    tally = run(3, 0, tmp_path)
    assert tally.kills == 3 and tally.wrong == []
