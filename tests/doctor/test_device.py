"""The device computes by one graph and the reference by the other, and packed weights are decoded
as MLX does."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.doctor import device, exact
from mlx_diffgemma.model.backend import is_cpu


def test_the_device_computes_by_the_graph_for_gpus_and_the_reference_by_that_for_the_cpu():
    seen = {}

    def build(name: str) -> mx.array:
        seen[name] = is_cpu()
        return mx.zeros(1)

    device.computed(lambda: build("device"))
    device.expected(lambda: build("reference"))
    assert seen == {"device": False, "reference": True}


@pytest.mark.parametrize("packing", exact.PACKINGS, ids=exact.name_of)
def test_packed_weights_are_decoded_as_mlx_does(packing):
    """Two decoders that know nothing of each other, on weights that MLX packed."""
    values = mx.array(np.random.default_rng(3).normal(size=(5, 384)).astype(np.float32))
    how = {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}
    codes, scales, *biases = mx.quantize(values, **how)
    arrays = [np.array(array) for array in (codes, scales, *biases)]
    found = exact.decode(*arrays, *([] if biases else [None]), packing)
    right = mx.dequantize(codes, scales, *biases, **how, dtype=mx.float32)
    np.testing.assert_allclose(found, np.array(right), rtol=1e-6, atol=1e-6)
