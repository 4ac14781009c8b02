"""The original of a published directory: its class in ``transformers``, run in float64 on the judge's own inputs.

What it gives has our names: the states of embeddings, blocks and stacks, the output, and the loss where the class has
one that is ours too. The library computes norms, angles and softmax in float32 whatever it is given; within ``wide``
it computes them in float64. Nothing else of it is changed, but for what it has rounded to float32 (``_unrounded``).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch.overrides import TorchFunctionMode

from twinformer.checkpoint import CONFIG_FILE
from twinformer.initializers import stream
from twinformer.parity.case import Arrays
from twinformer.parity.compare import FloatArray
from twinformer.parity.judge import CannotJudgeError
from twinformer.pretrained import Pretrained
from twinformer.pretrained.files import read_json_object

Flags = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int64]

#: the library's tables of class names, by what the model has for a head
_TABLES = {
    "none": "MODEL_MAPPING_NAMES",
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "translation": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "tokens": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "answers": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}
#: families that find padding by its id, to count positions
_BY_ID = ("roberta", "m2m_100")
#: part of the masked tokens that are asked for
_MASKED = 0.6


@dataclass(frozen=True)
class Answer:
    """What the original made of ``inputs``.

    ``states`` by our path. ``labels`` as the library takes them, -100 where none is asked for; None, as ``loss`` is,
    where it has no loss that is ours.
    """

    inputs: Arrays
    states: dict[str, FloatArray]
    output: FloatArray
    labels: Ids | None
    loss: float | None


class Original:
    """A published directory as the library sees it. Raises CannotJudgeError where it has no class for it."""

    def __init__(self, directory: Path, published: Pretrained) -> None:
        self.directory, self.family, self.config = directory, published.family, published.config
        self.task = _task(directory, published)
        import transformers
        from transformers.models.auto import modeling_auto

        self.version: str = transformers.__version__
        name = getattr(modeling_auto, _TABLES[self.task], {}).get(self.family)
        self._class: Any = getattr(transformers, name, None) if isinstance(name, str) else None
        if self._class is None:
            wanted = f"transformers: expected a class for model_type {self.family!r} with head {self.config.head!r}"
            got = "none" if name is None else f"none by the name {name}"
            raise CannotJudgeError("witness", [f"{wanted}, got {got} in version {self.version}"])

    @property
    def name(self) -> str:
        """The name of its class, and the library's version."""
        return f"{self._class.__name__} of transformers {self.version}"

    def answer(self, inputs: Arrays) -> Answer:
        """What it makes of the judge's inputs. Where the library finds padding by its id, that id stands at padding
        and at no real place: ``Answer.inputs`` may be others than were given."""
        with wide(), torch.no_grad():
            model = self._load()
            inputs = self._told_by_id(model, inputs)
            labels = self._labels(inputs)
            found = model(**self._arguments(inputs, labels), output_hidden_states=True)
            states = self._states(found)
            loss = None if labels is None else float(found.loss)
            return Answer(inputs, states, _numpy(self._output(found)), labels, loss)

    def _load(self) -> Any:
        import transformers

        transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            model, report = self._class.from_pretrained(
                self.directory,
                local_files_only=True,
                dtype=torch.float64,
                attn_implementation="eager",
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, UnpicklingError) as error:
            wanted = f"{self.name}: expected it to load {self.directory}"
            raise CannotJudgeError("witness", [f"{wanted}, got {type(error).__name__}: {error}"]) from None
        absent = sorted(name for name in report["missing_keys"] if "pooler" not in name or self.task == "sequence")
        wrong = [f"{name}: missing" for name in absent]
        wrong += [f"{name}: of another shape" for name in sorted(map(str, report["mismatched_keys"]))]
        if wrong:
            raise CannotJudgeError("witness", [f"{self.name}: expected its weights in the directory, got {wrong}"])
        _unrounded(model)
        return model.eval()

    def _told_by_id(self, model: Any, inputs: Arrays) -> Arrays:
        """The inputs with the id of padding at padding and there alone, if the model goes by it."""
        ends = self.task == "sequence" and self.config.architecture == "decoder"
        if not ends and self.family not in _BY_ID:
            return inputs
        pad = model.config.pad_token_id
        if pad is None or not 0 <= pad < self.config.vocab_size:
            # where a sequence ends is all that it says here, and the last id is as good as any
            model.config.pad_token_id = pad = self.config.vocab_size - 1
        changed = dict(inputs)
        for name, mask, size in _TEXTS:
            if name in inputs:
                count = getattr(self.config, size)
                tokens, real = inputs[name], inputs[mask]
                changed[name] = np.where(real, np.where(tokens == pad, (pad + 1) % count, tokens), pad)
        return changed

    def _arguments(self, inputs: Arrays, labels: Ids | None) -> dict[str, torch.Tensor]:
        """The call, as the library's users make it."""
        given: Arrays = {} if labels is None else {"labels": labels}
        if self.config.architecture == "encoder-decoder":
            names = {"source": "input_ids", "source_padding_mask": "attention_mask"}
            names |= {"target": "decoder_input_ids", "target_padding_mask": "decoder_attention_mask"}
        else:
            names = {"tokens": "input_ids", "padding_mask": "attention_mask", "token_types": "token_type_ids"}
        given |= {theirs: inputs[ours].astype(np.int64) for ours, theirs in names.items() if ours in inputs}
        if self.config.architecture == "decoder":  # as the library's own generate() has it
            given["position_ids"] = np.maximum(np.cumsum(inputs["padding_mask"], axis=1) - 1, 0)
        return {name: torch.from_numpy(array.copy()) for name, array in given.items()}

    def _labels(self, inputs: Arrays) -> Ids | None:
        """Random ones, or the next token; at real places, in rows that the twins can be asked about."""
        rng = stream(0, "witness/labels")
        name = "target" if self.config.architecture == "encoder-decoder" else "tokens"
        tokens, real = inputs[name], inputs["target_padding_mask" if name == "target" else "padding_mask"]
        C = self.config.num_labels
        drawn: Ids
        if self.task == "causal":  # the library shifts them itself
            drawn = np.where(np.pad(real[:, 1:] & real[:, :-1], ((0, 0), (1, 0))), tokens, -100)
        elif self.task == "translation":
            sees = in_rows(inputs["source_padding_mask"])[:, None]
            wanted = np.pad(real[:, 1:] & real[:, :-1] & sees, ((0, 0), (0, 1)))
            drawn = np.where(wanted, np.roll(tokens, -1, axis=1), -100)
        elif self.task == "masked":
            drawn = np.where(real & (rng.random(tokens.shape) < _MASKED), tokens, -100)
        elif self.task == "sequence" and C > 1:
            drawn = np.where(self.rows(inputs), rng.integers(0, C, len(tokens)), -100)
        elif self.task == "tokens" and C > 1:
            drawn = np.where(real, rng.integers(0, C, tokens.shape), -100)
        else:
            return None
        return drawn if (drawn >= 0).any() else None

    def rows(self, inputs: Arrays) -> Flags:
        """The rows of which one vector is made of the same place in both: none that is padding only, and none that
        begins with padding where the library labels a row by what stands there."""
        real: Flags = inputs["padding_mask"]
        return real[:, 0] if self.config.architecture == "encoder" else in_rows(real)

    def _states(self, found: Any) -> dict[str, FloatArray]:
        """Of each stack the embeddings, every block but the last, and what the stack gives: the library has no state
        between the last block and the norm after it."""
        if self.config.architecture == "encoder-decoder":
            stacks = (
                ("source_embedding", "encoder", found.encoder_hidden_states, self.config.num_encoder_layers),
                ("target_embedding", "decoder", found.decoder_hidden_states, self.config.num_layers),
            )
        else:
            stacks = (("embedding", "stack", found.hidden_states, self.config.num_layers),)  # type: ignore[assignment]
        states: dict[str, FloatArray] = {}
        for embedding, stack, hidden, blocks in stacks:
            paths = [embedding, *(f"{stack}.blocks.{i}" for i in range(blocks - 1)), stack]
            states |= {path: _numpy(state) for path, state in zip(paths, hidden, strict=True)}
        return states

    def _output(self, found: Any) -> torch.Tensor:
        if self.task == "none":
            state: torch.Tensor = found.last_hidden_state
            return state
        if self.task == "answers":
            return torch.stack((found.start_logits, found.end_logits), -1)
        logits: torch.Tensor = found.logits
        return logits


#: a text of the inputs, its padding mask, and the size of its vocabulary in the config
_TEXTS = (
    ("tokens", "padding_mask", "vocab_size"),
    ("source", "source_padding_mask", "source_vocab_size"),
    ("target", "target_padding_mask", "vocab_size"),
)


def in_rows(real: Flags) -> Flags:
    """Which rows have a real token."""
    found: Flags = np.logical_or.reduce(real, 1)
    return found


def _task(directory: Path, published: Pretrained) -> str:
    """What the model has for a head, in the library's terms."""
    config = published.config
    if config.head in ("tied", "untied"):
        return {"decoder": "causal", "encoder": "masked", "encoder-decoder": "translation"}[config.architecture]
    names = read_json_object(directory / CONFIG_FILE).get("architectures")
    if config.head == "tokens" and names and str(names[0]).endswith("ForQuestionAnswering"):
        return "answers"
    return str(config.head)


def _numpy(tensor: torch.Tensor) -> FloatArray:
    if tensor.dtype != torch.float64:
        raise CannotJudgeError("witness", [f"transformers: expected it to compute in float64, got {tensor.dtype}"])
    array: FloatArray = tensor.detach().numpy().copy()
    return array


# ---- float64


class _Wide(TorchFunctionMode):
    """Wherever float32 is asked for by name (norms, angles, softmax), float64 is given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        given = [torch.float64 if value is torch.float32 else value for value in args]
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*given, **named)


@contextlib.contextmanager
def wide() -> Iterator[None]:
    """Within, PyTorch's default dtype is float64, and nothing computes in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(before)


def _unrounded(model: Any) -> None:
    """Marian's sinusoids, which the library makes in float64 and then rounds to float32, without that rounding.

    A table that holds anything else stays as it is.
    """
    for module in model.modules():
        if type(module).__name__ != "MarianSinusoidalPositionalEmbedding":
            continue
        N, D = module.weight.shape
        angles = np.arange(N)[:, None] / np.power(10000.0, 2 * np.arange(math.ceil(D / 2)) / D)
        table = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], 1)[:, :D].copy())
        if bool(((table - module.weight).abs() <= 2.0**-24 * table.abs()).all()):
            module.weight.copy_(table)
