"""ModelConfig: every choice of the architecture, explicit, JSON in and out.

The Python defaults are the book's (Jurafsky & Martin, *Speech and Language Processing*, chapter
"Transformers"): pre-norm blocks, LayerNorm, ReLU, no attention biases. A file has no defaults: it
must name every field, so that a checkpoint says what it means. What each choice means is written,
one sentence each, in ``ledger.py``.

Alphabet: B batch, T target/query length, S source/key length, D model_dim, A num_heads,
G num_kv_heads, K key_dim, J value_dim, F hidden_dim, L num_layers, V vocab_size, N context_length.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from twinformer.errors import ConfigError, Problems

Architecture = Literal["encoder", "decoder", "encoder-decoder"]
Norm = Literal["layernorm", "rmsnorm"]
NormWeight = Literal["plain", "one_plus"]
NormCast = Literal["after_weight", "before_weight"]
NormPlacement = Literal["pre", "post", "sandwich"]
Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
QKNorm = Literal["none", "layernorm", "rmsnorm"]
Positions = Literal["none", "sinusoidal", "learned", "rotary", "relative", "alibi"]
PositionCounting = Literal["real", "places"]
SinusoidLayout = Literal["interleaved", "halves"]
SinusoidSpacing = Literal["textbook", "endpoint"]
RotaryConvention = Literal["half", "interleaved"]
RotaryScalingKind = Literal["none", "linear", "llama3", "yarn"]
Head = Literal["none", "tied", "untied", "pooled", "sequence", "tokens"]
Pool = Literal["none", "first", "last", "mean", "max"]
Pooler = Literal["none", "tanh", "relu"]
DType = Literal["float64", "float32", "bfloat16", "float16"]
Initializer = Literal["normal", "truncated_normal", "xavier_uniform"]


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """How rotary frequencies are stretched beyond the length that a model was trained on.

    ``linear``: every angle divided by ``factor`` (Chen et al. 2023, arXiv:2306.15595).
    ``llama3``: wavelengths above ``original_context_length / low_freq_factor`` divided by ``factor``,
    those below ``original_context_length / high_freq_factor`` kept, a linear blend between (Llama 3.1).
    ``yarn``: NTK-by-parts between ``beta_slow`` and ``beta_fast`` rotations over the original length;
    cosine and sine multiplied by ``attention_factor`` (Peng et al. 2023, arXiv:2309.00071).
    """

    kind: RotaryScalingKind = "none"
    factor: float = 1.0
    original_context_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions, as published


#: fields that earlier versions did not write, with what those did
_ADDED: dict[str, Any] = {"scan_layers": False}


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """The choices of a stack of blocks. ``None`` for value_dim or num_kv_heads is resolved at once."""

    # sizes
    context_length: int  # N
    model_dim: int  # D
    key_dim: int  # K, per head
    hidden_dim: int  # F
    num_heads: int  # A
    num_layers: int  # L, of the decoder when there are two stacks
    value_dim: int = field(default=None)  # type: ignore[assignment]  # J, per head; None: key_dim
    num_kv_heads: int = field(default=None)  # type: ignore[assignment]  # G; None: num_heads

    # normalisation
    norm: Norm = "layernorm"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    norm_weight: NormWeight = "plain"
    norm_cast: NormCast = "after_weight"
    norm_placement: NormPlacement = "pre"
    final_norm: bool = True

    # feed-forward
    activation: Activation = "relu"
    gated: bool = False
    feedforward_bias: bool = True

    # attention
    qkv_bias: bool = False
    output_bias: bool = False
    attention_scale: float | None = None  # None: 1/sqrt(key_dim)
    attention_softcap: float | None = None
    qk_norm: QKNorm = "none"
    window: int | None = None
    window_layers: tuple[int, ...] | None = None  # the blocks that have the window, rising; None: all

    # positions
    positions: Positions = "none"
    position_counting: PositionCounting = "real"  # what is counted where there is padding
    position_offset: int = 0
    sinusoid_layout: SinusoidLayout = "interleaved"
    sinusoid_spacing: SinusoidSpacing = "textbook"
    rotary_convention: RotaryConvention = "half"
    rotary_base: float = 10000.0
    rotary_dim: int = field(default=None)  # type: ignore[assignment]  # None: key_dim when rotary, else 0
    window_rotary_base: float | None = None  # of blocks with the window, which are not scaled then; None: as all
    rotary_scaling: RotaryScaling = RotaryScaling()
    relative_buckets: int = 32
    relative_max_distance: int = 128

    # dropout
    dropout: float = 0.0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0

    # numbers and memory
    param_dtype: DType = "float32"
    compute_dtype: DType = "float32"
    remat: bool = False
    scan_layers: bool = False  # Flax: blocks that are built alike run as one compiled loop; PyTorch: no effect

    def __post_init__(self) -> None:
        self._resolve()
        problems = Problems(type(self).__name__, ConfigError)
        wrong = _check_types(type(self), {f.name: getattr(self, f.name) for f in fields(self)}, problems)
        _stand_in(self, wrong)._check_but(wrong, problems)
        problems.raise_if_any()

    def _check_but(self, wrong: set[str], problems: Problems) -> None:
        """Note every problem of value, but for those that rest on a field which is ``wrong`` anyway."""
        all_values = Problems(problems.subject, problems.error)
        self._check(all_values)
        for problem in all_values.found:
            if not any(problem.startswith(f"{name}:") or f"{name}=" in problem for name in wrong):
                problems.add(problem)

    def _resolve(self) -> None:
        layers: Any = self.window_layers
        if isinstance(layers, list) and _fits(layers, tuple[int, ...]):  # as JSON has it
            object.__setattr__(self, "window_layers", tuple(layers))
        self._default("value_dim", self.key_dim)
        self._default("num_kv_heads", self.num_heads)
        self._default("rotary_dim", self.key_dim if self.positions == "rotary" else 0)

    def _default(self, name: str, value: int) -> None:
        """Fill a field that was left as None."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _check(self, problems: Problems) -> None:
        positive = "context_length model_dim key_dim value_dim hidden_dim num_heads num_kv_heads num_layers"
        for name in positive.split():
            value = getattr(self, name)
            problems.expect(value >= 1, f"{name}: expected at least 1, got {value}")
        if self.num_kv_heads >= 1:
            problems.expect(
                self.num_heads % self.num_kv_heads == 0,
                f"num_kv_heads: expected a divisor of num_heads={self.num_heads}, got {self.num_kv_heads}",
            )
        problems.expect(
            math.isfinite(self.norm_eps) and self.norm_eps > 0,
            f"norm_eps: expected a positive number, got {self.norm_eps}",
        )
        problems.expect(
            not (self.norm == "rmsnorm" and self.norm_bias),
            "norm_bias: expected False with norm='rmsnorm' (it has no bias), got True",
        )
        for name in ("attention_scale", "attention_softcap"):
            value = getattr(self, name)
            problems.expect(
                value is None or (math.isfinite(value) and value > 0),
                f"{name}: expected a positive number or None, got {value}",
            )
        problems.expect(
            self.window is None or self.window >= 1,
            f"window: expected at least 1 or None, got {self.window}",
        )
        self._check_window_layers(problems)
        for name in ("dropout", "attention_dropout", "hidden_dropout"):
            value = getattr(self, name)
            problems.expect(0 <= value < 1, f"{name}: expected a rate in [0, 1), got {value}")
        self._check_positions(problems)

    def _check_window_layers(self, problems: Problems) -> None:
        layers = self.window_layers
        if layers is None:
            return
        problems.expect(self.window is not None, f"window_layers: expected None with window=None, got {layers}")
        problems.expect(
            all(0 <= layer < self.num_layers for layer in layers) and list(layers) == sorted(set(layers)),
            f"window_layers: expected rising numbers from 0 to num_layers - 1 = {self.num_layers - 1}, got {layers}",
        )
        problems.expect(
            0 < len(layers) < self.num_layers,
            f"window_layers: expected some of {self.num_layers} blocks, and not all (None), got {layers}",
        )

    def _check_positions(self, problems: Problems) -> None:
        problems.expect(self.position_offset >= 0, f"position_offset: expected at least 0, got {self.position_offset}")
        problems.expect(
            self.position_offset == 0 or self.positions in ("sinusoidal", "learned"),
            f"position_offset: expected 0 with positions={self.positions!r} (only sinusoidal and learned "
            f"positions are counted from an offset), got {self.position_offset}",
        )
        problems.expect(
            self.relative_buckets >= 4 and self.relative_buckets % 4 == 0,
            f"relative_buckets: expected a positive multiple of 4, got {self.relative_buckets}",
        )
        problems.expect(
            self.relative_max_distance > self.relative_buckets // 2,
            f"relative_max_distance: expected more than relative_buckets // 2 = {self.relative_buckets // 2}, "
            f"got {self.relative_max_distance}",
        )
        problems.expect(
            math.isfinite(self.rotary_base) and self.rotary_base > 1,
            f"rotary_base: expected a number above 1, got {self.rotary_base}",
        )
        base = self.window_rotary_base
        problems.expect(
            base is None or (math.isfinite(base) and base > 1),
            f"window_rotary_base: expected a number above 1 or None, got {base}",
        )
        problems.expect(
            base is None or (self.positions == "rotary" and self.window is not None),
            f"window_rotary_base: expected None with positions={self.positions!r} and window={self.window}, got {base}",
        )
        if self.positions == "rotary":
            problems.expect(
                2 <= self.rotary_dim <= self.key_dim and self.rotary_dim % 2 == 0,
                f"rotary_dim: expected an even number from 2 to key_dim={self.key_dim}, got {self.rotary_dim}",
            )
        else:
            problems.expect(
                self.rotary_dim == 0,
                f"rotary_dim: expected 0 with positions={self.positions!r}, got {self.rotary_dim}",
            )
            problems.expect(
                self.rotary_scaling.kind == "none",
                f"rotary_scaling: expected kind 'none' with positions={self.positions!r}, "
                f"got {self.rotary_scaling.kind!r}",
            )
        scaling = self.rotary_scaling
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
            value = getattr(scaling, name)
            problems.expect(
                math.isfinite(value) and value > 0,
                f"rotary_scaling.{name}: expected a positive number, got {value}",
            )
        if scaling.kind in ("llama3", "yarn"):
            problems.expect(
                scaling.original_context_length >= 1,
                f"rotary_scaling.original_context_length: expected at least 1 with kind={scaling.kind!r}, "
                f"got {scaling.original_context_length}",
            )
            problems.expect(
                scaling.high_freq_factor > scaling.low_freq_factor,
                f"rotary_scaling.high_freq_factor: expected more than low_freq_factor="
                f"{scaling.low_freq_factor}, got {scaling.high_freq_factor}",
            )
            problems.expect(
                scaling.beta_fast > scaling.beta_slow,
                f"rotary_scaling.beta_fast: expected more than beta_slow={scaling.beta_slow}, got {scaling.beta_fast}",
            )

    @property
    def ring_window(self) -> int | None:
        """The window that bounds what any block can still see, or None where some block sees everything."""
        return self.window if self.window_layers is None else None

    def has_window(self, layer: int) -> bool:
        """Whether block ``layer`` sees through the window only."""
        return self.window is not None and (self.window_layers is None or layer in self.window_layers)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated anew."""
        return dataclasses.replace(self, **changes)

    def with_dtype(self, dtype: DType) -> Self:
        """The same model with parameters and arithmetic in ``dtype``."""
        return self.replace(param_dtype=dtype, compute_dtype=dtype)

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, as plain JSON values."""
        values = dataclasses.asdict(self)
        return values | {name: list(value) for name, value in values.items() if isinstance(value, tuple)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From a mapping that names every field, but for those that files written before they were there lack.

        Raises ConfigError naming every missing and unknown field and every bad value at once.
        """
        problems = Problems(cls.__name__, ConfigError)
        values = {**_ADDED, **values}
        names = [f.name for f in fields(cls)]
        wrong = {name for name in names if name not in values}
        for name in names:
            problems.expect(name in values, f"{name}: missing")
        for name in values:
            problems.expect(name in names, f"{name}: unknown field")
        given = {name: values[name] for name in names if name in values}
        scaling = given.get("rotary_scaling")
        if isinstance(scaling, Mapping):
            parts = {f.name for f in fields(RotaryScaling)}
            for part in sorted(parts ^ set(scaling)):
                problems.add(f"rotary_scaling.{part}: {'missing' if part in parts else 'unknown field'}")
                wrong.add(f"rotary_scaling.{part}")
            given["rotary_scaling"] = RotaryScaling(**{k: v for k, v in scaling.items() if k in parts})
        if problems.found:  # the values that are there can be wrong too: say so in the same breath
            wrong |= _check_types(cls, given, problems)
            stand_in = object.__new__(cls)
            for name in names:
                object.__setattr__(stand_in, name, given.get(name))
            _stand_in(stand_in, wrong)._check_but(wrong, problems)
            problems.raise_if_any()
        return cls(**given)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """From JSON text. Raises ConfigError where the text is not a JSON object naming every field."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:  # JSONDecodeError, and whole numbers of too many digits
            raise ConfigError(cls.__name__, [f"expected JSON, got text that does not parse: {error}"]) from None
        if not isinstance(values, dict):
            raise ConfigError(cls.__name__, [f"expected a JSON object, got {type(values).__name__}"])
        return cls.from_dict(values)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(StackConfig):
    """A whole model: a stack or two, embeddings, and a head."""

    architecture: Architecture
    vocab_size: int  # V, of the target when there are two stacks
    source_vocab_size: int = field(default=None)  # type: ignore[assignment]  # None: vocab_size, or 0 with one stack
    num_encoder_layers: int = field(default=None)  # type: ignore[assignment]  # None: num_layers, or 0 with one stack

    # embeddings
    share_embeddings: bool = False
    embedding_scale: float | None = None
    embedding_norm: bool = False
    embedding_dropout: float | None = None  # None: dropout
    num_token_types: int = 0

    # head
    head: Head = "tied"
    head_bias: bool = False
    head_transform: bool = False
    head_scale: float | None = None
    head_softcap: float | None = None
    head_dropout: float = 0.0
    num_labels: int = 0
    pool: Pool = "none"
    pooler: Pooler = "none"
    pool_normalize: bool = False

    # initial weights
    initializer: Initializer = "normal"
    initializer_std: float = 0.02
    initializer_scale_residual: bool = False

    @property
    def predicts_tokens(self) -> bool:
        """Whether the head scores tokens, so that the model can write and be trained on text."""
        return self.head in ("tied", "untied")

    def output_shape(self, B: int, T: int) -> tuple[int, ...]:
        """The shape of what the model gives for ``[B, T]`` tokens (of the target, where there are two stacks)."""
        width = {"none": self.model_dim, "pooled": self.model_dim}.get(self.head, self.num_labels or self.vocab_size)
        return (B, width) if self.head in ("pooled", "sequence") else (B, T, width)

    def _resolve(self) -> None:
        super()._resolve()
        two = self.architecture == "encoder-decoder"
        self._default("source_vocab_size", self.vocab_size if two else 0)
        self._default("num_encoder_layers", self.num_layers if two else 0)

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        problems.expect(self.vocab_size >= 1, f"vocab_size: expected at least 1, got {self.vocab_size}")
        problems.expect(self.num_token_types >= 0, f"num_token_types: expected at least 0, got {self.num_token_types}")
        two = self.architecture == "encoder-decoder"
        for name in ("source_vocab_size", "num_encoder_layers"):
            value = getattr(self, name)
            if two:
                problems.expect(value >= 1, f"{name}: expected at least 1 with two stacks, got {value}")
            else:
                problems.expect(value == 0, f"{name}: expected 0 with architecture={self.architecture!r}, got {value}")
        if self.share_embeddings:
            problems.expect(two, f"share_embeddings: expected False with architecture={self.architecture!r}, got True")
            problems.expect(
                not two or self.source_vocab_size == self.vocab_size,
                f"share_embeddings: expected False with source_vocab_size={self.source_vocab_size} and another "
                f"vocab_size={self.vocab_size}, got True",
            )
        problems.expect(
            self.num_token_types == 0 or self.architecture == "encoder",
            f"num_token_types: expected 0 with architecture={self.architecture!r} (only an encoder takes "
            f"token types), got {self.num_token_types}",
        )
        problems.expect(
            not two or self.window_layers is None,
            f"window_layers: expected None with architecture={self.architecture!r}, got {self.window_layers}",
        )
        self._check_head(problems)
        for name in ("embedding_scale", "head_scale", "head_softcap"):
            value = getattr(self, name)
            problems.expect(
                value is None or (math.isfinite(value) and value > 0),
                f"{name}: expected a positive number or None, got {value}",
            )
        for name in ("embedding_dropout", "head_dropout"):
            value = getattr(self, name)
            problems.expect(value is None or 0 <= value < 1, f"{name}: expected a rate in [0, 1), got {value}")
        problems.expect(
            math.isfinite(self.initializer_std) and self.initializer_std > 0,
            f"initializer_std: expected a positive number, got {self.initializer_std}",
        )

    def _check_head(self, problems: Problems) -> None:
        head = self.head
        if self.architecture == "encoder-decoder":
            problems.expect(
                head in ("tied", "untied"),
                f"head: expected 'tied' or 'untied' with architecture={self.architecture!r}, got {head!r}",
            )
        labels = head in ("sequence", "tokens")
        wanted = "at least 1" if labels else "0"
        problems.expect(
            (self.num_labels >= 1) if labels else (self.num_labels == 0),
            f"num_labels: expected {wanted} with head={head!r}, got {self.num_labels}",
        )
        # the choices that some heads have, and what says that it is not made
        unmade = {
            "head_bias": (False, ("tied", "untied", "sequence", "tokens")),
            "head_transform": (False, ("tied", "untied")),
            "head_scale": (None, ("tied", "untied")),
            "head_softcap": (None, ("tied", "untied")),
            "head_dropout": (0.0, ("sequence", "tokens")),
            "pool": ("none", ("pooled", "sequence")),
            "pooler": ("none", ("pooled", "sequence")),
            "pool_normalize": (False, ("pooled",)),
        }
        for name, (none, heads) in unmade.items():
            value = getattr(self, name)
            if name == "head_dropout" and not 0 <= value < 1:
                continue  # said above
            problems.expect(
                head in heads or value == none, f"{name}: expected {none!r} with head={head!r}, got {value!r}"
            )
        problems.expect(
            head not in ("pooled", "sequence") or self.pool != "none",
            f"pool: expected 'first', 'last', 'mean' or 'max' with head={head!r}, got {self.pool!r}",
        )


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _check_types(cls: type, values: Mapping[str, Any], problems: Problems) -> set[str]:
    """Note every value of the wrong type; gives the names of the fields concerned."""
    wrong = set()
    hints = _hints(cls)
    for name, value in values.items():
        if hints[name] is RotaryScaling and isinstance(value, RotaryScaling):
            parts = {f"{name}.{f.name}": getattr(value, f.name) for f in fields(value)}
            part_hints = {f"{name}.{k}": hint for k, hint in _hints(RotaryScaling).items()}
        else:
            parts, part_hints = {name: value}, {name: hints[name]}
        for part, held in parts.items():
            if not _check_type(part, held, part_hints[part], problems):
                wrong |= {name, part}
    return wrong


def _stand_in(config: StackConfig, wrong: set[str]) -> StackConfig:
    """A copy in which wrong fields hold harmless values, so that the checks of the others can run."""
    if not wrong:
        return config
    harmless = object.__new__(type(config))
    cls: type = type(config)
    hints = _hints(cls)
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name in wrong:
            value = f.default
            if value is dataclasses.MISSING or (value is None and not _takes_none(hints[f.name])):
                value = "encoder" if f.name == "architecture" else 1
        object.__setattr__(harmless, f.name, value)
    return harmless


def _takes_none(hint: Any) -> bool:
    return types.NoneType in typing.get_args(hint)


def _check_type(name: str, value: Any, hint: Any, problems: Problems) -> bool:
    allowed = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
    wanted = " or ".join(_described(option) for option in allowed)
    return problems.expect(any(_fits(value, option) for option in allowed), f"{name}: expected {wanted}, got {value!r}")


_TOO_LARGE = 2**1023  # whole numbers from here on are no floats


def _fits(value: Any, option: Any) -> bool:
    if typing.get_origin(option) is Literal:
        return isinstance(value, str) and value in typing.get_args(option)
    if option is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (isinstance(value, float) or abs(value) < _TOO_LARGE)
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if typing.get_origin(option) is tuple:
        return isinstance(value, (tuple, list)) and all(_fits(part, int) for part in value)
    return isinstance(value, option)


def _described(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(option))
    if option is types.NoneType:
        return "None"
    if typing.get_origin(option) is tuple:
        return "a list of whole numbers"
    plain = {int: "a whole number", float: "a number", bool: "true or false"}
    return plain.get(option) or str(option.__name__)
