"""Settings of well-known checkpoints, as their files hold them: read without a remainder.

No weights are here. What is compared is the number of parameters that each model is known to have, and the choices
that its paper or card states.
"""

import math

import pytest

from twinformer import pretrained
from twinformer.config import RotaryScaling
from twinformer.parameters import model_parameters
from twinformer.pretrained import published

_USUAL = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
}


def _sizes(V, D, F, L, A, G, N):
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    return dict(zip([*names.split(), "max_position_embeddings"], (V, D, F, L, A, G, N), strict=True))


def _two_stacks(V, D, L, F, A):
    sizes = {"vocab_size": V, "d_model": D, "max_position_embeddings": 1024, "init_std": 0.02, "num_hidden_layers": L}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_{name}": size for name, size in (("layers", L), ("ffn_dim", F), ("attention_heads", A))}
        sizes |= {f"{side}_layerdrop": 0.0}
    rates = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.0, "is_encoder_decoder": True}
    return {**sizes, **rates, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "use_cache": True}


#: name -> (family, settings, parameters, some of our choices)
KNOWN = {
    "gpt2": (
        "gpt2",
        {
            "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"],
            **{name: 0.1 for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout")},
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05,
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "summary_activation": None,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50257,
        },
        124_439_808,
        {"head": "tied", "hidden_dim": 3072, "activation": "gelu_tanh", "key_dim": 64},
    ),
    "Llama 2, 7B": (
        "llama",
        {**_USUAL, **_sizes(32000, 4096, 11008, 32, 32, 32, 4096), "rms_norm_eps": 1e-05, "pretraining_tp": 1}
        | {"architectures": ["LlamaForCausalLM"], "rope_scaling": None, "tie_word_embeddings": False},
        6_738_415_616,
        {"head": "untied", "rotary_base": 10000.0, "norm_eps": 1e-05, "rotary_scaling": RotaryScaling()},
    ),
    "Llama 3.1, 8B": (
        "llama",
        {
            **_USUAL,
            **_sizes(128256, 4096, 14336, 32, 32, 8, 131072),
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
        },
        8_030_261_248,
        {
            "rotary_base": 500000.0,
            "rotary_scaling": RotaryScaling(kind="llama3", factor=8.0, original_context_length=8192),
        },
    ),
    "Mistral, 7B": (
        "mistral",
        {**_USUAL, **_sizes(32000, 4096, 14336, 32, 32, 8, 32768), "rms_norm_eps": 1e-05, "rope_theta": 10000.0}
        | {"architectures": ["MistralForCausalLM"], "sliding_window": 4096, "tie_word_embeddings": False},
        7_241_732_096,
        {"window": 4096, "window_layers": None, "num_kv_heads": 8},
    ),
    "Qwen2.5, 0.5B": (
        "qwen2",
        {
            **_USUAL,
            **_sizes(151936, 896, 4864, 24, 14, 2, 32768),
            "architectures": ["Qwen2ForCausalLM"],
            "max_window_layers": 24,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_mrope": False,
            "use_sliding_window": False,
        },
        494_032_768,
        {"window": None, "qkv_bias": True, "output_bias": False, "head": "tied"},
    ),
    "Qwen3, 0.6B": (
        "qwen3",
        {
            **_USUAL,
            **_sizes(151936, 1024, 3072, 28, 16, 8, 40960),
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "head_dim": 128,
            "max_window_layers": 28,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
        596_049_920,
        {"qk_norm": "rmsnorm", "key_dim": 128, "rotary_base": 1000000.0},
    ),
    "Gemma, 2B": (
        "gemma",
        {
            **_USUAL,
            **_sizes(256000, 2048, 16384, 18, 8, 1, 8192),
            "architectures": ["GemmaForCausalLM"],
            "attention_bias": False,
            "head_dim": 256,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 10000.0,
        },
        2_506_172_416,
        {"activation": "gelu_tanh", "embedding_scale": math.sqrt(2048), "norm_weight": "one_plus", "head": "tied"},
    ),
    "Gemma 2, 2B": (
        "gemma2",
        {
            **_USUAL,
            **_sizes(256000, 2304, 9216, 26, 8, 4, 8192),
            "architectures": ["Gemma2ForCausalLM"],
            "attention_bias": False,
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
        },
        2_614_341_888,
        {"window": 4096, "window_layers": tuple(range(0, 26, 2)), "attention_softcap": 50.0, "head_softcap": 30.0},
    ),
    "Gemma 3, 1B": (
        "gemma3_text",
        {
            **{name: value for name, value in _USUAL.items() if name != "hidden_act"},
            **_sizes(262144, 1152, 6912, 26, 4, 1, 32768),
            "architectures": ["Gemma3ForCausalLM"],
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
        999_885_952,
        {
            "window_layers": tuple(layer for layer in range(26) if layer % 6 != 5),
            "rotary_base": 1000000.0,
            "window_rotary_base": 10000.0,
            "norm_placement": "sandwich",
        },
    ),
    "Phi-3 mini": (
        "phi3",
        {
            **_USUAL,
            **_sizes(32064, 3072, 8192, 32, 32, 32, 4096),
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
            "embd_pdrop": 0.0,
            "original_max_position_embeddings": 4096,
            "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
        },
        3_821_079_552,
        {"window": 2047, "rotary_dim": 96, "gated": True},
    ),
}


KNOWN |= {
    "DistilBERT, uncased": (
        "distilbert",
        {
            "activation": "gelu",
            "architectures": ["DistilBertForMaskedLM"],
            "attention_dropout": 0.1,
            "dropout": 0.1,
            "qa_dropout": 0.1,
            "seq_classif_dropout": 0.2,
            "dim": 768,
            "hidden_dim": 3072,
            "n_heads": 12,
            "n_layers": 6,
            "vocab_size": 30522,
            "initializer_range": 0.02,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "sinusoidal_pos_embds": False,
            "tie_weights_": True,
            "transformers_version": "4.10.0.dev0",
        },
        66_985_530,
        {"head": "tied", "head_transform": True, "norm_eps": 1e-12, "position_counting": "places"},
    ),
    "mT5, small": (
        "mt5",
        {
            "architectures": ["MT5ForConditionalGeneration"],
            "d_ff": 1024,
            "d_kv": 64,
            "d_model": 512,
            "num_layers": 8,
            "num_decoder_layers": 8,
            "num_heads": 6,
            "decoder_start_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "dropout_rate": 0.1,
            "initializer_factor": 1.0,
            "layer_norm_epsilon": 1e-06,
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": True,
            "output_past": True,
            "relative_attention_num_buckets": 32,
            "tie_word_embeddings": False,
            "tokenizer_class": "T5Tokenizer",
            "use_cache": True,
            "vocab_size": 250112,
        },
        300_176_768,
        {"head": "untied", "head_scale": None, "gated": True, "activation": "gelu_tanh"},
    ),
    "mBART, 50 languages": (
        "mbart",
        {
            **_two_stacks(250054, 1024, 12, 4096, 16),
            "activation_function": "relu",
            "add_bias_logits": False,
            "add_final_layer_norm": True,
            "architectures": ["MBartForConditionalGeneration"],
            "classif_dropout": 0.0,
            "classifier_dropout": 0.0,
            "decoder_start_token_id": 2,
            "early_stopping": True,
            "forced_eos_token_id": 2,
            "gradient_checkpointing": False,
            "normalize_before": True,
            "normalize_embedding": True,
            "num_beams": 5,
            "output_past": True,
            "scale_embedding": True,
            "static_position_embeddings": False,
            "tokenizer_class": "MBart50Tokenizer",
        },
        610_879_488 + 250_054,  # the bias of the logits, which the library does not count
        {"norm_placement": "pre", "final_norm": True, "embedding_norm": True, "embedding_scale": 32.0},
    ),
    "M2M-100, 418M": (
        "m2m_100",
        {
            **_two_stacks(128112, 1024, 12, 4096, 16),
            "activation_function": "relu",
            "architectures": ["M2M100ForConditionalGeneration"],
            "decoder_layerdrop": 0.05,
            "decoder_start_token_id": 2,
            "early_stopping": True,
            "encoder_layerdrop": 0.05,
            "gradient_checkpointing": False,
            "num_beams": 5,
            "scale_embedding": True,
        },
        483_905_536,
        {"sinusoid_spacing": "endpoint", "position_offset": 2, "position_counting": "real", "head_bias": False},
    ),
    "NLLB-200, distilled, 600M": (
        "m2m_100",
        {
            **_two_stacks(256206, 1024, 12, 4096, 16),
            "activation_function": "relu",
            "architectures": ["M2M100ForConditionalGeneration"],
            "decoder_start_token_id": 2,
            "max_length": 200,
            "scale_embedding": True,
            "tokenizer_class": "NllbTokenizer",
        },
        615_073_792,
        {"norm_placement": "pre", "final_norm": True, "embedding_norm": False, "head": "tied"},
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_settings_are_read_whole(name):
    family, settings, parameters, choices = KNOWN[name]
    config, unknown = published.translate(pretrained.FAMILIES[family], {**settings, "model_type": family})
    assert unknown == []
    assert {choice: getattr(config, choice) for choice in choices} == choices
    assert sum(math.prod(leaf.shape) for leaf in model_parameters(config).values()) == parameters
