"""How a published sentence encoder makes one vector of a text: the format of the ``sentence-transformers`` library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from twinformer.checkpoint import CONFIG_FILE
from twinformer.errors import ConfigError, Problems
from twinformer.pretrained.family import Field, one_of
from twinformer.pretrained.files import read_json, read_json_object

Kind = Literal["mean", "cls", "max"]
_MODES: dict[str, Kind] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}


@dataclass(frozen=True)
class Pooling:
    """How a sentence encoder makes one vector of its hidden states ``[B, T, D]`` (data only: no arithmetic here).

    ``mean``: the mean over real tokens, special ones included; ``cls``: the first token's state; ``max``: the largest
    value of each feature over real tokens. ``normalize``: then divided by its L2 norm. ``max_length``: the number of
    tokens, special ones included, after which the published model cuts its input, or None.
    (Reimers & Gurevych 2019, arXiv:1908.10084, section 3.)
    """

    kind: Kind
    normalize: bool
    max_length: int | None


def read_pooling(directory: Path, model_dim: int) -> Pooling | None:
    """What ``modules.json`` says follows the encoder; None without that file.

    The format of the ``sentence-transformers`` library. Raises CheckpointError or ConfigError naming every part that is
    not a transformer, one pooling of a supported kind and at most one normalisation.
    """
    file = directory / "modules.json"
    if not file.is_file():
        return None
    modules = read_json(file)
    problems = Problems(str(file), ConfigError)
    parts: list[tuple[str, Path]] = []
    for module in modules if isinstance(modules, list) else [modules]:
        kind, path = (module.get("type"), module.get("path")) if isinstance(module, dict) else (None, None)
        good = problems.expect(
            isinstance(kind, str) and isinstance(path, str) and _is_inside(path),
            f"expected modules with a type and a path inside the directory, got {module!r}",
        )
        if good:
            parts.append((str(kind).rsplit(".", 1)[-1], directory / str(path)))
    kinds = [kind for kind, _ in parts]
    problems.expect(
        kinds in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]),
        f"expected the modules Transformer, Pooling and perhaps Normalize, got {', '.join(kinds) or 'none'}",
    )
    problems.raise_if_any()
    problems.expect(parts[0][1] == directory, f"Transformer: expected path '', got {parts[0][1].name!r}")
    problems.raise_if_any()
    kind = _pooling_kind(parts[1][1] / CONFIG_FILE, model_dim)
    limit = None
    limits = directory / "sentence_bert_config.json"
    if limits.is_file():
        limit = read_json_object(limits).get("max_seq_length")
        if limit is not None and (problem := Field(int, minimum=1).problem("max_seq_length", limit)):
            raise ConfigError(str(limits), [problem])
    return Pooling(kind=kind, normalize=len(parts) == 3, max_length=limit)


def _pooling_kind(file: Path, model_dim: int) -> Kind:
    values = read_json_object(file)
    problems = Problems(str(file), ConfigError)
    # older files switch one mode on, newer ones name the kind
    asked: dict[str, Any] = {
        name: value for name, value in values.items() if name.startswith("pooling_mode") and value is not False
    }
    kind: Kind | None = None
    if len(asked) == 1:
        ((name, value),) = asked.items()
        if name == "pooling_mode":
            kind = value if value in get_args(Kind) else None
        else:
            kind = _MODES.get(name) if value is True else None
    problems.expect(
        kind is not None,
        f"expected one pooling mode, {one_of(get_args(Kind))}, got {asked or 'none'}",
    )
    width = values.get("word_embedding_dimension", values.get("embedding_dimension", model_dim))
    problems.expect(width == model_dim, f"word_embedding_dimension: expected {model_dim}, got {width!r}")
    prompt = values.get("include_prompt", True)
    problems.expect(prompt is True, f"include_prompt: expected True, got {prompt!r}")
    problems.raise_if_any()
    assert kind is not None
    return kind


def _is_inside(path: str) -> bool:
    parts = PurePosixPath(path.replace("\\", "/"))
    return not parts.is_absolute() and ".." not in parts.parts
