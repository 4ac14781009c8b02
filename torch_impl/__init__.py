"""The transformer of twinformer in PyTorch.

Read the files in this order: dropout, linear, masks, positions, norms, feedforward, attention, cache, block, stack,
embeddings, models, weights, losses, optimizers, lora, training, sampling, generation, beam. Each states the equations
that it computes; the book is Jurafsky & Martin, *Speech and Language Processing*, 3rd edition draft, chapters
"Transformers" and "Machine Translation".

One letter for each dimension, in signatures and in the code:

    B  batch                            A  num_heads, query heads
    T  target or query length           G  num_kv_heads, key and value heads
    S  source or key length             K  key_dim, of one head's query or key
    D  model_dim                        J  value_dim, of one head's value
    F  hidden_dim of the feed-forward   L  num_layers
    V  vocab_size                       N  context_length
    R  rotary_dim

X is what flows through the layers, H_enc what the encoder made of the source; Q, K, V and Z are queries, keys, values
and their weighted sums; P the position encodings; E an embedding table; W and b the matrix and bias of a linear map.
"""

from torch_impl.attention import AttentionLayer, attend
from torch_impl.beam import beam_search
from torch_impl.block import Block
from torch_impl.cache import init_cache, reorder_cache, reset_cache
from torch_impl.dropout import Dropout, fold, philox, random_key, random_words
from torch_impl.embeddings import Embeddings, TokenEmbedding, unembed
from torch_impl.feedforward import FeedForward, activate
from torch_impl.generation import Generator, score
from torch_impl.heads import Head, pool
from torch_impl.linear import Linear
from torch_impl.lora import init_adapters, merge
from torch_impl.losses import cross_entropy, mean_loss, next_tokens
from torch_impl.masks import (
    causal_mask,
    masked_softmax,
    padding_mask,
    positions_from,
    quarantine,
    segment_mask,
    segment_positions,
    window_mask,
)
from torch_impl.models import EncoderDecoder, EncoderModel, LanguageModel, build, compiled
from torch_impl.norms import LayerNorm, RMSNorm, make_head_norm, make_norm
from torch_impl.optimizers import Optimizer, clip, global_norm
from torch_impl.positions import (
    LearnedPositions,
    PositionalEncoding,
    RelativeBias,
    RotaryEncoding,
    alibi_bias,
    alibi_slopes,
)
from torch_impl.sampling import (
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
from torch_impl.stack import TransformerStack
from torch_impl.training import Trainer
from torch_impl.weights import export_weights, from_pretrained, initialize, load, load_weights, save

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
