"""What a model directory holds, told without loading it: sizes, memory, conventions, what would be left out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinformer import pretrained
from twinformer.checkpoint import read_config
from twinformer.config import ModelConfig
from twinformer.ledger import LEDGER
from twinformer.parameters import model_parameters
from twinformer.pretrained.published import Opener

WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Inspection:
    """``family`` None: a directory of ours. ``counts`` by part, ``conventions`` by name of the ledger."""

    family: str | None
    config: ModelConfig
    counts: dict[str, int]
    estimate: int
    conventions: dict[str, tuple[str, dict[str, Any]]]
    left_out: tuple[str, ...] = ()
    unknown_fields: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(self.counts.values())

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the weights by dtype."""
        return {dtype: self.parameters * width for dtype, width in WIDTHS.items()}

    @property
    def cache_per_token(self) -> int | None:
        """Bytes of keys and values that one further token adds to a cache, in the file's dtype; None for an encoder."""
        config = self.config
        if config.architecture == "encoder":
            return None
        values = config.num_layers * config.num_kv_heads * (config.key_dim + config.value_dim)
        return values * WIDTHS[config.param_dtype]

    def to_dict(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "architecture": self.config.architecture,
            "parameters": self.parameters,
            "counts": self.counts,
            "estimate": self.estimate,
            "memory": self.memory,
            "cache_per_token": self.cache_per_token,
            "config": self.config.to_dict(),
            "conventions": {
                name: {"here": here, "fields": fields} for name, (here, fields) in self.conventions.items()
            },
            "left_out": list(self.left_out),
            "unknown_fields": list(self.unknown_fields),
        }


def inspect(directory: Path, *, open_pickled: Opener | None = None) -> Inspection:
    """A published directory or one of ours. Only headers are read, no values.

    Raises CheckpointError, ConfigError (every field that is not supported, with the value met) or WeightsError.
    """
    family: str | None = None
    left_out: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    if pretrained.is_published(directory):
        with pretrained.open(directory, open_pickled=open_pickled) as opened:
            config = opened.config
            family, left_out, unknown = opened.family, opened.left_out, opened.unknown_fields
    else:
        config = read_config(directory)
    return Inspection(family, config, counts(config), estimate(config), conventions(config), left_out, unknown)


def counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by part: embeddings, each block, what stands between, the head."""
    found: dict[str, int] = {}
    for path, parameter in model_parameters(config).items():
        parts = path.split(".")
        if "blocks" in parts:
            name = ".".join(parts[: parts.index("blocks") + 2])
        elif parts[0].endswith("embedding"):
            name = f"{parts[0]}.{parts[1]}"
        else:
            name = parts[0] if parts[0] == "head" else ".".join(parts[:2])
        size = 1
        for extent in parameter.shape:
            size *= extent
        found[name] = found.get(name, 0) + size
    return found


def estimate(config: ModelConfig) -> int:
    """``12 L D²``: a block of four attention matrices and a feed-forward layer of 4 D, without tables and norms (book,
    chapter "Large Language Models", "Scaling laws"). A decoder that crosses to an encoder has 16 D² a block.
    """
    each = 16 if config.architecture == "encoder-decoder" else 12
    return (12 * config.num_encoder_layers + each * config.num_layers) * config.model_dim**2


def conventions(config: ModelConfig) -> dict[str, tuple[str, dict[str, Any]]]:
    """Every choice of the ledger that has fields, with the values that this model fixes."""
    values = config.to_dict()
    return {
        choice.name: (choice.here, {name: values[name] for name in choice.fields}) for choice in LEDGER if choice.fields
    }
