"""The machinery that all families share: a published directory -> our configuration and tensors, and back.

A published model directory holds ``config.json`` (with a ``model_type``) and ``model.safetensors``, whole or in
shards, as the ``transformers`` library writes them. What differs between families is declared in their files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from twinformer.checkpoint import CONFIG_FILE, WEIGHTS_FILE, write_atomically
from twinformer.config import DType, ModelConfig
from twinformer.errors import CheckpointError, ConfigError, Problems, TwinformerError, WeightsError
from twinformer.parameters import model_parameters
from twinformer.pretrained.family import BOOKKEEPING, REQUIRED, Array, Family, Name, Shape, one_of
from twinformer.pretrained.files import FLOAT_DTYPES, Stored, has_safetensors, open_tensors, read_json_object
from twinformer.pretrained.pooling import Pooling, read_pooling

_PIECE = 2**22
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")


@dataclass(frozen=True)
class Pretrained:
    """A published model in our terms.

    ``tensors`` holds every leaf of the model by our path, in PyTorch's orientation and in the dtype that the file
    stores. ``config`` has that dtype as param_dtype and compute_dtype (where leaves differ: the narrowest
    that holds them all). ``left_out`` names the tensors of the file that play no part in our model, as the file
    spells them; ``unknown_fields`` those of config.json that the family does not know. ``tokenizer`` is the
    directory with the tokenizer's files, or None.
    """

    family: str
    config: ModelConfig
    tensors: dict[str, Array]
    left_out: tuple[str, ...] = ()
    unknown_fields: tuple[str, ...] = ()
    tokenizer: Path | None = None
    pooling: Pooling | None = None


@dataclass(frozen=True)
class Published:
    """A model in the terms of its family: ``config.json`` as a mapping, tensors by published name."""

    config: dict[str, Any]
    tensors: dict[str, Array]


# ---- reading


@dataclass(frozen=True)
class Opened:
    """A published model whose headers were judged and whose values are still in the file.

    ``leaves()`` gives every leaf by our path, one after the other, in the order of the model: no more than one
    published tensor is held at a time. It raises WeightsError at its end where values are wrong.
    """

    family: str
    config: ModelConfig
    left_out: tuple[str, ...]
    unknown_fields: tuple[str, ...]
    tokenizer: Path | None
    pooling: Pooling | None
    leaves: Callable[[], Iterator[tuple[str, Array]]]


#: opens the tensors of a directory that has no safetensors: pickles, which take PyTorch to read
Opener = Callable[[Path], AbstractContextManager[dict[str, Stored]]]


def read_directory(directory: Path, families: Mapping[str, Family], open_pickled: Opener | None = None) -> Pretrained:
    """A published model directory in our terms: what ``twinformer.pretrained.read`` gives."""
    with open_directory(directory, families, open_pickled) as opened:
        tensors = dict(opened.leaves())
        paths = model_parameters(opened.config)
        return Pretrained(
            family=opened.family,
            config=opened.config,
            tensors={path: tensors[path] for path in paths},
            left_out=opened.left_out,
            unknown_fields=opened.unknown_fields,
            tokenizer=opened.tokenizer,
            pooling=opened.pooling,
        )


@contextlib.contextmanager
def open_directory(
    directory: Path, families: Mapping[str, Family], open_pickled: Opener | None = None
) -> Iterator[Opened]:
    """A published model directory with its values unread: what ``twinformer.pretrained.open`` gives."""
    file = directory / CONFIG_FILE
    values = read_json_object(file)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in families:
        raise ConfigError(str(file), [f"model_type: expected {one_of(sorted(families))}, got {model_type!r}"])
    family = families[model_type]
    config, unknown = translate(family, values, str(file))
    pooling = read_pooling(directory, config.model_dim)
    reader = open_tensors if has_safetensors(directory) or open_pickled is None else open_pickled
    with reader(directory) as stored:
        config = family.settled(config, stored)
        plan = _plan(family, config, stored, str(directory))
        kept = {FLOAT_DTYPES[stored[plan.spelled[name]].dtype] for name in plan.expected}
        yield Opened(
            family=model_type,
            config=config.with_dtype(_common_dtype(kept)),
            left_out=tuple(plan.left_out),
            unknown_fields=tuple(unknown),
            tokenizer=directory if any((directory / name).is_file() for name in _TOKENIZER_FILES) else None,
            pooling=pooling,
            leaves=lambda: _leaves(family, config, stored, plan, str(directory)),
        )


def translate(family: Family, values: Mapping[str, Any], subject: str = CONFIG_FILE) -> tuple[ModelConfig, list[str]]:
    """Our configuration for the fields of a published ``config.json``, and the fields that nobody knows.

    The dtypes are float32: the tensors say theirs. Raises ConfigError naming every field that is missing, of the wrong
    kind or set to something that is not supported.
    """
    problems = Problems(subject, ConfigError)
    used = {}
    for name, wanted in family.fields.items():
        if name not in values and wanted.required:
            problems.add(f"{name}: missing")
        value = values.get(name, wanted.default)
        if value is not REQUIRED:
            problem = wanted.problem(name, value)
            problems.expect(problem is None, problem or "")
            used[name] = value
    problems.raise_if_any()
    known = family.fields.keys() | family.without_effect | BOOKKEEPING
    try:
        config = ModelConfig(**family.to_config(used))
    except ConfigError as error:
        raise ConfigError(subject, error.problems) from None
    return config, sorted(set(values) - known)


def to_ours(
    family: Family, config: ModelConfig, tensors: Mapping[str, Stored], subject: str = WEIGHTS_FILE
) -> tuple[dict[str, Array], list[str]]:
    """Every leaf of the model by our path, and the names of the tensors that are left out.

    Raises one WeightsError naming every tensor that is missing, unexpected, mis-shaped or not of a float dtype, before
    any value is read, or every one that is not finite.
    """
    plan = _plan(family, config, tensors, subject)
    ours = dict(_leaves(family, config, tensors, plan, subject))
    return {path: ours[path] for path in model_parameters(config)}, plan.left_out


@dataclass(frozen=True)
class _Plan:
    """Which tensor of the file holds which leaves: headers were judged, values not."""

    expected: dict[str, Name]
    spelled: dict[str, str]
    left_out: list[str]


def _plan(family: Family, config: ModelConfig, tensors: Mapping[str, Stored], subject: str) -> _Plan:
    problems = Problems(subject, WeightsError)
    blocks = config.num_layers + config.num_encoder_layers
    if blocks > len(tensors):  # before a table of that many blocks is made
        raise WeightsError(subject, [f"expected the tensors of {blocks} blocks, got {len(tensors)} tensors in all"])
    expected = family.expected(config)
    spelled, left_out = _match(family, expected, family.leaves_out(config), tensors, problems)
    leaves = model_parameters(config)
    for name, entry in expected.items():
        if name in spelled:
            shapes = [leaves[path].shape for path in entry.ours]
            if not _check_header(spelled[name], tensors[spelled[name]], entry.layout.shape(shapes), problems):
                del spelled[name]
    plan = _Plan(expected, spelled, sorted(left_out))
    if problems.found:  # the values that are there can be wrong too: say so in the same breath
        for _ in _values(family, config, tensors, plan, problems):
            pass
        problems.raise_if_any()
    return plan


def _leaves(
    family: Family, config: ModelConfig, tensors: Mapping[str, Stored], plan: _Plan, subject: str
) -> Iterator[tuple[str, Array]]:
    """Every leaf, tensor by tensor; at the end one WeightsError for all values that are wrong."""
    problems = Problems(subject, WeightsError)
    yield from _values(family, config, tensors, plan, problems)
    problems.raise_if_any()


def _values(
    family: Family, config: ModelConfig, tensors: Mapping[str, Stored], plan: _Plan, problems: Problems
) -> Iterator[tuple[str, Array]]:
    leaves = model_parameters(config)
    # of what a copy will be compared with; where the copy is a weight of its own nothing is
    copied = {source for copy, source in family.copies.items() if copy in plan.spelled and copy not in plan.expected}
    kept: dict[str, Array] = {}
    for name, entry in plan.expected.items():
        if name not in plan.spelled:
            continue
        shapes = [leaves[path].shape for path in entry.ours]
        array = tensors[plan.spelled[name]].read()
        wrong = _not_finite(array)
        problems.expect(
            wrong == 0, f"{plan.spelled[name]}: expected finite values, got {wrong} of {array.size} that are not"
        )
        if name in copied:
            kept[name] = array
        parts = entry.layout.unpack(array, shapes)[::-1]
        del array  # held by whoever takes the leaf, and by nobody else
        for path in entry.ours:
            yield path, np.ascontiguousarray(parts.pop())
    _check_extras(family, plan.expected, plan.spelled, tensors, kept, problems)
    _check_buffers(family, config, plan.left_out, tensors, problems)


def _not_finite(array: Array) -> int:
    """How many values are not finite, looked at in pieces: the flags of a large tensor are large too."""
    flat = array.reshape(-1)
    return sum(int((~np.isfinite(flat[i : i + _PIECE])).sum()) for i in range(0, flat.size, _PIECE))


def _match(
    family: Family,
    expected: Mapping[str, Name],
    leaves_out: tuple[str, ...],
    tensors: Mapping[str, Stored],
    problems: Problems,
) -> tuple[dict[str, str], list[str]]:
    """How the file spells each name that plays a part, and the tensors that are left out."""
    spelled: dict[str, str] = {}
    left_out = []
    for name, stored in tensors.items():
        canonical = family.canonical(name)
        if canonical in spelled:
            problems.add(f"{name}: expected one tensor of that meaning, got {spelled[canonical]} too")
        elif canonical in expected or canonical in family.copies or canonical in family.counting_buffers:
            spelled[canonical] = name
        elif canonical.startswith(leaves_out):
            left_out.append(name)
        else:
            problems.add(f"{name}: unexpected, of shape {stored.shape}")
    for name, entry in expected.items():
        problems.expect(name in spelled, f"{name}: missing ({', '.join(entry.ours)})")
    return spelled, left_out


def _check_header(name: str, stored: Stored, shape: Shape, problems: Problems) -> bool:
    floats = ", ".join(FLOAT_DTYPES)
    good = problems.expect(
        stored.dtype in FLOAT_DTYPES, f"{name}: expected a float dtype ({floats}), got {stored.dtype}"
    )
    return problems.expect(stored.shape == shape, f"{name}: expected shape {shape}, got {stored.shape}") and good


def _check_extras(
    family: Family,
    expected: Mapping[str, Name],
    spelled: Mapping[str, str],
    tensors: Mapping[str, Stored],
    read: Mapping[str, Array],
    problems: Problems,
) -> None:
    """Buffers count from 0, and copies (unless the model has them as weights) repeat what they are copies of."""
    for name in family.counting_buffers:
        if name in spelled:
            stored = tensors[spelled[name]]
            counts = stored.read().ravel() if stored.dtype in ("I64", "I32") else None
            problems.expect(
                counts is not None and bool((counts == np.arange(counts.size)).all()),
                f"{spelled[name]}: expected whole numbers counted from 0, got others ({stored.dtype})",
            )
    for name, source in family.copies.items():
        if name in spelled and name not in expected and source in read:
            stored, wanted = tensors[spelled[name]], read[source]
            same = stored.dtype == tensors[spelled[source]].dtype and stored.shape == wanted.shape
            problems.expect(
                same and stored.read().tobytes() == wanted.tobytes(),
                f"{spelled[name]}: expected the values of {spelled[source]} (tied weights), got others",
            )


#: how far a buffer may be from what we compute: it was computed in float32 and perhaps stored in less
_BUFFER_TOLERANCE = {"F64": 1e-5, "F32": 1e-5, "F16": 1e-2, "BF16": 1e-2}


def _check_buffers(
    family: Family, config: ModelConfig, left_out: list[str], tensors: Mapping[str, Stored], problems: Problems
) -> None:
    """Buffers that are left out hold what the configuration says: else one of the two is another model's."""
    for name in left_out:
        for ending, values in family.buffers.items():
            if not name.endswith(ending):
                continue
            stored, wanted = tensors[name], values(config)
            tolerance = _BUFFER_TOLERANCE.get(stored.dtype)
            if problems.expect(
                tolerance is not None and stored.shape == wanted.shape,
                f"{name}: expected a float dtype and shape {wanted.shape}, got {stored.dtype} and {stored.shape}",
            ):
                found = stored.read().astype(np.float64)
                off = ~(np.abs(found - wanted) <= (tolerance or 0.0) * np.abs(wanted))
                problems.expect(
                    not off.any(),
                    f"{name}: expected {wanted[off][:1]} at place {int(off.argmax())} by the configuration, "
                    f"got {found[off][:1]}",
                )


def stored_dtype(tensors: Mapping[str, Array]) -> DType:
    """The narrowest float dtype that holds every one of these arrays without rounding."""
    return _common_dtype({str(array.dtype) for array in tensors.values()})


def _common_dtype(names: Collection[str]) -> DType:
    names = set(names)
    if "float64" in names:
        return "float64"
    if names == {"bfloat16"}:
        return "bfloat16"
    if names == {"float16"}:
        return "float16"
    return "float32"


# ---- the way back


def to_published(family: Family, config: ModelConfig, tensors: Mapping[str, Array]) -> Published:
    """A model of ours as the family publishes it, bit for bit.

    ``tensors`` holds every leaf by path, in PyTorch's orientation. Raises ConfigError naming every choice of ``config``
    that the family cannot express, WeightsError naming every leaf that is missing, unexpected, mis-shaped or not of a
    float dtype.
    """
    values = family.from_config(config)
    _check_expressible(family, config, values)
    leaves = model_parameters(config)
    problems = Problems(f"weights of a {family.model_type} model", WeightsError)
    for path, leaf in leaves.items():
        if path not in tensors:
            problems.add(f"{path}: missing, of shape {leaf.shape}")
        else:
            shape, dtype = tuple(tensors[path].shape), str(tensors[path].dtype)
            problems.expect(shape == leaf.shape, f"{path}: expected shape {leaf.shape}, got {shape}")
            problems.expect(
                dtype in FLOAT_DTYPES.values(),
                f"{path}: expected a float dtype ({', '.join(FLOAT_DTYPES.values())}), got {dtype}",
            )
    for path in tensors:
        problems.expect(path in leaves, f"{path}: unexpected")
    problems.raise_if_any()
    published: dict[str, Array] = {}
    for name, entry in family.expected(config).items():
        parts = [tensors[path] for path in entry.ours]
        kinds = {str(part.dtype) for part in parts}
        problems.expect(
            len(kinds) == 1, f"{name}: expected one dtype for {', '.join(entry.ours)}, got {', '.join(sorted(kinds))}"
        )
        published[family.written(entry, config)] = np.ascontiguousarray(entry.layout.pack(parts))
    problems.raise_if_any()
    return Published(config=values | {"dtype": stored_dtype(published)}, tensors=published)


def write_directory(directory: Path, published: Published) -> None:
    """Write ``config.json`` and ``model.safetensors``, each by a rename. Raises CheckpointError."""
    text = json.dumps(published.config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / WEIGHTS_FILE, lambda part: save_file(published.tensors, part, {"format": "pt"}))
        write_atomically(directory / CONFIG_FILE, lambda part: part.write_text(text, encoding="utf-8"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(str(directory), [f"expected a place that can be written, got: {error}"]) from error


#: choices of ours that a published configuration need not carry: how numbers are held, and how weights began
_NOT_PUBLISHED = frozenset(
    [
        *("param_dtype", "compute_dtype", "remat", "scan_layers"),
        *("initializer", "initializer_std", "initializer_scale_residual"),
    ]
)


def _check_expressible(family: Family, config: ModelConfig, values: Mapping[str, Any]) -> None:
    """Read back what ``from_config`` wrote: every field must come out as it went in."""
    subject = f"a {family.model_type} model"
    try:
        back, unknown = translate(family, values, subject)
    except TwinformerError as error:
        raise ConfigError(subject, error.problems) from None
    problems = Problems(subject, ConfigError)
    for name in (f.name for f in dataclasses.fields(ModelConfig)):
        able, have = _meaning(back, name), _meaning(config, name)
        problems.expect(name in _NOT_PUBLISHED or able == have, f"{name}: expected {able!r}, got {have!r}")
    problems.expect(not unknown, f"expected fields that the family knows, got {', '.join(unknown)}")
    problems.raise_if_any()


def _meaning(config: ModelConfig, name: str) -> Any:
    """A choice, or what its None stands for."""
    value = getattr(config, name)
    if value is None and name == "embedding_dropout":
        return config.dropout
    if value is None and name == "attention_scale":
        return config.key_dim**-0.5
    return value
