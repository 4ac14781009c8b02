"""From one layout to the other: ours, or that of a published family; whole or not at all, and bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from twinformer import pretrained
from twinformer.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_model, write_model
from twinformer.config import DType, ModelConfig
from twinformer.errors import CheckpointError, ConfigError
from twinformer.pretrained.family import Array
from twinformer.pretrained.files import INDEX_FILE
from twinformer.pretrained.published import Opener, Published

Layout = Literal["ours", "published"]

#: what belongs to the tokenizer of a directory, and goes with the model
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "source.spm",
    "target.spm",
    "vocabulary.json",
)
#: our own configuration beside a published one of the same model: which family, so that the way back needs no telling
_FAMILY_FILE = "family.json"


def convert(
    source: Path,
    out: Path,
    *,
    to: Layout,
    family: str | None = None,
    dtype: DType | None = None,
    max_shard_size: int = 5 * 10**9,
    open_pickled: Opener | None = None,
) -> dict[str, Any]:
    """Write the model in ``source`` to ``out``, which must not exist, and tell what was written.

    ``family`` is needed on the way to a published layout from a directory of ours that does not remember one. ``dtype``
    None keeps every bit. Raises CheckpointError, ConfigError or WeightsError, each with all its problems, and leaves
    nothing behind.
    """
    if out.exists():
        raise CheckpointError(str(out), ["expected a place where nothing is yet, got something by that name"])
    is_published = pretrained.is_published(source)
    left_out: tuple[str, ...] = ()
    tensors: Mapping[str, Array]
    if is_published:
        read = pretrained.read(source, open_pickled=open_pickled)
        config, tensors, left_out = read.config, read.tensors, read.left_out
        family = read.family if family is None else family
    else:
        config, tensors = read_model(source)
        family = _remembered(source) if family is None else family
    if dtype is not None:
        config, tensors = config.with_dtype(dtype), {path: _cast(leaf, dtype) for path, leaf in tensors.items()}
    published = None
    if to == "published":
        if family is None:
            known = ", ".join(sorted(pretrained.FAMILIES))
            raise ConfigError("family", [f"expected one of {known} for a directory of ours, got none"])
        published = pretrained.to_published(config, tensors, family=family)
    files = _write(source, out, config, tensors, published, family, max_shard_size)
    return {
        "family": family,
        "layout": to,
        "parameters": int(sum(leaf.size for leaf in tensors.values())),
        "dtype": config.param_dtype,
        "left_out": list(left_out),
        "files": files,
    }


def _write(
    source: Path,
    out: Path,
    config: ModelConfig,
    tensors: Mapping[str, Array],
    published: Published | None,
    family: str | None,
    max_shard_size: int,
) -> list[str]:
    """Everything into a directory beside ``out``, flushed, then renamed."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            staging.chmod(0o755)
            if published is None:
                write_model(staging, config, tensors)
                if family is not None:
                    (staging / _FAMILY_FILE).write_text(json.dumps({"family": family}) + "\n", encoding="utf-8")
            else:
                _write_published(staging, published, max_shard_size)
            for name in TOKENIZER_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, staging / name)
            for file in staging.iterdir():
                _flush(file)
            _flush(staging)
            staging.rename(out)
            _flush(out.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(str(out), [f"expected a place that can be written, got: {error}"]) from error
    return sorted(file.name for file in out.iterdir())


def _write_published(place: Path, published: Published, max_shard_size: int) -> None:
    text = json.dumps(published.config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    (place / CONFIG_FILE).write_text(text, encoding="utf-8")
    shards = _shards(published.tensors, max_shard_size)
    if len(shards) == 1:
        save_file(shards[0], place / WEIGHTS_FILE, {"format": "pt"})
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, place / name, {"format": "pt"})
        index |= dict.fromkeys(shard, name)
    size = sum(tensor.nbytes for tensor in published.tensors.values())
    whole = {"metadata": {"total_size": size}, "weight_map": index}
    (place / INDEX_FILE).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, Array], most: int) -> list[dict[str, Array]]:
    """In order, each at most so many bytes, but for a tensor that is larger by itself."""
    shards: list[dict[str, Array]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _remembered(source: Path) -> str | None:
    """The family that a directory of ours came from, where it says so."""
    try:
        found = json.loads((source / _FAMILY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    family = found.get("family") if isinstance(found, dict) else None
    return family if family in pretrained.FAMILIES else None


def _cast(leaf: Array, dtype: DType) -> Array:
    import ml_dtypes

    return leaf.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))


def _flush(place: Path) -> None:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
