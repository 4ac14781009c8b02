"""Tiny BERTs for the tests: as ``transformers`` writes them, and as a configuration of ours."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

from parity_tests.helpers import random_array
from twinformer.config import ModelConfig
from twinformer.parameters import model_parameters

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

#: odd sizes; (D, A, F, L, V, N, token types, activation, eps)
TINY = {
    "small": dict(
        hidden_size=24,
        num_attention_heads=3,
        intermediate_size=40,
        num_hidden_layers=2,
        vocab_size=37,
        max_position_embeddings=19,
        type_vocab_size=3,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
    ),
    "narrow": dict(
        hidden_size=10,
        num_attention_heads=5,
        intermediate_size=7,
        num_hidden_layers=1,
        vocab_size=11,
        max_position_embeddings=9,
        type_vocab_size=1,
        hidden_act="relu",
        layer_norm_eps=1e-3,
    ),
    "tanh": dict(
        hidden_size=15,
        num_attention_heads=1,
        intermediate_size=33,
        num_hidden_layers=3,
        vocab_size=23,
        max_position_embeddings=12,
        type_vocab_size=2,
        hidden_act="gelu_new",
        layer_norm_eps=1e-5,
    ),
    "silu": dict(
        hidden_size=12,
        num_attention_heads=2,
        intermediate_size=12,
        num_hidden_layers=1,
        vocab_size=13,
        max_position_embeddings=8,
        type_vocab_size=2,
        hidden_act="swish",
        layer_norm_eps=1e-6,
    ),
}


def scattered(model_class=transformers.BertModel, seed=0, dtype=torch.float32, **settings):
    """A BERT with random values everywhere: norm weights not 1, biases not 0, token types apart."""
    model = model_class(transformers.BertConfig(**settings))
    with torch.no_grad():
        for i, (name, leaf) in enumerate(sorted(model.named_parameters())):
            drawn = random_array(100 * seed + i, *leaf.shape, scale=0.5 if leaf.ndim == 1 else leaf.shape[-1] ** -0.5)
            leaf.copy_(torch.from_numpy(drawn + ("LayerNorm.weight" in name)))
    return model.to(dtype).eval()


def tiny_directory(place, name="small", **changes) -> Path:
    scattered(**TINY[name] | changes).save_pretrained(place)
    return Path(place)


def edit_tensors(directory, change):
    file = Path(directory) / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def edit_config(directory, **changes):
    """Set fields of config.json; ``...`` removes one."""
    file = Path(directory) / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


#: one that the family can express
CONFIG = ModelConfig(
    architecture="encoder",
    vocab_size=11,
    context_length=7,
    model_dim=6,
    key_dim=3,
    hidden_dim=5,
    num_heads=2,
    num_layers=2,
    norm_eps=1e-12,
    norm_placement="post",
    final_norm=False,
    activation="gelu",
    qkv_bias=True,
    output_bias=True,
    positions="learned",
    position_counting="places",
    num_token_types=2,
    embedding_norm=True,
    head="none",
)


def leaves_of(config, dtype=np.float32):
    return {
        path: random_array(i, *leaf.shape).astype(dtype)
        for i, (path, leaf) in enumerate(model_parameters(config).items())
    }
