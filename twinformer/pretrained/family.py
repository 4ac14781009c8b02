"""What one published family declares: its fields, its names, its layouts.

A family is one file that makes a ``Family`` (see ``bert.py``); ``published.py`` does the rest. Reading is total: every
field of the configuration and every tensor of the file is used, declared to play no part, or reported.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from twinformer.config import Head, ModelConfig
from twinformer.errors import Problems, WeightsError
from twinformer.parameters import model_parameters

if TYPE_CHECKING:
    from twinformer.pretrained.files import Stored

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

# fields that any family's config.json may hold and that change no hidden state: bookkeeping of the library that wrote
# it, ids that only a tokenizer or a decoder needs, labels of heads, what is returned, how memory is saved
_BOOKKEEPING_FIELDS = """
_attn_implementation_autoset _name_or_path _num_labels architectures auto_map bos_token_id chunk_size_feed_forward
classifier_dropout cross_attention_hidden_size dtype eos_token_id finetuning_task gradient_checkpointing id2label
label2id language max_length model_type name num_labels output_attentions output_hidden_states pad_token_id prefix
problem_type return_dict sep_token_id task_specific_params tokenizer_class torch_dtype torchscript
transformers_version use_bfloat16 use_cache use_return_dict
"""
BOOKKEEPING = frozenset(_BOOKKEEPING_FIELDS.split())

#: stands for the default of a field that has none
REQUIRED: Any = object()
_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class Field:
    """One field of a published ``config.json`` on which the mathematics depends.

    ``kind`` is int, float, bool, str, list or dict. ``default`` is what the format means where the field is absent;
    without one the field must be there. ``minimum`` is the least value, ``allowed`` lists the only ones that are
    supported (of any kind). ``nullable``: null is a value too. ``check`` says what is wrong with a value of the right
    kind, without the field's name, or None.
    """

    kind: type
    default: Any = REQUIRED
    allowed: tuple[Any, ...] | None = None
    minimum: float | None = None
    nullable: bool = False
    check: Callable[[Any], str | None] | None = None

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    def problem(self, name: str, value: Any) -> str | None:
        """What is wrong with ``value``, or None."""
        if self.allowed is not None:
            # 1 and True are equal in Python; they are not the same setting
            if any(type(value) is type(option) and value == option for option in self.allowed):
                return None
            return f"{name}: expected {one_of(self.allowed)}, got {value!r}"
        if value is None and self.nullable:
            return None
        kinds: tuple[type, ...] = (int, float) if self.kind is float else (self.kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind is not bool):
            return f"{name}: expected {_KINDS[self.kind]}{' or null' if self.nullable else ''}, got {value!r}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name}: expected a finite number, got {value!r}"
        if isinstance(value, (int, float)) and self.minimum is not None and value < self.minimum:
            return f"{name}: expected at least {self.minimum}, got {value!r}"
        if self.check is not None and (wrong := self.check(value)) is not None:
            return f"{name}: {wrong}"
        return None


def only(value: Any, *others: Any) -> Field:
    """A field that may only hold ``value``, which is also what its absence means (or one of ``others``)."""
    return Field(type(value), default=value, allowed=(value, *others))


class Layout:
    """How one published array holds one or several of our leaves: stacked along their first axis, in turn.

    One leaf is a stack of one: stored as we store it. A family with another layout derives from this class.
    """

    def shape(self, leaves: Sequence[Shape]) -> Shape:
        """The shape of the published array that holds leaves of these shapes."""
        return (sum(leaf[0] for leaf in leaves), *leaves[0][1:])

    def pack(self, leaves: Sequence[Array]) -> Array:
        """Our leaves as one published array. Exact: no arithmetic."""
        return leaves[0] if len(leaves) == 1 else np.concatenate(leaves)

    def unpack(self, array: Array, leaves: Sequence[Shape]) -> list[Array]:
        """The published array as our leaves, of these shapes: the inverse of ``pack``."""
        ends = np.cumsum([leaf[0] for leaf in leaves])
        return np.split(array, ends[:-1].tolist())


class Turned(Layout):
    """The stack with its axes in reverse: ``[in, out]``, as the ``Conv1D`` of GPT-2 stores its weights."""

    def shape(self, leaves: Sequence[Shape]) -> Shape:
        return super().shape(leaves)[::-1]

    def pack(self, leaves: Sequence[Array]) -> Array:
        return super().pack(leaves).T

    def unpack(self, array: Array, leaves: Sequence[Shape]) -> list[Array]:
        return super().unpack(array.T, leaves)


AS_STORED = Layout()
TURNED = Turned()


@dataclass(frozen=True)
class Name:
    """A published tensor and the leaf, or leaves, of ours that it holds.

    ``{layer}`` stands for every block of the stack (of the decoder where there are two), ``{encoder_layer}``
    for every block of the encoder. The name applies to a model whose configuration calls for its leaves and, where
    ``heads`` names some, whose head is one of them. ``beside``: it stands beside the body, not within it, and never has
    the body's prefix.
    """

    published: str
    ours: str | tuple[str, ...]
    layout: Layout = AS_STORED
    heads: tuple[Head, ...] = ()
    beside: bool = False

    def expanded(self, config: ModelConfig) -> Iterator[Name]:
        if self.heads and config.head not in self.heads:
            return
        ours = (self.ours,) if isinstance(self.ours, str) else self.ours
        for published, *paths in _each_layer((self.published, *ours), config):
            yield dataclasses.replace(self, published=published, ours=tuple(paths))


@dataclass(frozen=True)
class Family:
    """Everything that one published family needs.

    ``to_config`` makes the fields of a ``ModelConfig`` from the checked values of ``fields``; ``from_config`` makes
    ``config.json`` from a ModelConfig (``to_published`` proves that nothing of it was lost).
    """

    model_type: str
    #: the configuration fields that matter, and those of this family that do not (besides BOOKKEEPING)
    fields: Mapping[str, Field]
    without_effect: frozenset[str]
    to_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    from_config: Callable[[ModelConfig], dict[str, Any]]
    #: the tensors
    names: tuple[Name, ...]
    #: what may stand before every name, where the model is saved within another
    prefixes: tuple[str, ...] = ()
    #: what we write before the names of the body where the model has a head beside it
    body_prefix: str = ""
    #: endings of older files and what they are called now
    old_endings: Mapping[str, str] = field(default_factory=dict)
    #: buffers that hold 0, 1, 2 … and are no weights
    counting_buffers: tuple[str, ...] = ()
    #: tensors that only repeat another one, bit for bit (tied weights written twice)
    copies: Mapping[str, str] = field(default_factory=dict)
    #: beginnings of names of parts that the published model has and ours leaves out; ``{layer}`` as in names
    left_out: tuple[str, ...] = ()
    #: those of them whose values follow from the configuration, by the ending of their names
    buffers: Mapping[str, Callable[[ModelConfig], Array]] = field(default_factory=dict)

    def expected(self, config: ModelConfig) -> dict[str, Name]:
        """Every published tensor that a model of this configuration has, by name.

        Raises WeightsError where the family's own table does not hold every leaf of the model exactly once.
        """
        leaves = model_parameters(config)
        problems = Problems(f"the names of {self.model_type}", WeightsError)
        found: dict[str, Name] = {}
        held: dict[str, str] = {}
        for pattern in self.names:
            for name in pattern.expanded(config):
                live = [path in leaves for path in name.ours]
                problems.expect(all(live) or not any(live), f"{name.published}: expected all of {name.ours} or none")
                if all(live):
                    problems.expect(name.published not in found, f"{name.published}: expected one entry, got several")
                    found[name.published] = name
                    for path in name.ours:
                        problems.expect(path not in held, f"{path}: held by {held.get(path)} and {name.published}")
                        held[path] = name.published
        for path in leaves:
            problems.expect(path in held, f"{path}: expected a published name, got none")
        problems.raise_if_any()
        return found

    def settled(self, config: ModelConfig, tensors: Mapping[str, Stored]) -> ModelConfig:
        """The configuration, where only the tensors of the file tell the last of it."""
        return config

    def written(self, name: Name, config: ModelConfig) -> str:
        """The name that we write: within the body's prefix where there is a head beside the body."""
        return name.published if name.beside or config.head == "none" else self.body_prefix + name.published

    def leaves_out(self, config: ModelConfig) -> tuple[str, ...]:
        """The beginnings of the names that a model of this configuration leaves out."""
        return tuple(name for part in self.left_out for (name,) in _each_layer((part,), config))

    def canonical(self, name: str) -> str:
        """A published name without prefix, old endings renewed."""
        for prefix in self.prefixes:
            if name.startswith(prefix):
                name = name[len(prefix) :]
                break
        for old, new in self.old_endings.items():
            if name.endswith(old):
                return name[: -len(old)] + new
        return name


def _each_layer(patterns: tuple[str, ...], config: ModelConfig) -> Iterator[tuple[str, ...]]:
    """The patterns once for every layer that they stand for, or as they are where they name none."""
    for place, count in (("{layer}", config.num_layers), ("{encoder_layer}", config.num_encoder_layers)):
        if any(place in pattern for pattern in patterns):
            for i in range(count):
                yield tuple(pattern.replace(place, str(i)) for pattern in patterns)
            return
    yield patterns


def one_of(options: Sequence[Any]) -> str:
    """``'a'``, or ``one of 'a', 'b'``: for messages."""
    shown = ", ".join(repr(option) for option in options)
    return shown if len(options) == 1 else f"one of {shown}"
