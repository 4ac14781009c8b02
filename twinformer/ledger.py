"""The ledger: every choice on which frameworks or papers differ, defined in one sentence each.

Every field of ``ModelConfig`` that is such a choice stands here once, and every choice is bound to the tests
that hold it. ``python -m twinformer.ledger`` writes the ledger as a table (docs/ledger.md).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One convention. ``fields`` are those of ModelConfig that settle it; none where it is the same for all models.

    ``tests`` are ``file::function`` in parity_tests.
    """

    name: str
    fields: tuple[str, ...]
    here: str
    tests: tuple[str, ...]


LEDGER: tuple[Choice, ...] = (
    Choice(
        "sizes",
        (
            "architecture",
            "context_length",
            "model_dim",
            "key_dim",
            "value_dim",
            "hidden_dim",
            "num_heads",
            "num_kv_heads",
            "num_layers",
            "num_encoder_layers",
            "vocab_size",
            "source_vocab_size",
        ),
        "key_dim and value_dim are per head and free of model_dim / num_heads; num_layers counts the decoder's blocks "
        "where there are two stacks; a sequence longer than context_length is an error.",
        (),
    ),
    Choice(
        "norm",
        ("norm", "norm_bias"),
        "layernorm is (x - mean) / sqrt(var + eps) * w + b with the population variance in two passes; rmsnorm is "
        "x / sqrt(mean(x^2) + eps) * w; both computed in float32 or wider.",
        (),
    ),
    Choice("norm eps", ("norm_eps",), "explicit, added inside the square root.", ()),
    Choice(
        "norm weight",
        ("norm_weight",),
        "plain multiplies by w (Llama, BERT, T5), one_plus by 1 + w summed in float32 or wider (Gemma).",
        (),
    ),
    Choice(
        "norm cast",
        ("norm_cast",),
        "after_weight multiplies by the weight before the cast back to compute_dtype (PyTorch's LayerNorm, Gemma), "
        "before_weight casts first (Llama, T5).",
        (),
    ),
    Choice(
        "norm placement",
        ("norm_placement", "final_norm"),
        "pre is x + f(norm(x)), post is norm(x + f(x)); final_norm adds one after the last block.",
        (),
    ),
    Choice(
        "activation",
        ("activation",),
        "relu, gelu (x * Phi(x), with erf), gelu_tanh (its tanh approximation) or silu; never a framework's default.",
        (),
    ),
    Choice(
        "gate",
        ("gated",),
        "gated feed-forward is down(f(gate(x)) * up(x)): the activation acts on the gate.",
        (),
    ),
    Choice(
        "biases",
        ("qkv_bias", "output_bias", "feedforward_bias", "head_bias"),
        "each group of matrices has biases or not, by name.",
        (),
    ),
    Choice(
        "attention scale",
        ("attention_scale",),
        "scores are multiplied by attention_scale, by 1/sqrt(key_dim) when it is null; 1 means none (T5).",
        (),
    ),
    Choice(
        "soft caps",
        ("attention_softcap", "head_softcap"),
        "c * tanh(x / c), for scores after the scale and before biases and masks, for logits last.",
        (),
    ),
    Choice(
        "q/k norm",
        ("qk_norm",),
        "queries and keys are normalised per head over key_dim, before the rotary turn, with norm_eps, norm_weight "
        "and norm_cast.",
        (),
    ),
    Choice("grouped heads", (), "query head a uses key/value head a // (A // G).", ()),
    Choice(
        "mask",
        (),
        "boolean True = may attend; float = added to the scores, and -inf in it hides; both broadcast to [B, A, T, S].",
        (),
    ),
    Choice("causal", (), "query i of T sees keys j <= i + S - T: aligned at the end.", ()),
    Choice(
        "window",
        ("window",),
        "a query sees itself and the w - 1 keys before it, and as many after it where the stack sees both ways.",
        (),
    ),
    Choice(
        "row with nothing to attend to",
        (),
        "its weighted sum is 0, so the layer gives its output bias, and its gradient is 0; never NaN, never the mean "
        "of the values.",
        (),
    ),
    Choice(
        "content that is hidden",
        (),
        "a key that a query may not attend to contributes nothing to it, forward and backward, whatever it holds, NaN "
        "included; a query that may attend to a non-finite row gives NaN.",
        (),
    ),
    Choice(
        "positions",
        ("positions",),
        "none; sinusoidal or learned, added to the embeddings; rotary, turning queries and keys; relative or alibi, "
        "added to the scores of self-attention.",
        (),
    ),
    Choice(
        "positions under padding",
        (),
        "counted over real tokens, left or right padded; explicit positions win.",
        (),
    ),
    Choice(
        "position offset",
        ("position_offset",),
        "added to every sinusoidal or learned position: 1 counts from one, 2 is BART's; a learned table has that many "
        "rows more.",
        (),
    ),
    Choice(
        "sinusoid",
        ("sinusoid_layout", "sinusoid_spacing"),
        "frequency 10000^(-2i/D) (textbook) or 10000^(-i/(H-1)) over H = ceil(D/2) (endpoint); sine and cosine "
        "interleaved or in halves; an odd D drops the last cosine.",
        (),
    ),
    Choice(
        "rotary",
        ("rotary_convention", "rotary_base", "rotary_dim"),
        "the first rotary_dim entries of each head turn, in pairs (i, i + R/2) (half) or (2i, 2i + 1) (interleaved); "
        "angles in float32 or wider.",
        (),
    ),
    Choice(
        "rotary scaling",
        ("rotary_scaling",),
        "none, linear, llama3 or yarn, with every number explicit; yarn's attention_factor multiplies cosine and sine.",
        (),
    ),
    Choice(
        "relative bias",
        ("relative_buckets", "relative_max_distance"),
        "T5's buckets with an exact floor, one table per stack, shared by its blocks; both ways in an encoder, one way "
        "in a decoder; none in cross-attention.",
        (),
    ),
    Choice(
        "alibi slopes",
        (),
        "2^(-8(a+1)/A) for A a power of two, else those of the power below and every other one of the power above; "
        "the bias is -slope * |distance|.",
        (),
    ),
    Choice(
        "embedding scale",
        ("embedding_scale",),
        "none unless configured; multiplies the token's row, rounded to compute_dtype; not the position.",
        (),
    ),
    Choice(
        "embedding sum",
        ("embedding_norm", "num_token_types"),
        "token + position + token type (type 0 where none is given), then the norm if there is one, then dropout.",
        (),
    ),
    Choice(
        "head",
        ("head", "share_embeddings", "head_scale"),
        "tied is h E^T with the (target's) token table, by function and never by sharing a parameter; head_scale "
        "multiplies h first; logits are in compute_dtype.",
        (),
    ),
    Choice(
        "dropout",
        ("dropout", "attention_dropout", "hidden_dropout"),
        "on sub-layer outputs and embeddings, on attention weights, on hidden units; one Philox word per element, no "
        "broadcast, from (seed, step, place); on exactly when a key is passed.",
        (),
    ),
    Choice(
        "dtypes",
        ("param_dtype", "compute_dtype"),
        "parameters are stored in one and used in the other; norm statistics, angles, scores and softmax in float32 "
        "or wider.",
        (),
    ),
    Choice("rematerialisation", ("remat",), "each block is computed again in the backward pass; no value changes.", ()),
    Choice(
        "initial weights",
        ("initializer", "initializer_std", "initializer_scale_residual"),
        "drawn in NumPy by path and seed; truncated_normal is rescaled to initializer_std; scale_residual divides the "
        "matrices that add to the residual stream by sqrt(2 L).",
        (),
    ),
    Choice(
        "token ids out of range",
        (),
        "a clear error in both; where values cannot be seen (inside a compiled function), NaN in that row.",
        (),
    ),
)


def as_markdown() -> str:
    """The ledger as a table."""
    lines = [
        "# The ledger",
        "",
        "Every choice on which frameworks or papers differ, as `twinformer/ledger.py` has it (made from it by",
        "`python -m twinformer.ledger`). A field in `code` is one of `ModelConfig`; the tests are in `parity_tests/`.",
        "",
        "| choice | fields | here | held by |",
        "|---|---|---|---|",
    ]
    for choice in LEDGER:
        fields = ", ".join(f"`{name}`" for name in choice.fields) or "always"
        tests = ", ".join(f"`{test}`" for test in choice.tests)
        here = choice.here.replace("|", "\\|")
        lines.append(f"| {choice.name} | {fields} | {here} | {tests} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(as_markdown())
