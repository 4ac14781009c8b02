"""Norms: eps, variance, the weight, and where the norms stand."""

from __future__ import annotations

from typing import Any

from parity_tests.mutants.patching import Patch
from parity_tests.mutants.registry import mutant
from twinformer.config import StackConfig

_NORMS = ("*_norm", "*.norm")


@mutant("N1", case="llama", culprits=_NORMS)
def another_eps(patch: Patch) -> None:
    def wrong(make: Any) -> Any:
        return lambda width, config: make(width, config.replace(norm_eps=1e-6))

    patch.function("norms", "make_norm", wrong)


@mutant("N2", case="decoder", culprits=_NORMS)
def default_eps_of_the_other_framework(patch: Patch) -> None:
    """The eps of the configuration is not handed on: 1e-6 in Flax, here for 1e-5."""

    def wrong(init: Any) -> Any:
        return lambda self, width, **options: init(self, width, **(options | {"eps": 1e-6}))

    patch.method("norms", "LayerNorm", wrong, "__init__")


def _fast(patch: Patch, clipped: bool) -> Any:
    """Layer norm with the variance as E[x²] - E[x]²."""

    def wrong(original: Any) -> Any:
        def call(self: Any, X: Any) -> Any:
            xp = patch.xp
            wide = "float64" if "float64" in str(self.compute_dtype) else "float32"
            x = patch.cast(X, wide)
            mean, square = x.mean(-1)[..., None], (x * x).mean(-1)[..., None]
            variance = square - mean * mean
            if clipped:
                variance = variance * (variance > 0)
            weight, bias = (self.weight, self.bias) if patch.is_torch else (self.scale[...], self.bias[...])
            Y = (x - mean) / xp.sqrt(variance + self.eps) * patch.cast(weight, wide) + patch.cast(bias, wide)
            return patch.cast(Y, str(self.compute_dtype).removeprefix("torch."))

        return call

    return wrong


@mutant("N4", case="alibi", culprits=_NORMS)
def variance_in_one_pass(patch: Patch) -> None:
    patch.method("norms", "LayerNorm", _fast(patch, clipped=True))


@mutant("N5", case="constant-rows", culprits=_NORMS, rungs=("forward",))
def negative_variance(patch: Patch) -> None:
    patch.method("norms", "LayerNorm", _fast(patch, clipped=False))


@mutant("N8", case="gemma", culprits=_NORMS)
def one_plus_dropped(patch: Patch) -> None:
    patch.function("norms", "_make", lambda make: lambda n, w, c: make(n, w, c.replace(norm_weight="plain")))


@mutant("T1", case="gemma", culprits=_NORMS)
def one_plus_twice(patch: Patch) -> None:
    def wrong(load: Any) -> Any:
        def load_weights(model: Any, tensors: Any, **options: Any) -> None:
            load(
                model, {p: t + 1 if p.rpartition(".")[0].endswith("norm") else t for p, t in tensors.items()}, **options
            )

        return load_weights

    patch.function("weights", "load_weights", wrong)


@mutant("T2", case="decoder", culprits=_NORMS)
def sample_variance(patch: Patch) -> None:
    """n - 1 in the place of n."""

    def wrong(call: Any) -> Any:
        def layer_norm(self: Any, X: Any) -> Any:
            n = self.width
            x = X - X.mean(-1)[..., None]
            population = (x * x).mean(-1)[..., None]
            shrunk = ((population + self.eps) / (population * n / (n - 1) + self.eps)) ** 0.5
            bias = self.bias if patch.is_torch else self.bias[...]
            return (call(self, X) - bias) * shrunk + bias

        return layer_norm

    patch.method("norms", "LayerNorm", wrong)


@mutant("T3", case="llama", culprits=_NORMS)
def eps_outside_the_root(patch: Patch) -> None:
    def wrong(call: Any) -> Any:
        def rms_norm(self: Any, X: Any) -> Any:
            square = (X * X).mean(-1)[..., None]
            return call(self, X) * (square + self.eps) ** 0.5 / (square**0.5 + self.eps)

        return rms_norm

    patch.method("norms", "RMSNorm", wrong)


@mutant("T4", case="decoder", culprits="stack")
def final_norm_missing(patch: Patch) -> None:
    def wrong(call: Any) -> Any:
        def stack(self: Any, *args: Any, **options: Any) -> Any:
            norm, self.final_norm = self.final_norm, None
            try:
                return call(self, *args, **options)
            finally:
                self.final_norm = norm

        return stack

    patch.method("stack", "TransformerStack", wrong)


@mutant("T5", case="decoder", culprits="stack.blocks.*")
def post_norm_for_pre_norm(patch: Patch) -> None:
    _placed(patch, "post")


@mutant("T6", case="bert", culprits="stack.blocks.*")
def pre_norm_for_post_norm(patch: Patch) -> None:
    _placed(patch, "pre")


def _placed(patch: Patch, placement: str) -> None:
    def wrong(init: Any) -> Any:
        def block(self: Any, config: StackConfig, **options: Any) -> None:
            init(self, config.replace(norm_placement=placement), **options)

        return block

    patch.method("block", "Block", wrong, "__init__")


@mutant("T7", case="gemma", culprits="*.attention")
def query_norm_forgotten(patch: Patch) -> None:
    def wrong(call: Any) -> Any:
        def attention(self: Any, *args: Any, **options: Any) -> Any:
            norm, self.query_norm = self.query_norm, None
            try:
                return call(self, *args, **options)
            finally:
                self.query_norm = norm

        return attention

    patch.method("attention", "AttentionLayer", wrong)


@mutant("T8", case="gemma", culprits="*.attention")
def query_and_key_norms_exchanged(patch: Patch) -> None:
    def wrong(call: Any) -> Any:
        def attention(self: Any, *args: Any, **options: Any) -> Any:
            query, key = self.query_norm, self.key_norm
            self.query_norm, self.key_norm = key, query
            try:
                return call(self, *args, **options)
            finally:
                self.query_norm, self.key_norm = query, key

        return attention

    patch.method("attention", "AttentionLayer", wrong)


@mutant("T9", case="bert", culprits="embedding")
def embedding_norm_missing(patch: Patch) -> None:
    def wrong(call: Any) -> Any:
        def embeddings(self: Any, *args: Any, **options: Any) -> Any:
            norm, self.norm = self.norm, None
            try:
                return call(self, *args, **options)
            finally:
                self.norm = norm

        return embeddings

    patch.method("embeddings", "Embeddings", wrong)
