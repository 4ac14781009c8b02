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

    ``tests`` are ``file::function`` in parity_tests, ``mutants`` the faults of the catalogue that break it.
    """

    name: str
    fields: tuple[str, ...]
    here: str
    tests: tuple[str, ...]
    mutants: tuple[str, ...] = ()


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
        (
            "test_config.py::test_wrong_value",
            "test_attention.py::test_self_attention_against_loops",
        ),
        mutants=("T16", "T17", "W6", "W8"),
    ),
    Choice(
        "norm",
        ("norm", "norm_bias"),
        "layernorm is (x - mean) / sqrt(var + eps) * w + b with the population variance in two passes; rmsnorm is "
        "x / sqrt(mean(x^2) + eps) * w; both computed in float32 or wider.",
        (
            "test_norms.py::test_against_the_equations",
            "test_norms.py::test_population_variance",
            "test_norms.py::test_variance_in_two_passes",
        ),
        mutants=("N4", "N5", "N9", "T2", "T72"),
    ),
    Choice(
        "norm eps",
        ("norm_eps",),
        "explicit, added inside the square root.",
        ("test_norms.py::test_eps",),
        mutants=("N1", "N2", "T3"),
    ),
    Choice(
        "norm weight",
        ("norm_weight",),
        "plain multiplies by w (Llama, BERT, T5), one_plus by 1 + w summed in float32 or wider (Gemma).",
        ("test_norms.py::test_one_plus_is_summed_wide",),
        mutants=("N8", "N7", "T1"),
    ),
    Choice(
        "norm cast",
        ("norm_cast",),
        "after_weight multiplies by the weight before the cast back to compute_dtype (PyTorch's LayerNorm, Gemma), "
        "before_weight casts first (Llama, T5).",
        ("test_norms.py::test_place_of_the_cast",),
        mutants=("N6", "N11"),
    ),
    Choice(
        "norm placement",
        ("norm_placement", "final_norm"),
        "pre is x + f(norm(x)), post is norm(x + f(x)), sandwich is x + norm2(f(norm(x))) (Gemma 2 and 3); final_norm "
        "adds one after the last block.",
        (
            "test_block.py::test_against_torch_nn",
            "test_block.py::test_sandwich_norms",
            "test_stack.py::test_without_final_norm",
        ),
        mutants=("T4", "T5", "T6", "T63", "T129"),
    ),
    Choice(
        "activation",
        ("activation",),
        "relu, gelu (x * Phi(x), with erf), gelu_tanh (its tanh approximation) or silu; never a framework's default.",
        (
            "test_feedforward.py::test_activate",
            "test_feedforward.py::test_activations_are_told_apart",
        ),
        mutants=("G1", "G2", "G3", "G4", "G5", "T10", "T12", "T13"),
    ),
    Choice(
        "gate",
        ("gated",),
        "gated feed-forward is down(f(gate(x)) * up(x)): the activation acts on the gate.",
        ("test_feedforward.py::test_against_the_equations",),
        mutants=("T11", "T51"),
    ),
    Choice(
        "biases",
        ("qkv_bias", "output_bias", "feedforward_bias", "head_bias"),
        "each group of matrices has biases or not, by name.",
        (
            "test_attention.py::test_against_torch_nn",
            "test_linear.py::test_without_bias",
        ),
        mutants=("A16", "T25", "T53"),
    ),
    Choice(
        "attention scale",
        ("attention_scale",),
        "scores are multiplied by attention_scale, by 1/sqrt(key_dim) when it is null; 1 means none (T5).",
        ("test_attention.py::test_by_hand_scale",),
        mutants=("A1", "A2", "A3", "A5"),
    ),
    Choice(
        "soft caps",
        ("attention_softcap", "head_softcap"),
        "c * tanh(x / c), for scores after the scale and before biases and masks, for logits last.",
        (
            "test_attention.py::test_by_hand_softcap",
            "test_embeddings.py::test_unembed_softcap_is_wide",
        ),
        mutants=("T18", "T19", "T58"),
    ),
    Choice(
        "q/k norm",
        ("qk_norm",),
        "queries and keys are normalised per head over key_dim, before the rotary turn, with norm_eps, norm_weight "
        "and norm_cast.",
        (
            "test_attention.py::test_self_attention_against_loops",
            "test_norms.py::test_make_head_norm",
        ),
        mutants=("T7", "T8"),
    ),
    Choice(
        "grouped heads",
        (),
        "query head a uses key/value head a // (A // G).",
        ("test_attention.py::test_by_hand_four_heads_share_two_keys",),
        mutants=("A7", "A9", "T23"),
    ),
    Choice(
        "mask",
        (),
        "boolean True = may attend; float = added to the scores, and -inf in it hides; both broadcast to [B, A, T, S].",
        (
            "test_attention.py::test_by_hand_additive_mask",
            "test_masks.py::test_softmax_rows",
        ),
        mutants=("M5", "M6", "M7", "M11", "M12", "M13", "M14", "M15", "T32"),
    ),
    Choice(
        "causal",
        (),
        "query i of T sees keys j <= i + S - T: aligned at the end.",
        (
            "test_masks.py::test_causal_by_hand",
            "test_masks.py::test_causal_mask",
        ),
        mutants=("M21", "T30", "T31"),
    ),
    Choice(
        "window",
        ("window",),
        "a query sees itself and the w - 1 keys before it, and as many after it where the stack sees both ways.",
        (
            "test_masks.py::test_window_by_hand",
            "test_attention.py::test_by_hand_causal_window",
        ),
        mutants=("M16", "T27", "T28", "T29"),
    ),
    Choice(
        "blocks with the window",
        ("window_layers", "window_rotary_base"),
        "window_layers names the blocks that have the window, null means all; window_rotary_base is the rotary base of "
        "those blocks, which are not scaled then (Gemma 3).",
        (
            "test_stack.py::test_window_layers",
            "test_stack.py::test_window_rotary_base",
        ),
        mutants=("T130", "T131"),
    ),
    Choice(
        "row with nothing to attend to",
        (),
        "its weighted sum is 0, so the layer gives its output bias, and its gradient is 0; never NaN, never the mean "
        "of the values.",
        (
            "test_attention.py::test_nothing_to_attend_to",
            "test_attention.py::test_twins_agree_on_empty_rows",
        ),
        mutants=("M1", "M3", "M4", "T26"),
    ),
    Choice(
        "content that is hidden",
        (),
        "a key that a query may not attend to contributes nothing to it, forward and backward, whatever it holds, NaN "
        "included; a query that may attend to a non-finite row gives NaN.",
        (
            "test_attention.py::test_hidden_content_does_not_leak",
            "test_attention.py::test_future_does_not_leak_under_causal",
            "test_attention.py::test_visible_nan_shows",
        ),
        mutants=("M2",),
    ),
    Choice(
        "positions",
        ("positions",),
        "none; sinusoidal or learned, added to the embeddings; rotary, turning queries and keys; relative or alibi, "
        "added to the scores of self-attention.",
        (
            "test_stack.py::test_position_bias_is_added_once_in_every_block",
            "test_embeddings.py::test_against_the_formula",
        ),
        mutants=("T49", "T73"),
    ),
    Choice(
        "positions under padding",
        ("position_counting",),
        "counted over real tokens, left or right padded (real), or over all places of a row, padding included (places: "
        "BERT, DistilBERT, BART, mBART, Marian, T5, mT5 as published); explicit positions win.",
        (
            "test_models.py::test_padding_on_either_side_is_no_padding",
            "test_models.py::test_places_are_counted_with_their_padding",
            "test_generation_witness.py::test_places_stay_where_they_are",
            "test_models.py::test_explicit_positions",
        ),
        mutants=("P1", "P2"),
    ),
    Choice(
        "position offset",
        ("position_offset",),
        "added to every sinusoidal or learned position: 1 counts from one, 2 is BART's; a learned table has that many "
        "rows more.",
        ("test_positions.py::test_offset",),
        mutants=("T33", "T35"),
    ),
    Choice(
        "sinusoid",
        ("sinusoid_layout", "sinusoid_spacing"),
        "frequency 10000^(-2i/D) (textbook) or 10000^(-i/(H-1)) over H = ceil(D/2) (endpoint); sine and cosine "
        "interleaved or in halves; an odd D drops the last cosine.",
        (
            "test_positions.py::test_sinusoid_by_hand",
            "test_positions.py::test_sinusoids",
        ),
        mutants=("P13", "T34"),
    ),
    Choice(
        "rotary",
        ("rotary_convention", "rotary_base", "rotary_dim"),
        "the first rotary_dim entries of each head turn, in pairs (i, i + R/2) (half) or (2i, 2i + 1) (interleaved); "
        "angles in float32 or wider.",
        (
            "test_positions.py::test_rotary_by_hand",
            "test_positions.py::test_rotary_angles_are_wide",
        ),
        mutants=("P3", "P5", "P6", "P7", "P9", "T36", "T37", "T38", "T42", "T52"),
    ),
    Choice(
        "rotary scaling",
        ("rotary_scaling",),
        "none, linear, llama3 or yarn, with every number explicit; yarn's attention_factor multiplies cosine and sine.",
        ("test_positions.py::test_scaled_frequencies",),
        mutants=("T39", "T40", "T41"),
    ),
    Choice(
        "relative bias",
        ("relative_buckets", "relative_max_distance"),
        "T5's buckets with an exact floor, one table per stack, shared by its blocks; both ways in an encoder, one way "
        "in a decoder; none in cross-attention.",
        (
            "test_positions.py::test_bucket_floor_is_exact",
            "test_positions.py::test_buckets_against_t5",
            "test_stack.py::test_cross_attention_has_no_position_bias",
        ),
        mutants=("A17", "A18", "T43", "T44", "T45"),
    ),
    Choice(
        "alibi slopes",
        (),
        "2^(-8(a+1)/A) for A a power of two, else those of the power below and every other one of the power above; "
        "the bias is -slope * |distance|.",
        ("test_positions.py::test_alibi_slopes",),
        mutants=("T46", "T47", "T48"),
    ),
    Choice(
        "embedding scale",
        ("embedding_scale",),
        "none unless configured; multiplies the token's row, rounded to compute_dtype; not the position.",
        ("test_embeddings.py::test_scale_is_rounded_to_the_compute_dtype",),
        mutants=("T55", "T56", "T62", "W1"),
    ),
    Choice(
        "embedding sum",
        ("embedding_norm", "num_token_types"),
        "token + position + token type (type 0 where none is given), then the norm if there is one, then dropout.",
        ("test_embeddings.py::test_against_the_formula",),
        mutants=("T9", "T57", "T74"),
    ),
    Choice(
        "head",
        ("head", "share_embeddings", "head_scale"),
        "tied is h E^T with the (target's) token table, by function and never by sharing a parameter; head_scale "
        "multiplies h first; logits are in compute_dtype.",
        (
            "test_models.py::test_heads",
            "test_models.py::test_shared_embeddings",
        ),
        mutants=("T59", "T60", "T61", "W4", "W5", "W11"),
    ),
    Choice(
        "head of masked tokens",
        ("head_transform",),
        "norm(act(W h + b)) before the logits, with the model's activation and norm (BERT, RoBERTa).",
        ("test_heads.py::test_transform",),
        mutants=("T132",),
    ),
    Choice(
        "labels and sentence vectors",
        ("num_labels", "pool", "pooler", "pool_normalize"),
        "pooled and sequence heads take one vector of the real tokens of a row, padding on either side: first, last, "
        "mean or max, 0 where there is none; then a dense layer with tanh or relu; pool_normalize divides by the L2 "
        "norm; a tokens head labels every token.",
        (
            "test_heads.py::test_pools",
            "test_heads.py::test_labels",
        ),
        mutants=("T133",),
    ),
    Choice(
        "dropout",
        ("dropout", "attention_dropout", "hidden_dropout", "embedding_dropout", "head_dropout"),
        "on sub-layer outputs, attention weights, hidden units, embeddings (embedding_dropout null: as dropout) and "
        "before the matrix of labels; one Philox word per element, no broadcast, from (seed, step, place); on exactly "
        "when a key is passed.",
        (
            "test_heads.py::test_dropout",
            "test_embeddings.py::test_embedding_dropout",
            "test_dropout.py::test_known_answer_of_each_twin",
            "test_dropout.py::test_one_word_per_element",
            "test_models.py::test_keys_go_where_the_contract_says",
        ),
        mutants=("A12", "A13", "A14", "T65", "T66", "T67", "T68", "T69", "T70", "X9"),
    ),
    Choice(
        "dtypes",
        ("param_dtype", "compute_dtype"),
        "parameters are stored in one and used in the other; norm statistics, angles, scores and softmax in float32 "
        "or wider.",
        (
            "test_norms.py::test_statistics_are_float32_in_16_bits",
            "test_linear.py::test_weights_and_input_are_rounded_to_compute_dtype",
        ),
        mutants=("T71",),
    ),
    Choice(
        "rematerialisation",
        ("remat",),
        "each block is computed again in the backward pass; no value changes.",
        ("test_stack.py::test_remat_changes_nothing",),
    ),
    Choice(
        "loop over blocks",
        ("scan_layers",),
        "in Flax, blocks that are built alike run as one compiled loop, with their weights put together at its "
        "beginning: compiled sooner, and on a CPU faster to train. PyTorch has nothing like it. No value changes.",
        ("test_stack.py::test_a_loop_over_blocks_changes_nothing",),
    ),
    Choice(
        "initial weights",
        ("initializer", "initializer_std", "initializer_scale_residual"),
        "drawn in NumPy by path and seed; truncated_normal is rescaled to initializer_std; scale_residual divides the "
        "matrices that add to the residual stream by sqrt(2 L).",
        (
            "test_initializers.py::test_models_hold_the_drawn_bits",
            "test_initializers.py::test_truncated_normal_has_the_asked_for_standard_deviation",
            "test_initializers.py::test_residual_scale_of_a_model_is_gpt2s",
        ),
    ),
    Choice(
        "token ids out of range",
        (),
        "a clear error in both; where values cannot be seen (inside a compiled function), NaN in that row.",
        ("test_errors.py::test_a_wrong_call", "test_errors.py::test_ids_out_of_range_give_nan_rows_when_traced"),
        mutants=("P14",),
    ),
)


def as_markdown() -> str:
    """The ledger as a table."""
    lines = [
        "# The ledger",
        "",
        "Every choice on which frameworks or papers differ, as `twinformer/ledger.py` has it (made from it by",
        "`python -m twinformer.ledger`). A field in `code` is one of `ModelConfig`. The tests are in `parity_tests/`,",
        "the faults that break a choice in `parity_tests/mutants/catalogue.tsv`: `twinformer mutants` plants them.",
        "",
        "| choice | fields | here | held by | broken by |",
        "|---|---|---|---|---|",
    ]
    for choice in LEDGER:
        fields = ", ".join(f"`{name}`" for name in choice.fields) or "always"
        tests = ", ".join(f"`{test}`" for test in choice.tests)
        here = choice.here.replace("|", "\\|")
        faults = ", ".join(choice.mutants)
        lines.append(f"| {choice.name} | {fields} | {here} | {tests} | {faults} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(as_markdown())
