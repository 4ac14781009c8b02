"""Rotary positions as published: the old fields ``rope_theta`` and ``rope_scaling``, and the new ``rope_parameters``.

``transformers`` up to 4.x keeps the base beside ``rope_scaling``, which is null or names a kind (``rope_type``, earlier
``type``) with its numbers. From 5.0 on, ``rope_parameters`` holds the base too. Both are read; we write the old
fields, which every version reads. Kinds that depend on the length of the text at hand (``dynamic``, ``longrope``) are
refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from twinformer.config import ModelConfig, RotaryScaling
from twinformer.errors import ConfigError, Problems
from twinformer.pretrained.family import Field, one_of

KINDS = ("default", "linear", "llama3", "yarn")
_NUMBER = Field(float)
# what each kind uses; the others' numbers may stand there and play no part, as in the library
_USED: dict[str, dict[str, Field]] = {
    "default": {},
    "linear": {"factor": _NUMBER},
    "llama3": {"factor": _NUMBER, "low_freq_factor": _NUMBER, "high_freq_factor": _NUMBER},
    "yarn": {
        "factor": Field(float, default=None, nullable=True),
        "attention_factor": Field(float, default=None, nullable=True),
        "beta_fast": Field(float, default=None, nullable=True),
        "beta_slow": Field(float, default=None, nullable=True),
        "mscale": Field(float, default=None, nullable=True),
        "mscale_all_dim": Field(float, default=None, nullable=True),
        "truncate": Field(bool, default=True),
    },
}
_ALWAYS = {
    "rope_theta": Field(float, default=None, nullable=True),
    "original_max_position_embeddings": Field(int, default=None, nullable=True, minimum=1),
    "partial_rotary_factor": Field(float, default=None, nullable=True),
    "mrope_section": Field(list, default=None, allowed=(None,)),
}
_OTHERS = {"short_factor", "long_factor"}.union(*_USED.values())


def problems_of(parameters: Mapping[str, Any], kinds: tuple[str, ...] = KINDS, partial: bool = False) -> str | None:
    """What is wrong with one set of rotary parameters: its kind, the numbers that the kind uses, keys nobody knows."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in kinds:
        return f"expected rope_type {one_of(kinds)}, got {kind!r}"
    fields = _ALWAYS | _USED[kind]
    if not partial:
        fields = fields | {"partial_rotary_factor": Field(float, default=None, allowed=(None, 1.0, 1))}
    found = []
    for name, field in fields.items():
        if name in parameters:
            found.append(field.problem(name, parameters[name]))
        elif field.required:
            found.append(f"{name}: missing (rope_type {kind!r} needs it)")
    known = fields.keys() | _OTHERS | {"rope_type", "type"}
    found += [f"{name}: unexpected, got {value!r}" for name, value in parameters.items() if name not in known]
    return "; ".join(problem for problem in found if problem is not None) or None


def rope_fields(kinds: tuple[str, ...] = KINDS, *, partial: bool = False) -> dict[str, Field]:
    """The fields of a family whose blocks all turn alike. ``partial``: it can turn a part of each head."""
    whole = Field(float, default=None, allowed=(None, 1.0, 1))

    def check(parameters: Any) -> str | None:
        return problems_of(parameters, kinds, partial)

    return {
        "rope_theta": Field(float, default=None, nullable=True),
        "rope_scaling": Field(dict, default=None, nullable=True, check=check),
        "rope_parameters": Field(dict, default=None, nullable=True, check=check),
        "partial_rotary_factor": Field(float, default=None, nullable=True) if partial else whole,
        "original_max_position_embeddings": Field(int, default=None, nullable=True, minimum=1),
    }


def rope_to_config(subject: str, values: Mapping[str, Any], key_dim: int, base: float = 10000.0) -> dict[str, Any]:
    """Our rotary choices. ``base`` is what the absence of ``rope_theta`` means.

    Raises ConfigError where the old and the new fields say different things.
    """
    problems = Problems(subject, ConfigError)
    old, new = values["rope_scaling"], values["rope_parameters"]
    problems.expect(not (old and new) or old == new, f"rope_parameters: expected rope_scaling's {old!r}, got {new!r}")
    parameters = old or new or {}
    for name in ("rope_theta", "partial_rotary_factor"):
        inner, outer = parameters.get(name), values[name]
        problems.expect(
            inner is None or outer is None or inner == outer,
            f"{name}: expected {inner!r} (as in rope_parameters), got {outer!r}",
        )
    problems.raise_if_any()
    part = _first(parameters.get("partial_rotary_factor"), values["partial_rotary_factor"], 1.0)
    length = values["original_max_position_embeddings"]
    if length is not None:  # what stands outside counts
        parameters = {**parameters, "original_max_position_embeddings": length}
    return {
        "positions": "rotary",
        "rotary_base": float(_first(parameters.get("rope_theta"), values["rope_theta"], base)),
        "rotary_dim": int(key_dim * part),
        "rotary_scaling": scaling_of(parameters, values["max_position_embeddings"]),
    }


def scaling_of(parameters: Mapping[str, Any], context_length: int) -> RotaryScaling:
    """Our scaling for one set of rotary parameters (that ``problems_of`` found good)."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return RotaryScaling()
    if kind == "linear":
        return RotaryScaling(kind="linear", factor=parameters["factor"])
    original = _first(parameters.get("original_max_position_embeddings"), context_length)
    if kind == "llama3":
        return RotaryScaling(
            kind="llama3",
            original_context_length=original,
            **{name: parameters[name] for name in ("factor", "low_freq_factor", "high_freq_factor")},
        )
    factor = _first(parameters.get("factor"), context_length / original)
    return RotaryScaling(
        kind="yarn",
        original_context_length=original,
        factor=factor,
        beta_fast=parameters.get("beta_fast") or 32.0,
        beta_slow=parameters.get("beta_slow") or 1.0,
        attention_factor=_yarn_attention(parameters, factor),
        truncate=parameters.get("truncate", True),
    )


def _yarn_attention(parameters: Mapping[str, Any], factor: float) -> float:
    """YaRN's factor of cosine and sine, ``0.1 ln(factor) + 1`` unless given (Peng et al. 2023, section 3.4).

    ``mscale`` and ``mscale_all_dim``, where both are there, weigh the logarithm in a quotient of two such factors.
    """

    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    over, under = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return grown(over) / grown(under) if over and under else grown(1)


def frequencies(config: ModelConfig) -> npt.NDArray[np.float64]:
    """The frequencies ``base ** (-2i / R)`` before scaling: what older files hold as ``inv_freq`` of each block."""
    R = config.rotary_dim
    return np.asarray(config.rotary_base ** -(np.arange(0, R, 2) / R))


def rope_from_config(config: ModelConfig) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``."""
    return {"rope_theta": config.rotary_base, "rope_scaling": scaling_parameters(config.rotary_scaling)}


def scaling_parameters(scaling: RotaryScaling) -> dict[str, Any] | None:
    """A scaling of ours as published."""
    if scaling.kind == "none":
        return None
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return values
    values["original_max_position_embeddings"] = scaling.original_context_length
    if scaling.kind == "llama3":
        return values | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    return values | {
        "attention_factor": scaling.attention_factor,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
    }


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)
