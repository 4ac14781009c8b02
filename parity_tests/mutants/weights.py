"""Weights on their way in: names, layouts, and tables used twice."""

from __future__ import annotations

from typing import Any

import numpy as np

from parity_tests.mutants.patching import Patch
from parity_tests.mutants.registry import mutant


def _loaded(patch: Patch, change: Any) -> None:
    """``change(tensors) -> tensors`` while a model is filled."""

    def wrong(load: Any) -> Any:
        def load_weights(model: Any, tensors: Any, **options: Any) -> None:
            load(model, change(dict(tensors)), **options)

        return load_weights

    patch.function("weights", "load_weights", wrong)


@mutant("W4", case="untied", culprits="embedding.tokens")
def embedding_loaded_from_the_head(patch: Patch) -> None:
    _loaded(patch, lambda tensors: tensors | {"embedding.tokens.weight": tensors["head.weight"]})


@mutant("W5", case="untied", culprits="head")
def head_left_as_it_was_drawn(patch: Patch) -> None:
    """The name is not in one framework's tree, nothing is loaded, and the initial values stay."""
    drawn = np.random.default_rng(0).normal(0, 0.02, (37, 24))
    _loaded(patch, lambda tensors: tensors | {"head.weight": drawn.astype(tensors["head.weight"].dtype)})


@mutant("W6", case="square", culprits=("*.query", "*.key", "*.value"))
def fused_projection_split_in_three(patch: Patch) -> None:
    """A fused matrix with query, key and value of each head in turn, read as all queries, all keys, all values."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        for block in ("stack.blocks.0.attention.", "stack.blocks.1.attention."):
            for leaf in ("weight", "bias"):
                names = [f"{block}{part}.{leaf}" for part in ("query", "key", "value")]
                heads = [tensors[name].reshape(6, 4, -1) for name in names]
                fused = np.stack(heads, 1).reshape(3, 24, -1)
                for name, part in zip(names, fused, strict=True):
                    tensors[name] = part.reshape(tensors[name].shape)
        return tensors

    _loaded(patch, change)


@mutant("W8", case="square", culprits=("*.query", "*.key", "*.value", "*.output", "*.up", "*.down"))
def square_matrices_transposed(patch: Patch) -> None:
    """Whether to transpose is decided by comparing shapes."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return {
            path: tensor.T if tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1] else tensor
            for path, tensor in tensors.items()
        }

    _loaded(patch, change)


@mutant("T50", case="decoder", culprits="*.attention_norm")
def norms_of_two_layers_exchanged(patch: Patch) -> None:
    first, second = "stack.blocks.0.attention_norm.weight", "stack.blocks.1.attention_norm.weight"
    _loaded(patch, lambda tensors: tensors | {first: tensors[second], second: tensors[first]})


@mutant("T51", case="llama", culprits=("*.gate", "*.up"))
def gate_and_up_loaded_the_wrong_way(patch: Patch) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        def other(path: str) -> str:
            return path.replace(".gate.", ".?.").replace(".up.", ".gate.").replace(".?.", ".up.")

        return {path: tensors[other(path)] for path in tensors}

    _loaded(patch, change)


@mutant("T52", case="llama", culprits=("*.query", "*.key"))
def rotary_rows_permuted(patch: Patch) -> None:
    """The rows of queries and keys put in the order that the other rotary convention wants."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        order = np.array([0, 2, 4, 1, 3, 5])
        for path, tensor in tensors.items():
            if ".query." in path or ".key." in path:
                tensors[path] = tensor.reshape(-1, 6, tensor.shape[-1])[:, order].reshape(tensor.shape)
        return tensors

    _loaded(patch, change)


@mutant("T53", case="decoder", culprits=("*.up", "*.down", "*.query", "*.key", "*.value", "*.output"))
def biases_left_at_zero(patch: Patch) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        ends = ("up.bias", "down.bias", "query.bias", "key.bias", "value.bias", "output.bias")
        return {path: tensor * 0 if path.endswith(ends) else tensor for path, tensor in tensors.items()}

    _loaded(patch, change)


@mutant("T54", case="encoder-decoder", culprits=("decoder.blocks.*.cross_attention.*",))
def cross_attention_loaded_from_self_attention(patch: Patch) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return {path: tensors[path.replace(".cross_attention.", ".attention.")] for path in tensors}

    _loaded(patch, change)


@mutant("W10", case="decoder", culprits=("embedding.tokens",))
def no_gradient_for_the_padding_row(patch: Patch) -> None:
    """Row 1 counts as padding: what it learns is thrown away."""

    def wrong(call: Any) -> Any:
        def table(self: Any, ids: Any) -> Any:
            Y = call(self, ids)
            return patch.xp.where((ids == 1)[..., None], patch.stopped(Y), Y)

        return table

    patch.method("embeddings", "TokenEmbedding", wrong)
