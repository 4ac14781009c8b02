"""State dicts of ``torch.nn.Transformer``, ``TransformerEncoder`` and ``TransformerDecoder``: their names <-> ours.

Their queries, keys and values are one matrix ``in_proj [3D, D]``, ours are three; the rest differs in its names only.
A state dict does not tell how many heads there are, where the norms stand, nor the activation: these are given by the
names that the constructors there have. Embeddings and a head are no part of these classes.

>>> stacks = torch_nn.read({name: leaf.numpy() for name, leaf in module.state_dict().items()}, nhead=8)
>>> stack = torch_impl.TransformerStack.from_config(stacks.config, 6)  # for a decoder: causal, with cross_attention
>>> torch_impl.load_weights(stack, stacks.tensors)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from twinformer.checks import check_tensors
from twinformer.config import Activation, StackConfig
from twinformer.errors import ConfigError, Problems, WeightsError
from twinformer.parameters import stack_parameters
from twinformer.pretrained.family import AS_STORED, Array, Shape
from twinformer.pretrained.published import stored_dtype

Kind = Literal["Transformer", "TransformerEncoder", "TransformerDecoder"]


@dataclass(frozen=True)
class Stacks:
    """The stacks of a module of ``torch.nn``, in our terms.

    ``tensors`` has the paths of a ``TransformerStack``, which for ``Transformer`` stand below ``encoder.`` and
    ``decoder.``, as in an ``EncoderDecoder``. ``config`` counts the decoder's blocks as its ``num_layers``;
    ``num_encoder_layers`` is 0 with one stack. ``left_out``: the names that did not begin with the prefix.
    """

    kind: Kind
    config: StackConfig
    num_encoder_layers: int
    tensors: dict[str, Array]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Module:
    """A module of ``torch.nn``: what its constructor (that of its layers, but for ``Transformer``) is given, and its
    state dict. ``num_layers`` and ``norm`` (whether there is a last one) are for the constructor of the stack.
    """

    kind: Kind
    arguments: dict[str, Any]
    num_layers: int
    norm: bool
    state: dict[str, Array]


def read(
    state: Mapping[str, Array],
    *,
    nhead: int,
    activation: Activation = "relu",
    norm_first: bool = False,
    layer_norm_eps: float = 1e-5,
    dropout: float = 0.1,
    context_length: int = 5000,
    prefix: str = "",
) -> Stacks:
    """The stacks whose state dict this is; ``prefix`` is what their names begin with in that of a whole model.

    Raises ConfigError for arguments that cannot be, WeightsError naming every tensor that is missing, unexpected,
    mis-shaped, not of a float dtype or not finite.
    """
    subject = f"a state dict of torch.nn (names below {prefix!r})" if prefix else "a state dict of torch.nn"
    ours = {name.removeprefix(prefix): np.asarray(leaf) for name, leaf in state.items() if name.startswith(prefix)}
    kind = _kind_of(ours, subject)
    sides = _sides(kind)
    counts = {side: _count(ours, side) for side in sides}
    first = next(iter(sides))
    inner = ours.get(f"{first}layers.0.linear1.weight")
    if inner is None or inner.ndim != 2:
        got = "none" if inner is None else f"shape {inner.shape}"
        raise WeightsError(subject, [f"{first}layers.0.linear1.weight: expected a matrix [F, D], got {got}"])
    F, D = inner.shape
    if nhead < 1 or D % nhead:
        raise ConfigError(subject, [f"nhead: expected a divisor of the width D={D}, got {nhead}"])
    has_bias = f"{first}layers.0.linear1.bias" in ours
    config = StackConfig(
        context_length=context_length,
        model_dim=D,
        key_dim=D // nhead,
        hidden_dim=F,
        num_heads=nhead,
        num_layers=counts[[*sides][-1]],
        norm="layernorm",
        norm_bias=has_bias,
        norm_eps=layer_norm_eps,
        norm_placement="pre" if norm_first else "post",
        final_norm=f"{first}norm.weight" in ours,
        activation=activation,
        feedforward_bias=has_bias,
        qkv_bias=has_bias,
        output_bias=has_bias,
        dropout=dropout,
        attention_dropout=dropout,
        hidden_dropout=dropout,
    )
    held = _names(config, kind, counts)
    shapes = _shapes(config, kind, counts)
    expected = {name: AS_STORED.shape([shapes[path] for path in paths]) for name, paths in held.items()}
    check_tensors(subject, ours, expected, non_finite=lambda leaf: int((~np.isfinite(leaf)).sum()))
    tensors: dict[str, Array] = {}
    for name, paths in held.items():
        parts = AS_STORED.unpack(ours[name], [shapes[path] for path in paths])
        tensors |= {path: np.ascontiguousarray(part) for path, part in zip(paths, parts, strict=True)}
    return Stacks(
        kind=kind,
        config=config.with_dtype(stored_dtype(tensors)),
        num_encoder_layers=counts["encoder."] if kind == "Transformer" else 0,
        tensors={path: tensors[path] for path in shapes},
        left_out=tuple(name for name in state if not name.startswith(prefix)),
    )


def write(stacks: Stacks) -> Module:
    """The module that holds these stacks, bit for bit: batch first.

    Raises ConfigError naming every choice that these classes do not have, WeightsError naming every leaf that is
    missing, unexpected, mis-shaped or not of a float dtype.
    """
    config, kind = stacks.config, stacks.kind
    _check_expressible(stacks)
    sides = _sides(kind)
    counts = dict.fromkeys(sides, config.num_layers)
    if kind == "Transformer":
        counts["encoder."] = stacks.num_encoder_layers
    shapes = _shapes(config, kind, counts)
    check_tensors(f"the stacks of a {kind}", stacks.tensors, shapes)
    problems = Problems(f"the stacks of a {kind}", WeightsError)
    state = {}
    for name, paths in _names(config, kind, counts).items():
        parts = [stacks.tensors[path] for path in paths]
        dtypes = sorted({str(part.dtype) for part in parts})
        alike = problems.expect(
            len(dtypes) == 1, f"{name}: expected one dtype for {', '.join(paths)}, got {', '.join(dtypes)}"
        )
        if alike:
            state[name] = np.array(AS_STORED.pack(parts))
    problems.raise_if_any()
    arguments: dict[str, Any] = {
        "d_model": config.model_dim,
        "nhead": config.num_heads,
        "dim_feedforward": config.hidden_dim,
        "dropout": config.dropout,
        "activation": config.activation,
        "layer_norm_eps": config.norm_eps,
        "norm_first": config.norm_placement == "pre",
        "bias": config.qkv_bias,
        "batch_first": True,
    }
    if kind == "Transformer":
        arguments |= {"num_encoder_layers": stacks.num_encoder_layers, "num_decoder_layers": config.num_layers}
    return Module(kind, arguments, config.num_layers, config.final_norm, state)


# ---- names


def _sides(kind: Kind) -> dict[str, bool]:
    """What the names of each stack begin with, in both, and whether it attends to another one."""
    if kind == "Transformer":
        return {"encoder.": False, "decoder.": True}
    return {"": kind == "TransformerDecoder"}


def _kind_of(state: Mapping[str, Array], subject: str) -> Kind:
    sides = [side for side in _sides("Transformer") if any(name.startswith(f"{side}layers.") for name in state)]
    if len(sides) == 1:
        wanted = f"expected names of two stacks, got those of one (which prefix={sides[0]!r} would read)"
        raise WeightsError(subject, [wanted])
    if sides:
        return "Transformer"
    if any(name.startswith("layers.") for name in state):
        crosses = any(".multihead_attn." in name for name in state)
        return "TransformerDecoder" if crosses else "TransformerEncoder"
    shown = ", ".join([*state][:3]) or "none"
    raise WeightsError(subject, [f"expected names like layers.0.… or encoder.layers.0.…, got {shown}"])


def _count(state: Mapping[str, Array], side: str) -> int:
    """How many layers the names speak of; at least 1, so that what is missing has a name."""
    start = f"{side}layers."
    numbers = {name.removeprefix(start).partition(".")[0] for name in state if name.startswith(start)}
    return max(len(numbers), 1)


def _shapes(config: StackConfig, kind: Kind, counts: Mapping[str, int]) -> dict[str, Shape]:
    """Every leaf of the stacks, by our path."""
    found: dict[str, Shape] = {}
    for side, crosses in _sides(kind).items():
        leaves = stack_parameters(config, counts[side], cross_attention=crosses, prefix=side)
        found |= {path: leaf.shape for path, leaf in leaves.items()}
    return found


def _names(config: StackConfig, kind: Kind, counts: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Their names of all tensors, and which leaves of ours each holds."""
    found: dict[str, tuple[str, ...]] = {}
    for side, crosses in _sides(kind).items():
        for i in range(counts[side]):
            found |= dict(_layer(f"{side}layers.{i}.", f"{side}blocks.{i}.", crosses, config.qkv_bias))
        if config.final_norm:
            found |= dict(_part(f"{side}norm.", f"{side}final_norm.", config.qkv_bias))
    return found


def _layer(theirs: str, ours: str, crosses: bool, has_bias: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    attentions = {"self_attn": "attention"} | ({"multihead_attn": "cross_attention"} if crosses else {})
    norms = [f"{name}_norm" for name in attentions.values()] + ["feedforward_norm"]
    for their_name, our_name in attentions.items():
        for leaf in ("weight", "bias") if has_bias else ("weight",):
            parts = tuple(f"{ours}{our_name}.{part}.{leaf}" for part in ("query", "key", "value"))
            yield f"{theirs}{their_name}.in_proj_{leaf}", parts
        yield from _part(f"{theirs}{their_name}.out_proj.", f"{ours}{our_name}.output.", has_bias)
    yield from _part(f"{theirs}linear1.", f"{ours}feedforward.up.", has_bias)
    yield from _part(f"{theirs}linear2.", f"{ours}feedforward.down.", has_bias)
    for number, name in enumerate(norms, start=1):
        yield from _part(f"{theirs}norm{number}.", f"{ours}{name}.", has_bias)


def _part(theirs: str, ours: str, has_bias: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    for leaf in ("weight", "bias") if has_bias else ("weight",):
        yield theirs + leaf, (ours + leaf,)


# ---- what these classes can be


def _check_expressible(stacks: Stacks) -> None:
    config = stacks.config
    problems = Problems(f"a {stacks.kind} of torch.nn", ConfigError)
    D, A, has_bias = config.model_dim, config.num_heads, config.qkv_bias
    wanted: dict[str, tuple[Any, ...]] = {
        "norm": ("layernorm",),
        "norm_placement": ("pre", "post"),
        "norm_weight": ("plain",),
        "norm_cast": ("after_weight",),
        "gated": (False,),
        "num_kv_heads": (A,),
        "key_dim": (D // A,),
        "value_dim": (D // A,),
        "attention_scale": (None, config.key_dim**-0.5),
        "attention_softcap": (None,),
        "qk_norm": ("none",),
        "window": (None,),
        "positions": ("none", "sinusoidal", "learned"),  # the last two are added to the embeddings
        "output_bias": (has_bias,),
        "feedforward_bias": (has_bias,),
        "norm_bias": (has_bias,),
        "attention_dropout": (config.dropout,),
        "hidden_dropout": (config.dropout,),
    }
    for name, options in wanted.items():
        value = getattr(config, name)
        shown = " or ".join(repr(option) for option in options)
        problems.expect(value in options, f"{name}: expected {shown}, got {value!r}")
    problems.expect(D % A == 0, f"model_dim: expected a multiple of num_heads={A}, got {D}")
    if stacks.kind == "Transformer":
        problems.expect(config.final_norm, f"final_norm: expected True, got {config.final_norm}")
        got = stacks.num_encoder_layers
        problems.expect(got >= 1, f"num_encoder_layers: expected at least 1, got {got}")
    problems.raise_if_any()
