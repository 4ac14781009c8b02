"""What one published family declares: its fields, its names, its layouts.

A family is one file that makes a ``Family`` (see ``bert.py``); ``published.py`` does the rest. Reading is total: every
field of the configuration and every tensor of the file is used, declared to play no part, or reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from twinformer.config import ModelConfig
from twinformer.errors import Problems, WeightsError
from twinformer.parameters import model_parameters

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

# fields that any family's config.json may hold and that change no hidden state: bookkeeping of the library that wrote
# it, ids that only a tokenizer or a decoder needs, labels of heads, what is returned, how memory is saved
_BOOKKEEPING_FIELDS = """
_attn_implementation_autoset _name_or_path _num_labels architectures bos_token_id chunk_size_feed_forward
classifier_dropout cross_attention_hidden_size dtype eos_token_id finetuning_task gradient_checkpointing id2label
label2id language max_length model_type name num_labels output_attentions output_hidden_states pad_token_id prefix
problem_type return_dict sep_token_id task_specific_params tokenizer_class torch_dtype torchscript
transformers_version use_bfloat16 use_cache use_return_dict
"""
BOOKKEEPING = frozenset(_BOOKKEEPING_FIELDS.split())

#: stands for the default of a field that has none
REQUIRED: Any = object()
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", list: "a list"}


@dataclass(frozen=True)
class Field:
    """One field of a published ``config.json`` on which the mathematics depends.

    ``kind`` is int, float, bool, str or list. ``default`` is what the format means where the field is absent; without
    one the field must be there. ``minimum`` is the least value, ``allowed`` lists the only ones that are supported
    (of any kind).
    """

    kind: type
    default: Any = REQUIRED
    allowed: tuple[Any, ...] | None = None
    minimum: float | None = None

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
        kinds: tuple[type, ...] = (int, float) if self.kind is float else (self.kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind is not bool):
            return f"{name}: expected {_KINDS[self.kind]}, got {value!r}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name}: expected a finite number, got {value!r}"
        if isinstance(value, (int, float)) and self.minimum is not None and value < self.minimum:
            return f"{name}: expected at least {self.minimum}, got {value!r}"
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
    for every block of the encoder. The name applies to a model whose configuration calls for its leaves.
    """

    published: str
    ours: str | tuple[str, ...]
    layout: Layout = AS_STORED

    def expanded(self, config: ModelConfig) -> Iterator[Name]:
        ours = (self.ours,) if isinstance(self.ours, str) else self.ours
        for published, *paths in _each_layer((self.published, *ours), config):
            yield Name(published, tuple(paths), self.layout)


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
    #: endings of older files and what they are called now
    old_endings: Mapping[str, str] = field(default_factory=dict)
    #: buffers that hold 0, 1, 2 … and are no weights
    counting_buffers: tuple[str, ...] = ()
    #: tensors that only repeat another one, bit for bit (tied weights written twice)
    copies: Mapping[str, str] = field(default_factory=dict)
    #: beginnings of names of parts that the published model has and ours leaves out; ``{layer}`` as in names
    left_out: tuple[str, ...] = ()

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
