"""From token ids to vectors, and back to scores for each token."""

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from torch_impl.dropout import Dropout, Key
from torch_impl.linear import DTYPES, affine, new_parameter, wide_dtype
from torch_impl.norms import make_norm
from torch_impl.positions import LearnedPositions, PositionalEncoding, check_rows, extremes, look_up
from torch_impl.weights import initialize
from twinformer.checks import check_sizes, check_tokens
from twinformer.config import DType, ModelConfig
from twinformer.errors import InputError


class TokenEmbedding(nn.Module):
    """Row ``id`` of ``weight [V, D]`` for each id, in compute_dtype, for ids of any shape.

    Raises InputError for an id out of range; inside ``torch.compile``, where ids cannot be seen, it gives NaN.
    """

    kind = "embedding"

    def __init__(
        self,
        vocab_size: int,
        model_dim: int,
        *,
        param_dtype: DType = "float32",
        compute_dtype: DType = "float32",
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        check_sizes("TokenEmbedding", vocab_size=vocab_size, model_dim=model_dim)
        self.compute_dtype = DTYPES[compute_dtype]
        self.weight = new_parameter(vocab_size, model_dim, dtype=param_dtype)
        initialize(self, seed)

    def forward(self, ids: Integer[Tensor, "*rows"]) -> Float[Tensor, "*rows D"]:
        if not torch.compiler.is_compiling():
            check_rows("TokenEmbedding", "ids", ids, self.weight.shape[0])
        return look_up(self.weight, ids, self.compute_dtype)


class Embeddings(nn.Module):
    """Token row (times ``embedding_scale``), plus position, plus token type row, then norm and dropout.

    Book, chapter "Transformers", "The input: embeddings for token and position". ``vocab_size`` 0: it has no table of
    its own, one is passed in as ``table``. ``token_types`` None means type 0. Raises InputError for wrong shapes,
    dtypes and ids; inside ``torch.compile``, where ids cannot be seen, an id out of range gives NaN.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, *, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = DTYPES[config.compute_dtype]
        self.tokens = self._table(vocab_size)
        self.positions = self._positions()
        self.token_types = self._table(config.num_token_types)
        self.norm = make_norm(config.model_dim, config) if config.embedding_norm else None
        self.dropout = Dropout(config.dropout if config.embedding_dropout is None else config.embedding_dropout)
        initialize(self, seed)

    def _table(self, rows: int) -> TokenEmbedding | None:
        config = self.config
        if rows == 0:
            return None
        return TokenEmbedding(
            rows, config.model_dim, param_dtype=config.param_dtype, compute_dtype=config.compute_dtype, seed=None
        )

    def _positions(self) -> PositionalEncoding | LearnedPositions | None:
        config = self.config
        if config.positions == "sinusoidal":
            return PositionalEncoding(
                config.model_dim,
                dropout=0.0,
                max_len=config.context_length,
                layout=config.sinusoid_layout,
                spacing=config.sinusoid_spacing,
                offset=config.position_offset,
            )
        if config.positions == "learned":
            return LearnedPositions(
                config.context_length + config.position_offset,
                config.model_dim,
                offset=config.position_offset,
                param_dtype=config.param_dtype,
                compute_dtype=config.compute_dtype,
                seed=None,
            )
        return None

    def forward(
        self,
        tokens: Integer[Tensor, "B T"],
        positions: Integer[Tensor, "#B T"] | None = None,
        token_types: Integer[Tensor, "B T"] | None = None,
        *,
        table: Float[Tensor, "V D"] | None = None,
        rng: Key | None = None,
    ) -> Float[Tensor, "B T D"]:
        if table is None and self.tokens is None:
            raise InputError("Embeddings", ["table: expected [V, D] (there is no table here), got None"])
        if not torch.compiler.is_compiling():
            rows = table if self.tokens is None or table is not None else self.tokens.weight
            check_ids(
                "Embeddings",
                self.config,
                tokens,
                vocab_size=0 if rows is None else rows.shape[0],
                positions=positions,
                token_types=token_types,
            )
        return self._embed(tokens, positions, token_types, table=table, rng=rng)

    def _embed(
        self,
        tokens: Integer[Tensor, "B T"],
        positions: Integer[Tensor, "#B T"] | None = None,
        token_types: Integer[Tensor, "B T"] | None = None,
        *,
        table: Float[Tensor, "V D"] | None = None,
        rng: Key | None = None,
    ) -> Float[Tensor, "B T D"]:
        """``forward``, unchecked."""
        if table is not None:
            X = look_up(table, tokens, self.compute_dtype)
        else:
            assert self.tokens is not None
            X = self.tokens(tokens)
        if self.config.embedding_scale is not None:
            X = X * torch.tensor(self.config.embedding_scale, dtype=X.dtype)
        if isinstance(self.positions, PositionalEncoding):
            X = self.positions(X, positions)
        elif self.positions is not None:
            if positions is None:
                positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
            X = X + self.positions(positions)
        if self.token_types is not None:
            X = X + self.token_types(tokens.new_zeros(1, 1) if token_types is None else token_types)
        if self.norm is not None:
            X = self.norm(X)
        Y: Tensor = self.dropout(X, rng)
        return Y


def check_ids(
    where: str,
    config: ModelConfig,
    tokens: Tensor,
    *,
    vocab_size: int,
    name: str = "tokens",
    padding_mask: Tensor | None = None,
    positions: Tensor | None = None,
    token_types: Tensor | None = None,
) -> None:
    """``twinformer.checks.check_tokens`` with the extremes of what is given."""
    lowest, highest = extremes(tokens)
    lowest_position, highest_position = extremes(positions)
    lowest_type, highest_type = extremes(token_types)
    check_tokens(
        where,
        tokens=tokens,
        vocab_size=vocab_size,
        context_length=config.context_length,
        lowest=lowest,
        highest=highest,
        name=name,
        padding_mask=padding_mask,
        positions=positions,
        lowest_position=lowest_position,
        highest_position=highest_position,
        token_types=token_types,
        num_token_types=config.num_token_types,
        lowest_type=lowest_type,
        highest_type=highest_type,
    )


def unembed(
    h: Float[Tensor, "*rows D"],
    E: Float[Tensor, "V D"],
    *,
    scale: float | None = None,
    bias: Float[Tensor, " V"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "*rows V"]:
    """``logits = (scale · h) Eᵀ + bias``, in the dtype of h; softcap c: ``c · tanh(logits / c)``, wide.

    Book, chapter "Transformers", "The Language Modeling Head". With E the embedding table the two are tied, by
    function.
    """
    dtype = h.dtype
    if scale is not None:
        h = h * torch.tensor(scale, dtype=dtype)
    logits = affine(h, E.to(dtype), None if bias is None else bias.to(dtype))
    if softcap is None:
        return logits
    return (softcap * torch.tanh(logits.to(wide_dtype(dtype)) / softcap)).to(dtype)
