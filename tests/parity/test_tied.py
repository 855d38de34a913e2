"""Weights stored under any of their tied names are the same model to transformers and to us."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch", reason="torch is not installed")

from mlx.utils import tree_flatten  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (  # noqa: E402
    DiffusionGemmaForBlockDiffusion,
)

from mlx_diffgemma import load_model  # noqa: E402
from mlx_diffgemma.checkpoint.names import Ignored, translate  # noqa: E402
from mlx_diffgemma.errors import WeightsError  # noqa: E402
from tests.checkpoints import draw_config, write_checkpoint  # noqa: E402

pytestmark = pytest.mark.parity

Tensors = dict[str, np.ndarray]
EMBEDDING = "model.decoder.embed_tokens.weight"


def encoders(name: str) -> str | None:
    """The encoder's name of a decoder's tensor that both share."""
    own = ("layer_scalar", "self_conditioning")
    if not name.startswith("model.decoder.") or any(word in name for word in own):
        return None
    return name.replace("model.decoder.", "model.encoder.language_model.", 1)


def under_the_encoder(tensors: Tensors) -> Tensors:
    return {encoders(name) or name: array for name, array in tensors.items()}


def under_both(tensors: Tensors) -> Tensors:
    return tensors | under_the_encoder(tensors)


def some_here_some_there(tensors: Tensors) -> Tensors:
    renamed = under_the_encoder(dict(list(tensors.items())[::2]))
    return renamed | dict(list(tensors.items())[1::2])


def head_beside(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": tensors[EMBEDDING]}


def head_alone(tensors: Tensors) -> Tensors:
    return {"lm_head.weight" if n == EMBEDDING else n: array for n, array in tensors.items()}


def all_three(tensors: Tensors) -> Tensors:
    return under_both(head_beside(tensors))


def write(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    write_checkpoint(folder, draw_config(3), 3)
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def of_transformers(folder: Path) -> tuple[DiffusionGemmaForBlockDiffusion, Tensors]:
    """The model, and its text weights under our names."""
    model, report = DiffusionGemmaForBlockDiffusion.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    found = {
        translate(name): tensor.numpy()
        for name, tensor in model.state_dict().items()
        if name.startswith("model.decoder.") or name.endswith("layer_scalar")
    }
    return model, {name: array for name, array in found.items() if not isinstance(name, Ignored)}


@pytest.mark.parametrize(
    "change",
    [under_the_encoder, under_both, some_here_some_there, head_beside, head_alone, all_three],
)
def test_tied_weights_under_any_name_are_those_of_transformers(tmp_path, change):
    folder = write(tmp_path / "checkpoint", change)
    reference, theirs = of_transformers(folder)
    assert (
        reference.lm_head.weight.data_ptr()
        == reference.model.decoder.embed_tokens.weight.data_ptr()
    )
    ours = dict(tree_flatten(load_model(folder, fused=False).parameters()))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(np.array(ours[name]), array, err_msg=name)


@pytest.mark.parametrize(
    "name", ["lm_head.weight", encoders(EMBEDDING), "router.scale", "down_proj"]
)
def test_a_weight_that_transformers_leaves_untied_is_refused(tmp_path, name):
    """It would have to be two weights here."""

    def change(tensors: Tensors) -> Tensors:
        tensors = all_three(tensors)
        chosen = next(n for n in tensors if n.endswith(name) and not n.startswith("model.decoder."))
        other = tensors[chosen].copy()
        other.flat[-1] += 1
        return tensors | {chosen: other}

    folder = write(tmp_path / "checkpoint", change)
    reference, _ = of_transformers(folder)
    tied = DiffusionGemmaForBlockDiffusion._tied_weights_keys
    assert len(reference.all_tied_weights_keys) < len(
        of_transformers(write(tmp_path / "tied", all_three))[0].all_tied_weights_keys
    ), tied
    with pytest.raises(WeightsError, match="hold different values"):
        load_model(folder)
