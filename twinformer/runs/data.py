"""What a run learns from: ``--data`` specifications, and what each of them proposes where nothing was said.

``guitar-tab`` (built in), ``guitar:FILE`` (pieces as note tokens), ``text:FILE``, ``pairs:FILE`` and ``masked:FILE``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twinformer.config import Architecture
from twinformer.data.batch import Dataset
from twinformer.errors import ConfigError, Problems
from twinformer.runs.options import RunOptions
from twinformer.runs.sampling import Show

#: kind -> the architectures that it can be learnt with, its own first
KINDS: dict[str, tuple[Architecture, ...]] = {
    "guitar-tab": ("encoder", "encoder-decoder", "decoder"),
    "guitar": ("decoder",),
    "text": ("decoder",),
    "pairs": ("encoder-decoder", "decoder"),
    "masked": ("encoder",),
}
_WITHOUT_FILE = ("guitar-tab",)
#: options that vary what is learnt from -> the kinds that can be varied so
_VARIED = {"variety": ("guitar-tab", "guitar"), "exchange": ("guitar",), "exchange_epochs": ("guitar",)}


@dataclass(frozen=True)
class RunData:
    """The data of a run. ``model``: the fields of ModelConfig that it asks for; ``usual``: those that it proposes for a
    model that is made anew. ``beside``: files, by name, that belong
    into a model directory with a model that learnt from it (a tokenizer). ``notes`` are for people; ``show`` gives
    samples of what a model makes of the validation part.
    """

    train: Dataset
    valid: Dataset
    model: Mapping[str, Any]
    usual: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    beside: Mapping[str, bytes] = field(default_factory=dict)
    show: Show | None = None


def parse(spec: str, *, there: bool = True) -> tuple[str, Path | None]:
    """Kind and file of a specification. Raises ConfigError for one that is none, or whose file is not ``there``."""
    kind, colon, name = spec.partition(":")
    problems = Problems("data", ConfigError)
    wanted = ", ".join(one if one in _WITHOUT_FILE else f"{one}:FILE" for one in KINDS)
    if kind not in KINDS or (kind in _WITHOUT_FILE) == bool(colon):
        problems.add(f"expected one of {wanted}, got {spec!r}")
    elif there and colon and not Path(name).is_file():
        problems.add(f"expected a file behind {kind}:, got nothing by the name {name!r}")
    problems.raise_if_any()
    return kind, Path(name) if colon else None


def with_defaults(options: RunOptions) -> RunOptions:
    """The options with everything filled in that the data proposes."""
    kind, _ = parse(options.data)
    architecture = options.architecture or KINDS[kind][0]
    problems = Problems("data", ConfigError)
    problems.expect(
        architecture in KINDS[kind],
        f"architecture: expected one of {', '.join(KINDS[kind])} with data {options.data!r}, got {architecture!r}",
    )
    if options.valid is not None:
        problems.expect(kind not in _WITHOUT_FILE, f"valid: expected none with data {kind!r}, got {options.valid!r}")
        problems.expect(
            kind in _WITHOUT_FILE or Path(options.valid).is_file(), f"valid: expected a file, got {options.valid!r}"
        )
    for name, kinds in _VARIED.items():
        value = getattr(options, name)
        wanted = f"expected 0 or nothing with data {options.data!r} (it is for {' and '.join(kinds)})"
        problems.expect(kind in kinds or not value, f"{name}: {wanted}, got {value}")
    problems.expect(
        options.exchange > 0 or not options.exchange_epochs or kind != "guitar",
        f"exchange_epochs: expected a share to exchange with it (exchange), got {options.exchange_epochs} alone",
    )
    problems.raise_if_any()
    options = options.with_defaults({"architecture": architecture, **_PROPOSED[kind]})
    assert options.steps is not None
    return options.with_defaults({"schedule": {"warmup_steps": min(200, options.steps // 10)}})


_TEXT: dict[str, Any] = {
    "steps": 2000,
    "batch_size": 16,
    "length": 128,
    "dropout": 0.1,
    "best_by": "loss",
    "schedule": {"peak": 1e-3, "final_fraction": 0.1},
    "optimizer": {"weight_decay": 0.1, "beta2": 0.98},
}
_PROPOSED: dict[str, dict[str, Any]] = {
    "guitar-tab": {
        "steps": 2400,
        "batch_size": 64,
        "dropout": 0.1,
        "variety": 0.8,
        "best_by": "accuracy",
        "schedule": {"peak": 2e-3, "final_fraction": 0.02},
        "optimizer": {"weight_decay": 0.05, "beta2": 0.98},
    },
    "guitar": {**_TEXT, "batch_size": 12, "length": 256},
    "text": _TEXT,
    "pairs": {**_TEXT, "batch_size": 32, "length": 64},
    "masked": _TEXT,
}


def open_data(options: RunOptions, place: Path) -> RunData:
    """The data of a run whose options are complete.

    ``place``: a directory for what is made of a file once (ids, a tokenizer); what is there by now is taken as it is,
    and the file is not looked at again.
    """
    kind, file = parse(options.data, there=False)
    if file is None:
        from twinformer.runs.guitar import tablature

        return tablature(options)
    if kind == "guitar":
        from twinformer.runs.guitar import pieces

        return pieces(options, file, place)
    from twinformer.runs import texts

    open_it = {"text": texts.text, "pairs": texts.pairs, "masked": texts.masked}[kind]
    return open_it(options, file, place)
