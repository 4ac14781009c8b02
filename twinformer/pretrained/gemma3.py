"""Gemma 3, text only (Gemma Team 2025, arXiv:2503.19786), as ``transformers`` publishes it: ``Gemma3ForCausalLM`` and
its kin, ``model_type`` ``gemma3_text``.

What differs from Gemma 2: RMSNorm on each query and key before it turns; five blocks with the window, then one
without; blocks with the window turn by a base of their own, without scaling; no cap of scores (the library reads
``attn_logit_softcapping`` and does not apply it: we refuse a value).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinformer.config import ModelConfig
from twinformer.errors import ConfigError, Problems
from twinformer.pretrained import llama_like as shared
from twinformer.pretrained.decoder import FULL, SLIDING, Heads, windows
from twinformer.pretrained.family import Family, Field, only
from twinformer.pretrained.gemma import TANH
from twinformer.pretrained.gemma2 import GEMMA2_FIELDS, gemma2_choices, gemma2_values
from twinformer.pretrained.rope import problems_of, scaling_of, scaling_parameters

_HEADS = Heads("Gemma3TextModel", "Gemma3ForCausalLM", "Gemma3TextForSequenceClassification", None, tied=True)
_GLOBAL_BASE, _LOCAL_BASE = 1_000_000.0, 10_000.0


def _check_full(parameters: Any) -> str | None:
    """Rotary parameters of the blocks without window, but for two spellings that the library does not heed."""
    if "type" in parameters and "rope_type" not in parameters:
        return f"expected rope_type, which is what counts here, got type {parameters['type']!r} alone"
    if parameters.get("truncate") is False:
        return "truncate: expected True, got False"
    return problems_of(parameters)


def _check_rope(parameters: Any) -> str | None:
    """Rotary parameters for each kind of block; those with the window are not scaled."""
    found = [f"{name}: unexpected, got {parameters[name]!r}" for name in parameters if name not in (FULL, SLIDING)]
    for name, check in ((FULL, _check_full), (SLIDING, lambda held: problems_of(held, ("default",)))):
        held = parameters.get(name)
        if held is not None:
            wrong = check(held) if isinstance(held, dict) else f"expected an object, got {held!r}"
            found += [f"{name}: {wrong}"] if wrong else []
    return "; ".join(found) or None


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The old fields are ``rope_theta`` and ``rope_scaling`` of the blocks without window, ``rope_local_base_freq``."""
    new = values["rope_parameters"] or {}
    problems = Problems("gemma3_text", ConfigError)
    held = dict(new.get(FULL) or {})
    for name, value in (values["rope_scaling"] or {}).items():
        problems.expect(
            held.get(name, value) == value, f"rope_scaling: expected {name} {held.get(name)!r}, got {value!r}"
        )
        held[name] = value
    bases = []
    for field, inner, default in (
        ("rope_theta", held.get("rope_theta"), _GLOBAL_BASE),
        ("rope_local_base_freq", (new.get(SLIDING) or {}).get("rope_theta"), _LOCAL_BASE),
    ):
        outer = values[field]
        problems.expect(
            inner is None or outer is None or inner == outer,
            f"{field}: expected {inner!r} (as in rope_parameters), got {outer!r}",
        )
        bases.append(float(next(base for base in (inner, outer, default) if base is not None)))
    problems.raise_if_any()
    return {
        "positions": "rotary",
        "rotary_base": bases[0],
        "window_rotary_base": bases[1],
        "rotary_scaling": scaling_of(held, values["max_position_embeddings"]),
    }


def _to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    shared.divisible(values, "gemma3_text")
    choices = shared.llama_to_config(values, _HEADS, "hidden_activation")
    L, period = values["num_hidden_layers"], values["sliding_window_pattern"]
    types = values["layer_types"]
    if types is None:
        types = [SLIDING if (layer + 1) % period else FULL for layer in range(L)]
    found = {
        **choices,
        **_rope(values),
        **gemma2_choices(values, choices["head"]),
        **windows("gemma3_text", types, values["sliding_window"], L),
        "qk_norm": "rmsnorm",
    }
    if "window" not in found:
        del found["window_rotary_base"]
    return found


def _from_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **shared.llama_from_config(config, "gemma3_text", _HEADS, "hidden_activation"),
        **gemma2_values(config),
        "rope_theta": config.rotary_base,
        "rope_local_base_freq": config.window_rotary_base or _LOCAL_BASE,
        "rope_scaling": scaling_parameters(config.rotary_scaling),
    }


FAMILY = Family(
    model_type="gemma3_text",
    fields={
        **shared.llama_fields(_HEADS, kv_heads=4, head_dim=256, activation=TANH, activation_field="hidden_activation"),
        **GEMMA2_FIELDS,
        "final_logit_softcapping": Field(float, default=None, nullable=True),
        "attn_logit_softcapping": only(None),
        "sliding_window_pattern": Field(int, default=6, minimum=1),
        "rope_theta": Field(float, default=None, nullable=True),
        "rope_local_base_freq": Field(float, default=None, nullable=True),
        "rope_scaling": Field(dict, default=None, nullable=True, check=_check_full),
        "rope_parameters": Field(dict, default=None, nullable=True, check=_check_rope),
    },
    # as the library notes it beside layer_types
    without_effect=frozenset(["cache_implementation", "_sliding_window_pattern"]),
    to_config=_to_config,
    from_config=_from_config,
    names=(
        *shared.OUTER,
        *shared.SANDWICH_NORMS,
        *shared.ATTENTION,
        *shared.HEAD_NORMS,
        *shared.FEEDFORWARD,
        *_HEADS.names(),
    ),
    prefixes=(shared.PREFIX,),
    body_prefix=shared.PREFIX,
    copies=shared.COPIES,
    left_out=shared.LEFT_OUT,
    buffers=shared.BUFFERS,
)
