"""Published decoder-only models as ``transformers`` runs them in float64, and the same measured in either twin.

``examine(twin, directory, model, tokens, real)`` reads what the model saved and gives the largest error of each kind:
every layer's output, logits, loss, every gradient, relative to the largest magnitude of the tensor.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import torch
import transformers
from flax import nnx

from parity_tests.helpers import Twin, _flax_leaves, _turned, random_array, to_numpy
from parity_tests.readers import build
from twinformer import pretrained
from twinformer.config import ModelConfig
from twinformer.parameters import model_parameters
from twinformer.parity.original import wide

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

Arrays = dict[str, np.ndarray]

#: a gradient below this part of the largest one is rounding
ROUNDING = 1e-13


def scattered(model_class: Any, config: Any, seed: int = 0) -> Any:
    """A model in float64 with random values everywhere: norm weights not 1 (nor 0), biases not 0."""
    config._attn_implementation = "eager"
    with wide(), torch.no_grad():
        model = model_class(config).eval()
        for i, (name, leaf) in enumerate(sorted(model.named_parameters())):
            is_vector = leaf.ndim == 1
            drawn = random_array(1000 * seed + i, *leaf.shape, scale=0.4 if is_vector else leaf.shape[-1] ** -0.5)
            about_one = is_vector and name.endswith("weight") and "Gemma" not in model_class.__name__
            leaf.copy_(torch.from_numpy(drawn + about_one))
    assert {leaf.dtype for leaf in [*model.parameters(), *model.buffers()] if leaf.is_floating_point()} == {
        torch.float64
    }
    return model


def padded(seed: int, vocabulary: int, length: int, rows: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Tokens ``[B, T]`` and a padding mask with a full row, right and left padding, and both.

    The last id of the vocabulary stands at padding, and only there: the library finds the end of a row by it, and gives
    its row of the table no gradient.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary - 1, (rows, length))
    real = np.ones((rows, length), bool)
    real[1 % rows, 2 * length // 3 :] = False
    real[2 % rows, : length // 3] = False
    if rows > 3:
        real[3, : length // 4] = False
        real[3, -(length // 4) :] = False
    tokens[~real] = vocabulary - 1
    return tokens, real


def positions_of(real: np.ndarray) -> np.ndarray:
    """Counted over real tokens."""
    return np.maximum(np.cumsum(real, axis=1) - 1, 0)


# ---- theirs


def theirs(model: Any, tokens: np.ndarray, real: np.ndarray) -> Arrays:
    """Outputs by name: ``layer 0`` (embeddings) … ``layer L``, ``output``, and with a vocabulary ``loss``; and
    ``gradient NAME`` of the loss, or of the output times fixed numbers, by published name.
    """
    body = getattr(model, model.base_model_prefix, model)
    blocks = body.h if hasattr(body, "h") else body.layers
    states: dict[str, torch.Tensor] = {}
    hooks = [blocks[0].register_forward_pre_hook(lambda _, args: states.update({"layer 0": args[0]}))]
    for i, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(lambda _, args, out, i=i: states.update({f"layer {i + 1}": out})))
    predicts = hasattr(model, "lm_head")
    given: dict[str, Any] = {"labels": torch.from_numpy(_labels(tokens, real))} if predicts else {}
    with wide():
        found = model(
            input_ids=torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(real.astype(np.int64)),
            position_ids=torch.from_numpy(positions_of(real)),
            use_cache=False,
            **given,
        )
        output = found.logits if hasattr(found, "logits") else found.last_hidden_state
        loss = found.loss if predicts else (output * torch.from_numpy(_weights(output, real))).sum()
        named = dict(model.named_parameters())
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    for hook in hooks:
        hook.remove()
    result = {name: to_numpy(state) for name, state in states.items()}
    result |= {"output": to_numpy(output)} | ({"loss": to_numpy(loss)} if predicts else {})
    return result | {f"gradient {name}": to_numpy(grad) for name, grad in zip(named, grads, strict=True)}


def _labels(tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
    """As ``transformers`` wants them: -100 where the token or the one before it is not real."""
    labels = np.full_like(tokens, -100)
    both_real = real[:, 1:] & real[:, :-1]
    labels[:, 1:][both_real] = tokens[:, 1:][both_real]
    return labels


def _weights(output: Any, real: np.ndarray) -> np.ndarray:
    """Fixed numbers for a scalar of an output; 0 at padding where the output has places."""
    weights = random_array(77, *output.shape)
    return weights * real[..., None] if output.ndim == 3 else weights


# ---- ours


def ours(twin: Twin, config: ModelConfig, tensors: Mapping[str, np.ndarray], tokens: Any, real: Any) -> Arrays:
    """The same by our names, in one of the twins; gradients by path."""
    model = build(twin, config, tensors)
    native, mask, positions = twin.array(tokens), twin.array(real), twin.array(positions_of(real))
    masks, losses = twin.file("masks"), twin.file("losses")

    def measured(model: Any) -> tuple[Any, dict[str, Any]]:
        X = model.embedding(native, positions, None)
        states = {"layer 0": X}
        for i, block in enumerate(model.stack.blocks):
            X = block(X, mask=masks.padding_mask(mask), positions=positions)
            states[f"layer {i + 1}"] = X
        output = model(native, padding_mask=mask)
        told = {"output": output}
        if config.head in ("tied", "untied"):
            logits = output[:, :-1]
            total, count = losses.cross_entropy(logits, native[:, 1:], real=mask[:, 1:] & mask[:, :-1])
            told["loss"] = loss = losses.mean_loss(total, count)
        else:
            loss = (output * twin.array(_weights(output, real))).sum()
        return loss, states | told

    if twin.name == "torch":
        loss, found = measured(model)
        leaves = dict(model.named_parameters())
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        gradients = {path: to_numpy(grad) for path, grad in zip(leaves, grads, strict=True)}
    else:
        graph, state = nnx.split(model)
        program = jax.jit(jax.value_and_grad(lambda state: measured(nnx.merge(graph, state)), has_aux=True))
        (_, found), turned = program(state)
        gradients = {path: _turned(parts, grad) for path, parts, grad in _flax_leaves(turned)}
    result = {name: to_numpy(value) for name, value in found.items()}
    return result | {f"gradient {path}": grad for path, grad in gradients.items()}


# ---- the two together


def in_our_terms(read: pretrained.Pretrained, found: Arrays) -> Arrays:
    """Gradients by published name as gradients by our path; that of a second name of a weight is added to its own."""
    family = pretrained.FAMILIES[read.family]
    shapes = {path: leaf.shape for path, leaf in model_parameters(read.config).items()}
    result = {name: value for name, value in found.items() if not name.startswith("gradient ")}
    entries = family.expected(read.config)
    for name, value in found.items():
        if not name.startswith("gradient "):
            continue
        canonical = family.canonical(name.removeprefix("gradient "))
        entry = entries[canonical if canonical in entries else family.copies[canonical]]
        parts = entry.layout.unpack(value, [shapes[path] for path in entry.ours])
        for path, part in zip(entry.ours, parts, strict=True):
            result[f"gradient {path}"] = part + result.get(f"gradient {path}", 0.0)
    return result


def errors(actual: Arrays, expected: Arrays, real: np.ndarray) -> dict[str, float]:
    """The largest error of each name, relative to the largest magnitude there; at real places only. Same names.

    A gradient that is rounding and nothing else (a bias of keys that do not turn shifts all scores of a query alike, so
    that its gradient is 0) is measured by the largest gradient of all.
    """
    steepest = max(np.abs(value).max() for name, value in expected.items() if name.startswith("gradient "))
    assert set(actual) == set(expected), sorted(set(actual) ^ set(expected))
    found = {}
    for name, wanted in expected.items():
        got = actual[name]
        assert got.shape == wanted.shape, (name, got.shape, wanted.shape)
        assert got.dtype == wanted.dtype == np.float64, (name, got.dtype, wanted.dtype)
        if wanted.ndim == 3 and not name.startswith("gradient "):
            got, wanted = got[real], wanted[real]
        assert np.isfinite(wanted).all(), name
        largest = np.abs(wanted).max()
        if name.startswith("gradient ") and largest < ROUNDING * steepest:
            largest = steepest
        assert largest > 0, name
        found[name] = float(np.abs(got - wanted).max() / largest)
    return found


def examine(
    twin: Twin, directory: Path, model: Any, tokens: np.ndarray, real: np.ndarray, expected: Arrays | None = None
) -> dict[str, float]:
    """What ``model`` saved in ``directory``, read and run by ``twin``, against the model itself."""
    read = pretrained.read(directory)
    expected = theirs(model, tokens, real) if expected is None else expected
    return errors(ours(twin, read.config, read.tensors, tokens, real), in_our_terms(read, expected), real)
