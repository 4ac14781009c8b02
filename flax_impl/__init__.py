"""The transformer in Flax NNX: readable modules, functional at the boundary of compilation.

One letter for each dimension, in every signature of this package and of its twin:

    B  batch                        D  model_dim       F  hidden_dim
    T  target (query) length        A  num_heads       L  num_layers
    S  source (key) length          G  num_kv_heads    V  vocab_size
    K  key_dim, per head            J  value_dim       N  context_length

Reading order: dropout, linear, masks, positions, norms, feedforward, attention, block, stack, embeddings,
models, weights; losses, optimizers, lora, training; cache, sampling, generation, beam.
"""

from flax_impl.attention import AttentionLayer, attend
from flax_impl.beam import beam_search
from flax_impl.block import Block
from flax_impl.cache import init_cache, reorder_cache, reset_cache
from flax_impl.dropout import Dropout, fold, philox, random_key, random_words
from flax_impl.embeddings import Embeddings, TokenEmbedding, unembed
from flax_impl.feedforward import FeedForward, activate
from flax_impl.generation import Generator, score
from flax_impl.heads import Head, pool
from flax_impl.linear import Linear
from flax_impl.lora import init_adapters, merge
from flax_impl.losses import cross_entropy, mean_loss, next_tokens
from flax_impl.masks import (
    causal_mask,
    masked_softmax,
    padding_mask,
    positions_from,
    quarantine,
    segment_mask,
    segment_positions,
    window_mask,
)
from flax_impl.models import EncoderDecoder, EncoderModel, LanguageModel, build, compiled
from flax_impl.norms import LayerNorm, RMSNorm, make_head_norm, make_norm
from flax_impl.optimizers import Optimizer, clip, global_norm
from flax_impl.positions import (
    LearnedPositions,
    PositionalEncoding,
    RelativeBias,
    RotaryEncoding,
    alibi_bias,
    alibi_slopes,
)
from flax_impl.sampling import (
    MinP,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    draw,
    greedy,
    processors,
    sequence_keys,
    uniforms,
)
from flax_impl.stack import TransformerStack
from flax_impl.training import Trainer
from flax_impl.weights import export_weights, from_pretrained, initialize, load, load_weights, save

__all__ = [
    "AttentionLayer",
    "Block",
    "Dropout",
    "Embeddings",
    "EncoderDecoder",
    "EncoderModel",
    "FeedForward",
    "Generator",
    "Head",
    "LanguageModel",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "MinP",
    "Optimizer",
    "PositionalEncoding",
    "RMSNorm",
    "RelativeBias",
    "RepetitionPenalty",
    "RotaryEncoding",
    "Temperature",
    "TokenEmbedding",
    "TopK",
    "TopP",
    "Trainer",
    "TransformerStack",
    "activate",
    "alibi_bias",
    "alibi_slopes",
    "attend",
    "beam_search",
    "build",
    "causal_mask",
    "clip",
    "compiled",
    "cross_entropy",
    "draw",
    "export_weights",
    "fold",
    "from_pretrained",
    "global_norm",
    "greedy",
    "init_adapters",
    "init_cache",
    "initialize",
    "load",
    "load_weights",
    "make_head_norm",
    "make_norm",
    "masked_softmax",
    "mean_loss",
    "merge",
    "next_tokens",
    "padding_mask",
    "philox",
    "pool",
    "positions_from",
    "processors",
    "quarantine",
    "random_key",
    "random_words",
    "reorder_cache",
    "reset_cache",
    "save",
    "score",
    "segment_mask",
    "segment_positions",
    "sequence_keys",
    "unembed",
    "uniforms",
    "window_mask",
]
