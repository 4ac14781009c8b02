"""Which model a run trains: the data's sizes, the run's choices, and what it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinformer import pretrained
from twinformer.checkpoint import CONFIG_FILE, Tensors, read_model, read_text
from twinformer.config import ModelConfig
from twinformer.errors import ConfigError, Problems
from twinformer.presets import PRESETS, preset
from twinformer.runs.options import RunOptions

#: what a model is like where neither the data nor the options say
_USUAL = {
    "model_dim": 128,
    "num_layers": 4,
    "num_heads": 4,
    "activation": "gelu",
    "positions": "rotary",
    "initializer_scale_residual": True,
}
#: fields that the data decides
_SIZES = ("architecture", "vocab_size", "source_vocab_size", "context_length")


def model_config(
    options: RunOptions, asked: Mapping[str, Any], usual: Mapping[str, Any]
) -> tuple[ModelConfig, Tensors | None]:
    """The configuration, and weights where the run starts from a model directory.

    ``asked``: the fields that the data asks for; ``usual``: those that it proposes for a new model. A preset or a
    config.json gives choices, whose vocabulary and context become the data's; a model directory gives weights, and must
    fit. Raises ConfigError, CheckpointError, WeightsError.
    """
    weights = None
    if options.start_from is None:
        values = _resolved({**_USUAL, **usual, **asked, **options.model})
    else:
        base, weights = _base(options.start_from)
        if weights is None:
            values = {**base.to_dict(), **_with_dependent(base, asked, options.model)}
        else:
            _check_fits(base, asked, options)
            values = {**base.to_dict(), **_longer(base, asked), **options.model}
    if options.dropout is not None:
        values |= {"dropout": options.dropout, **{k: v for k, v in options.model.items() if k == "dropout"}}
    values |= {"param_dtype": options.dtype, "compute_dtype": options.dtype}
    values["rotary_scaling"] = _scaling(values.get("rotary_scaling"))
    if values["rotary_scaling"] is None:
        del values["rotary_scaling"]
    try:
        return ModelConfig(**values), weights
    except TypeError as error:
        raise ConfigError("model", [f"expected the fields of a model, got: {error}"]) from None


def _resolved(values: dict[str, Any]) -> dict[str, Any]:
    """Sizes that follow from others where they are not given: K = D / A, F = 4 D."""
    D, A = values["model_dim"], values["num_heads"]
    if isinstance(D, int) and isinstance(A, int) and A > 0:
        values.setdefault("key_dim", D // A)
        values.setdefault("hidden_dim", 4 * D)
    return values


def _with_dependent(base: ModelConfig, asked: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, Any]:
    """What the data and the options change in a base, with the sizes that follow from a change of D or A."""
    changes = {**asked, **mine}
    if asked.get("architecture", base.architecture) != base.architecture:
        changes.setdefault("num_encoder_layers", None)
    if "source_vocab_size" not in changes:
        changes["source_vocab_size"] = None
    if "model_dim" in mine or "num_heads" in mine:
        D, A = changes.get("model_dim", base.model_dim), changes.get("num_heads", base.num_heads)
        changes = {"num_kv_heads": None, "value_dim": None, "rotary_dim": None, **changes}
        changes.setdefault("key_dim", D // A)
        if "model_dim" in mine:
            changes.setdefault("hidden_dim", 4 * D)
    return changes


def _base(name: str) -> tuple[ModelConfig, Tensors | None]:
    """A preset, a config.json, or a model directory (of ours, or a published one) with its weights."""
    place = Path(name)
    if name in PRESETS:
        return preset(name), None
    if place.is_file():
        return ModelConfig.from_json(read_text(place)), None
    if not (place / CONFIG_FILE).is_file():
        wanted = f"a model directory, a config.json or a preset ({', '.join(PRESETS)})"
        raise ConfigError("start_from", [f"expected {wanted}, got {name!r}"])
    if pretrained.is_published(place):
        published = pretrained.read(place)
        return published.config, dict(published.tensors)
    return read_model(place)


def _check_fits(base: ModelConfig, asked: Mapping[str, Any], options: RunOptions) -> None:
    """A model that has learnt something can be trained on data of its own kind and vocabulary."""
    problems = Problems(f"start_from {options.start_from}", ConfigError)
    for name in _SIZES:
        if name not in asked:
            continue
        have, want = getattr(base, name), asked[name]
        good = have == want or (name == "context_length" and (have >= want or _has_no_table(base)))
        more = " or more" if name == "context_length" else ""
        problems.expect(good, f"{name}: expected {want!r}{more} for data {options.data!r}, got {have!r}")
    problems.expect(base.predicts_tokens, f"head: expected a model that predicts tokens, got head {base.head!r}")
    problems.raise_if_any()


def _longer(base: ModelConfig, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The context that the data ask for, of a model that can have a longer one than it had."""
    want = asked.get("context_length", 0)
    return {"context_length": want} if want > base.context_length and _has_no_table(base) else {}


def _has_no_table(base: ModelConfig) -> bool:
    """Whether positions are a formula, which has no end; a learned table has."""
    return base.positions != "learned"


def _scaling(value: Any) -> Any:
    """A table of a file, or a config's own, as the config takes it."""
    from twinformer.config import RotaryScaling

    return RotaryScaling(**value) if isinstance(value, Mapping) else value
