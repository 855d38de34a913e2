"""The training objective and its gradients against the same objective written in torch on
transformers' model in float64: random weights from the same files, replayed draws, CPU."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch", reason="torch is not installed")

from transformers import DynamicCache  # noqa: E402

from mlx_diffgemma import load_model  # noqa: E402
from mlx_diffgemma.checkpoint.adapters import add_adapters  # noqa: E402
from mlx_diffgemma.checkpoint.names import translate  # noqa: E402
from mlx_diffgemma.config.training import (  # noqa: E402
    DEFAULT_KEYS,
    EXPERTS,
    LoraParameters,
    TrainSettings,
)
from mlx_diffgemma.model.backend import as_on_gpu  # noqa: E402
from mlx_diffgemma.train.batches import Draw, draw, make_batch  # noqa: E402
from mlx_diffgemma.train.data import Example  # noqa: E402
from mlx_diffgemma.train.objective import layers_twice, losses  # noqa: E402
from tests.checkpoints import draw_config, write_checkpoint  # noqa: E402
from tests.parity.test_logits import SAFE_MARGIN, Reference, named  # noqa: E402
from tests.sampled import one_in  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("error::FutureWarning")]
SEEDS = range(16)
# Largest difference over largest value, per tensor.
TOLERANCE = 1e-4
# One number each, the sum over all places of terms that cancel: float32 leaves up to 6e-4 of it,
# depending on the order in which the BLAS adds. Buffers in transformers, which trains none of them.
SCALAR_TOLERANCE = 1e-3
EOS, PAD = 1, 0


def exact(folder: Path) -> Reference:
    """The reference in float64, so that all rounding is ours: in float32 it is off by 6e-5 too."""
    reference = Reference(folder)
    reference.model.set_experts_implementation("eager")  # the grouped product knows no float64
    reference.model.double()
    for module in reference.model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = (
                None  # or torch leaves token 0 out of the gradient where it is read
            )
    return reference


def drawn_examples(seed: int, vocab_size: int, canvas_length: int, count: int = 3):
    rng = np.random.default_rng([7, seed])

    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(0, vocab_size, rng.integers(low, high + 1), dtype=np.int32)

    # Prompts on both sides of the smaller windows, answers of one to three canvases.
    return [Example(tokens(1, 24), tokens(2, 3 * canvas_length)) for _ in range(count)]


def their_loss(reference: Reference, examples, drawn: Draw, settings: TrainSettings, width: int):
    """The same objective, example by example, in torch."""
    model, total = reference.model, 0.0
    for i, example in enumerate(examples):
        fill = example.canvases(width) * width - len(example.answer)
        text = np.concatenate([example.prompt, example.answer, np.full(fill, EOS, np.int32)])
        start = len(example.prompt) + int(drawn.start[i])
        clean = text[start : start + width]
        noisy = np.where(drawn.replaced[i], drawn.noise[i], clean)
        states, _ = encode(model, text)
        targets = torch.tensor(text[1:], dtype=torch.long)
        first = len(example.prompt) - 1 if settings.mask_prompt else 0
        logits = capped(model, states[0, first:-1])
        causal = torch.nn.functional.cross_entropy(logits, targets[first:])
        _, cache = encode(model, text[:start])
        if not settings.gradients_through_context:
            with torch.no_grad():
                _, cache = encode(model, text[:start])
        thought = None
        if drawn.conditioned[i]:
            with torch.no_grad():
                thought = reference.denoise(noisy[None], cache)
        logits = reference.denoise(noisy[None], cache, thought)
        canvas = torch.nn.functional.cross_entropy(logits[0], torch.tensor(clean, dtype=torch.long))
        total = total + (canvas + settings.causal_weight * causal) / len(examples)
    return total


def encode(model, tokens: np.ndarray):
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    ids = torch.tensor(tokens, dtype=torch.long)[None]
    positions = torch.arange(len(tokens))[None]
    masks = model.model.encoder.create_masks_for_generate(
        config=model.config,
        inputs_embeds=torch.empty((*ids.shape, 0), dtype=torch.float64),
        attention_mask=torch.ones(ids.shape, dtype=torch.bool),
        position_ids=positions,
        **named(model.model.encoder.create_masks_for_generate, cache),
    )
    out = model.model.encoder(
        input_ids=ids,
        attention_mask=masks,
        position_ids=positions,
        **named(model.model.encoder.forward, cache),
    )
    return out.last_hidden_state, cache


def capped(model, states):
    cap = model.final_logit_softcapping
    return torch.tanh(model.lm_head(states) / cap) * cap


def parameters(model) -> dict:
    """Our name -> their name and the parameter. Tied ones go by the decoder's names; the layers'
    scalars are buffers there, and weights here."""
    found = {}
    scalars = [(n, b) for n, b in model.named_buffers() if n.endswith("layer_scalar")]
    for name, parameter in [*model.named_parameters(remove_duplicate=False), *scalars]:
        is_encoders = name.startswith("model.encoder") and not name.endswith("layer_scalar")
        if not is_encoders and name != "lm_head.weight":
            found[translate(name)] = (name, parameter)
    return found


def our_gradients(model, examples, drawn, settings, width):
    batch = make_batch(examples, drawn, settings, width, eos_token_id=EOS, pad_token_id=PAD)
    value_and_grad = nn.value_and_grad(model, lambda arrays: losses(model, arrays, settings)[0])
    value, grads = value_and_grad(batch.arrays())
    return float(value), {name: np.array(g) for name, g in tree_flatten(grads)}


def differences(ours: dict, theirs: dict, constant: frozenset[str] = frozenset()) -> dict:
    """Largest difference over largest value, by tensor. Tensors that the loss does not depend on
    have gradients of rounding alone; theirs are held against the largest of all."""
    assert set(ours) == set(theirs)
    largest = max(np.abs(g).max() for g in theirs.values())
    found = {}
    for name in ours:
        most = largest if name in constant else np.abs(theirs[name]).max()
        found[name] = float(np.abs(ours[name] - theirs[name]).max() / (most or 1))
    return found


def without_effect(config) -> frozenset[str]:
    """The last layer's scalars, since a norm follows; routers that choose one expert: its weight is
    1 whatever they say, and its scale also meets a norm."""
    text = config["text_config"]
    layers = text["num_hidden_layers"]
    last = (f"model.{side}.layers.{layers - 1}" for side in ("decoder", "encoder.language_model"))
    names = {f"{path}.layer_scalar" for path in last}
    if text["top_k_experts"] == 1:
        leaves = ("proj.weight", "scale", "per_expert_scale")
        names |= {f"model.decoder.layers.{i}.router.{x}" for i in range(layers) for x in leaves}
    return frozenset(names)


def cases(seed: int):
    """A checkpoint and everything to train on it; settings differ from seed to seed."""
    config = draw_config(seed)
    width, V = config["canvas_length"], config["text_config"]["vocab_size"]
    settings = TrainSettings(
        batch_size=3,
        causal_weight=(1.0, 0.3)[seed % 2],
        mask_prompt=seed % 4 == 1,
        gradients_through_context=seed % 5 != 2,
        seed=seed,
    )
    examples = drawn_examples(seed, V, width)
    drawn = draw(examples, settings, width, V, iteration=seed)
    if seed % 3 == 0:  # all of them, some of them, none of them
        drawn.conditioned[:] = seed % 2 == 0
    return config, width, settings, examples, drawn


@pytest.mark.parametrize("seed", one_in(2, SEEDS))
def test_loss_and_every_gradient_equal_those_of_torch(seed):
    config, width, settings, examples, drawn = cases(seed)
    with tempfile.TemporaryDirectory() as parent:
        folder = write_checkpoint(Path(parent) / "checkpoint", config, seed)
        reference, model = exact(folder), load_model(folder, fused=False)
    for _, parameter in parameters(reference.model).values():
        parameter.requires_grad_(True)
    for module in reference.model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = (
                None  # or torch leaves token 0 out of the gradient where it is read
            )
    loss = their_loss(reference, examples, drawn, settings, width)
    loss.backward()
    theirs = {
        ours: np.zeros(parameter.shape, np.float32)
        if parameter.grad is None
        else parameter.grad.numpy()
        for ours, (_, parameter) in parameters(reference.model).items()
    }
    if reference.take_margin() < SAFE_MARGIN:
        pytest.skip("two experts nearly tie, and either may be chosen")
    model.train()
    value, ours = our_gradients(model, examples, drawn, settings, width)
    assert value == pytest.approx(loss.item(), rel=1e-5)
    constant = without_effect(config)
    worst = differences(ours, theirs, constant)
    scalars = [worst.pop(name) for name in list(worst) if name.endswith("layer_scalar")]
    assert max(worst.values()) <= TOLERANCE, max(worst.items(), key=lambda item: item[1])
    assert max(scalars) <= SCALAR_TOLERANCE
    with as_on_gpu():
        _, as_gpus_get_it = our_gradients(model, examples, drawn, settings, width)
    apart = differences(as_gpus_get_it, ours, constant)
    assert max(d for n, d in apart.items() if not n.endswith("layer_scalar")) <= TOLERANCE
    with layers_twice(model):
        again, checkpointed = our_gradients(model, examples, drawn, settings, width)
    assert again == pytest.approx(value, rel=1e-6)
    assert max(differences(checkpointed, ours, constant).values()) <= TOLERANCE


@pytest.mark.parametrize("seed", one_in(2, SEEDS))
def test_gradients_of_adapters_equal_those_of_torch(seed):
    config, width, settings, examples, drawn = cases(seed)
    keys = (*DEFAULT_KEYS, *EXPERTS) if seed % 2 else DEFAULT_KEYS
    lora = LoraParameters(rank=2, scale=3.0, keys=keys)
    with tempfile.TemporaryDirectory() as parent:
        folder = write_checkpoint(Path(parent) / "checkpoint", config, seed)
        reference, model = exact(folder), load_model(folder, fused=False)
    add_adapters(model, num_layers=-1, lora=lora)
    rng = np.random.default_rng(seed)
    drawn_weights = {  # both factors, or every gradient of the first would be zero
        name: rng.normal(0, 0.1, array.shape).astype(np.float32)
        for name, array in tree_flatten(model.trainable_parameters())
    }
    model.update(tree_unflatten([(n, mx.array(a)) for n, a in drawn_weights.items()]))
    leaves = {
        n: torch.tensor(a, dtype=torch.float64, requires_grad=True)
        for n, a in drawn_weights.items()
    }
    originals = parameters(reference.model)
    replaced = {}
    for name in leaves:
        if not name.endswith(".lora_a"):
            continue
        module = name.removesuffix(".lora_a")
        a, b = leaves[name], leaves[module + ".lora_b"]
        original, base = originals[module + ".weight"]
        delta = b @ a if a.ndim == 3 else (a @ b).T
        replaced[original] = base.detach() + lora.scale * delta
    loss = torch.func.functional_call(
        Caller(reference, examples, drawn, settings, width),
        {f"inner.{n}": w for n, w in replaced.items()},
        (),
    )
    loss.backward()
    if reference.take_margin() < SAFE_MARGIN:
        pytest.skip("two experts nearly tie, and either may be chosen")
    theirs = {
        n: np.zeros_like(drawn_weights[n]) if t.grad is None else t.grad.numpy()
        for n, t in leaves.items()
    }
    model.train()
    value, ours = our_gradients(model, examples, drawn, settings, width)
    assert value == pytest.approx(loss.item(), rel=1e-5)
    worst = differences(ours, theirs)
    assert max(worst.values()) <= TOLERANCE, max(worst.items(), key=lambda item: item[1])


class Caller(torch.nn.Module):
    """The objective as a module, so that torch can swap its weights, tied ones too."""

    def __init__(self, reference: Reference, *arguments):
        super().__init__()
        self.inner, self.reference, self.arguments = reference.model, reference, arguments

    def forward(self):
        return their_loss(self.reference, *self.arguments)


def test_dropout_draws_the_same_when_layers_are_computed_again():
    config, width, settings, examples, drawn = cases(4)
    with tempfile.TemporaryDirectory() as parent:
        model = load_model(write_checkpoint(Path(parent) / "checkpoint", config, 4), fused=False)
    mx.random.seed(0)
    add_adapters(model, num_layers=-1, lora=LoraParameters(rank=2, scale=3.0, dropout=0.4))
    model.train()
    seeds = itertools.count(9)

    def seeded(layer, *arguments):
        mx.random.seed(next(seeds))
        return layer(*arguments)

    before, model.run_layer = model.run_layer, seeded
    value, once = our_gradients(model, examples, drawn, settings, width)
    model.run_layer = before
    with layers_twice(model, seed=9):
        again, twice = our_gradients(model, examples, drawn, settings, width)
    assert again == pytest.approx(value, rel=1e-6)
    assert max(differences(twice, once).values()) <= TOLERANCE


def test_big_vocabularies_are_taken_in_slices_with_the_same_gradients(monkeypatch):
    config, width, settings, examples, drawn = cases(4)
    with tempfile.TemporaryDirectory() as parent:
        model = load_model(write_checkpoint(Path(parent) / "checkpoint", config, 4), fused=False)
    model.train()
    value, whole = our_gradients(model, examples, drawn, settings, width)
    places = 3  # of each slice
    limit = 4 * len(examples) * config["text_config"]["vocab_size"] * places
    monkeypatch.setattr("mlx_diffgemma.train.objective._LOGITS_BYTES", limit)
    again, sliced = our_gradients(model, examples, drawn, settings, width)
    assert again == pytest.approx(value, rel=1e-6)
    assert max(differences(sliced, whole, without_effect(config)).values()) <= 1e-5
