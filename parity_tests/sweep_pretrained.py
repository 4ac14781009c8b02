"""Random published models of one family against ``transformers``, in float64: every gradient, every token written, and
the judge's own comparison.

    python -m parity_tests.sweep_pretrained --family llama --cases 50

Prints the largest error of each case and of all; ends with 1 where one is above the bound. Not part of the test
suite: the tests hold a few cases of each family, this looks further.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from parity_tests.quick_programs import XLA_FLAGS

os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)

import jax
import numpy as np

from parity_tests import fuzz
from parity_tests import published_seq2seq as seq2seq
from parity_tests import published_writing as writing
from parity_tests import test_original as original
from parity_tests import test_pretrained_encoders as encoders
from parity_tests.helpers import FLAX, TORCH, Twin
from parity_tests.published_decoders import KINDS, publish
from parity_tests.published_draws import DRAWS
from parity_tests.published_witness import examine, padded, theirs
from twinformer import pretrained
from twinformer.parity.twins import FlaxTwin, TorchTwin

#: relative to the largest magnitude of a tensor; rounding in float64 stays some orders below, mistakes far above
BOUND = 1e-11

#: largest error by name, and what was run, as one line
Finding = tuple[dict[str, float], str]
#: family -> one random case: ``(rng, twins) -> finding``
Examiner = Callable[[np.random.Generator, Sequence[Twin]], Finding]


def decoder(family: str) -> Examiner:
    """Random settings, class, length and padding of a decoder-only family; also what it writes, and there and back,
    bit for bit."""
    kind = KINDS[family]

    def one(rng: np.random.Generator, twins: Sequence[Twin]) -> Finding:
        settings = DRAWS[family](rng)
        class_name = kind.classes[0] if rng.random() < 0.6 else str(rng.choice(kind.classes))
        model = kind.model(settings, int(rng.integers(1000)), class_name)
        length = int(rng.integers(4, 40))
        tokens, real = padded(int(rng.integers(1000)), model.config.vocab_size, length)
        found: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as place:
            directory = publish(model, Path(place) / "theirs", settings)
            expected = theirs(model, tokens, real)
            for twin in twins:
                errors = examine(twin, directory, model, tokens, real, expected)
                found |= {f"{twin.name}: {name}": error for name, error in errors.items()}
            found |= _asked(twins, directory, length)
            if class_name == kind.classes[0]:
                found |= _written(twins, Path(place) / "theirs", model, writing.prompted(model, length))
            read = pretrained.read(directory)
            pretrained.write(Path(place) / "back", read.config, read.tensors, family=read.family)
            again = pretrained.read(Path(place) / "back")
            assert again.config == read.config
            assert all(again.tensors[path].tobytes() == read.tensors[path].tobytes() for path in read.tensors)
        return found, f"{class_name} T={length} {json.dumps(settings)}"

    return one


def two_stacks(family: str) -> Examiner:
    """Random settings of an encoder with a decoder; also what it writes."""

    def one(rng: np.random.Generator, twins: Sequence[Twin]) -> Finding:
        seed = int(rng.integers(2**31))
        settings = seq2seq.drawn(family, seed)
        model = seq2seq.KINDS[family].make(settings, seed % 1000)
        with tempfile.TemporaryDirectory() as place:
            model.save_pretrained(place)
            found = _flat({twin.name: seq2seq.examine(twin, Path(place), model) for twin in twins})
            found |= _asked(twins, Path(place), int(rng.integers(4, 40)))
            writing.lively(model).save_pretrained(place)
            found |= _written(twins, Path(place), model, writing.sourced(family, model, seed % 1000))
        return found, json.dumps(settings)

    return one


def encoder(family: str) -> Examiner:
    """Random settings and class of an encoder."""

    def one(rng: np.random.Generator, twins: Sequence[Twin]) -> Finding:
        head, settings = encoders.drawn(family, int(rng.integers(2**31)))
        with tempfile.TemporaryDirectory() as place:
            model = encoders.published(family, head, Path(place), **settings)
            found = _flat({twin.name: encoders.examine(twin, model, Path(place)) for twin in twins})
            found |= _asked(twins, Path(place), int(rng.integers(4, 30)))
        return found, f"{head} {json.dumps(settings)}"

    return one


def _asked(twins: Sequence[Twin], directory: Path, length: int) -> dict[str, float]:
    """What ``twinformer parity DIR --witness transformers`` compares."""
    judged = {"torch": TorchTwin, "flax": FlaxTwin}
    first, last = judged[twins[0].name], judged[twins[-1].name]
    rung = original.asked(directory, length=length, twins=(first, last))
    assert rung.verdict in ("agree", "differ"), rung.verdict
    wrong = {problem: np.inf for problem in rung.problems}
    return wrong | {f"judge: {one.name}": one.relative for one in rung.comparisons}


def _written(twins: Sequence[Twin], directory: Path, model: Any, task: writing.Task) -> dict[str, float]:
    """Tokens that differ, and the error of the logits of every step."""
    wanted = writing.theirs(model, task, use_cache=writing.has_right_cache(model.config))
    return _flat({twin.name: writing.examine(twin, directory, task, wanted) for twin in twins})


def _flat(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{twin}: {name}": error for twin, errors in found.items() for name, error in errors.items()}


EXAMINERS: dict[str, Examiner] = {
    **{family: decoder(family) for family in DRAWS},
    **{family: two_stacks(family) for family in seq2seq.KINDS},
    **{family: encoder(family) for family in encoders.SETTINGS},
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--family", choices=sorted(EXAMINERS), action="append", help="may be repeated; default: all")
    parser.add_argument("--cases", type=int, default=20, help="of each family")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; case i has seed + i")
    parser.add_argument("--twins", choices=["torch", "flax", "both"], default="torch")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON Lines, a case each, continued where it ends")
    parser.add_argument("--verbose", action="store_true", help="one line for each case")
    options = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", True)
    twins = {"torch": [TORCH], "flax": [FLAX], "both": [TORCH, FLAX]}[options.twins]
    families = options.family or sorted(EXAMINERS)
    lines = fuzz.read_lines(options.out) if options.out else []
    done = {(line["family"], line["seed"], line["twins"]) for line in lines}
    with options.out.open("a", encoding="utf-8") if options.out else contextlib.nullcontext() as out:
        for seed, family in itertools.product(range(options.seed, options.seed + options.cases), families):
            if (family, seed, options.twins) in done:
                continue
            errors, told = EXAMINERS[family](np.random.default_rng(seed), twins)
            name = max(errors, key=lambda key: errors[key])
            line = {"family": family, "seed": seed, "twins": options.twins, "compared": len(errors)}
            line |= {"worst": errors[name], "at": name, "failed": not errors[name] <= BOUND, "what": told}
            lines.append(line)
            if out:
                out.write(json.dumps(line) + "\n")
                out.flush()
            if line["failed"] or options.verbose:
                _say(
                    f"{family} seed {seed}: {'FAILED, ' if line['failed'] else ''}{errors[name]:.2e} at {name}; {told}"
                )
    for family in families:
        found = [line for line in lines if line["family"] == family]
        worst = max(found, key=lambda line: line["worst"])
        _say(f"{family}: {len(found)} cases, largest error {worst['worst']:.2e} at {worst['at']}")
    failed = sum(line["failed"] for line in lines)
    _say(f"{failed} failed")
    return 1 if failed else 0


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
