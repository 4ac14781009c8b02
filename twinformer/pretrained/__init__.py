"""Published checkpoints in our terms, and back: one file per family.

>>> model = pretrained.read("all-MiniLM-L6-v2")
>>> model.config.architecture, model.left_out
('encoder', ('pooler.dense.bias', 'pooler.dense.weight'))
>>> pretrained.write("back", model.config, model.tensors, family=model.family)

Reading is total: what a directory holds and our model does not use is named in the result, and everything that does
not fit is one error.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from twinformer.checkpoint import CONFIG_FILE
from twinformer.config import ModelConfig
from twinformer.errors import CheckpointError, ConfigError
from twinformer.pretrained import (
    bart,
    bert,
    distilbert,
    files,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    llama,
    m2m_100,
    marian,
    mbart,
    mistral,
    mt5,
    phi3,
    published,
    qwen2,
    qwen3,
    roberta,
    t5,
)
from twinformer.pretrained.family import Array, Family
from twinformer.pretrained.pooling import Pooling
from twinformer.pretrained.published import Opened, Opener, Pretrained, Published

__all__ = [
    "FAMILIES",
    "Opened",
    "Opener",
    "Pooling",
    "Pretrained",
    "Published",
    "is_published",
    "open",
    "read",
    "to_published",
    "write",
]

#: every family by the ``model_type`` of its config.json
FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        # encoders
        bert,
        distilbert,
        roberta,
        # decoders
        gpt2,
        llama,
        mistral,
        qwen2,
        qwen3,
        gemma,
        gemma2,
        gemma3,
        phi3,
        # encoders with a decoder
        t5,
        mt5,
        bart,
        mbart,
        marian,
        m2m_100,
    )
}


def is_published(directory: str | Path) -> bool:
    """Whether ``config.json`` there is a published one: a JSON object with a ``model_type`` (known to us or not)."""
    try:
        return "model_type" in files.read_json_object(Path(directory) / CONFIG_FILE)
    except CheckpointError:
        return False


def open(directory: str | Path, *, open_pickled: Opener | None = None) -> AbstractContextManager[Opened]:
    """A published model directory in our terms, its values still in the file, to be read leaf by leaf.

    Raises what ``read`` raises, values that are not finite at the end of ``leaves()``.
    """
    return published.open_directory(Path(directory), FAMILIES, open_pickled)


def read(directory: str | Path, *, open_pickled: Opener | None = None) -> Pretrained:
    """A published model directory in our terms. ``open_pickled`` (``torch_impl.pickled``) opens weights that are
    there as pickles only.

    Raises CheckpointError for files that are absent or do not read, ConfigError for a family or a setting that is not
    supported (before any weight is read), WeightsError for tensors that are missing, unexpected, mis-shaped, not of a
    float dtype or not finite. Each names all its problems at once.
    """
    return published.read_directory(Path(directory), FAMILIES, open_pickled)


def to_published(config: ModelConfig, tensors: Mapping[str, Array], *, family: str) -> Published:
    """A model of ours as ``family`` publishes it, bit for bit; ``tensors`` by path in PyTorch's orientation.

    Raises ConfigError for an unknown family and for choices that it cannot express, WeightsError for wrong leaves.
    """
    if family not in FAMILIES:
        raise ConfigError("family", [f"expected one of {', '.join(sorted(FAMILIES))}, got {family!r}"])
    return published.to_published(FAMILIES[family], config, tensors)


def write(directory: str | Path, config: ModelConfig, tensors: Mapping[str, Array], *, family: str) -> None:
    """Write a model of ours as a published directory. Raises what ``to_published`` raises, and CheckpointError."""
    published.write_directory(Path(directory), to_published(config, tensors, family=family))
