"""Reductions over groups of rows, against one group at a time."""

import numpy as np
import pytest

from mlx_diffgemma.constraint.groups import Groups


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("operation", [np.add, np.maximum])
def test_each_group_is_reduced_over_its_members(seed, operation):
    rng = np.random.default_rng(seed)
    rows = rng.integers(-9, 9, (40, 5)).astype(np.float64)  # sums of these are exact
    sizes = rng.choice([1, 1, 1, 2, 8, 9, 30, 200], 25)
    members = rng.integers(0, len(rows), sizes.sum())
    starts = np.append(0, np.cumsum(sizes))
    found = Groups.of(starts, members).reduce(operation, rows)
    for one, first, last in zip(found, starts, starts[1:], strict=False):
        assert one.tolist() == operation.reduce(rows[members[first:last]], axis=0).tolist()


def test_rows_stay_as_they_were():
    rows = np.arange(6.0).reshape(3, 2)
    groups = Groups.of(np.array([0, 3]), np.array([0, 1, 2]))
    assert groups.reduce(np.add, rows).tolist() == [[6.0, 9.0]]
    assert rows.tolist() == [[0, 1], [2, 3], [4, 5]]
