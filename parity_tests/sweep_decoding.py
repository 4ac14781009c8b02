"""Random models and prompts by the hundred: both twins write the same text, greedily, sampled and with a beam.

``python -m parity_tests.sweep_decoding --cases 500 --out FILE``. In float64 everything must be equal, but for
hypotheses of a beam that are equally likely (a model may not see where a token stands): rounding orders them. In
float32 the twins may part where a decision is closer than rounding: such a difference is explained if every greedy
token is one that the largest float32 error that was measured can make the best, and if the search in NumPy, on float64
logits that are moved at random by no more than that, comes to what each twin wrote. One line of JSON a model, written
as its configuration is done; what FILE already holds is not run again.

A configuration is drawn for ``DRAWS`` models, each with weights, prompts and padding of its own: compiling takes most
of the time, and is the same for all of them.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from parity_tests import fuzz
from parity_tests.strategies import padding_of, seeded_cases
from twinformer.decoding import BeamConfig, SamplingConfig

CONTEXT, PROMPT, NEW, BUCKET = 24, 6, 8, 8
BOUND = 1e-11  # of log-probabilities in float64: sums of up to NEW of them
TRIALS = 400  # at most: until the search has come to what each twin wrote
DRAWS = 4  # models of each configuration


def drawn(number: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """A configuration that predicts tokens, one for ``DRAWS`` numbers, and what it is asked to write."""
    rng, own = np.random.default_rng([seed, number // DRAWS]), np.random.default_rng([seed, number, 1])
    config = next(
        case.config
        for case in seeded_cases(200, seed=int(rng.integers(2**31)))
        if case.config.architecture != "encoder" and case.config.head in ("tied", "untied")
    )
    config = config.replace(context_length=CONTEXT, dropout=0.0, attention_dropout=0.0, hidden_dropout=0.0)
    B = int(rng.integers(1, 4))
    asked: dict[str, Any] = {"prompts": own.integers(0, config.vocab_size, (B, PROMPT))}
    kinds = ("none", "left", "right", "holes")
    real = padding_of(kinds[rng.integers(4)], B, PROMPT, own)
    if real is not None:
        real[np.arange(B), own.integers(0, PROMPT, B)] = True  # a prompt is not empty
        asked["padding_mask"] = real
    if config.architecture == "encoder-decoder":
        S = int(rng.integers(1, 8))
        asked["source"] = own.integers(0, config.source_vocab_size, (B, S))
        source_real = padding_of(kinds[rng.integers(4)], B, S, own)
        if source_real is not None:
            source_real[:, 0] = True
            asked["source_padding_mask"] = source_real
    asked["stop"] = int(rng.integers(config.vocab_size))
    asked["sampling"] = SamplingConfig(
        temperature=float(rng.choice([0.7, 1.0, 1.8])),
        top_k=[None, 3, 5][rng.integers(3)],
        top_p=[None, 0.6, 0.95][rng.integers(3)],
        min_p=[None, 0.05][rng.integers(2)],
        repetition_penalty=float(rng.choice([1.0, 1.3])),
    )
    width = int(rng.integers(1, 5))
    asked["beam"] = BeamConfig(
        width=width,
        num_best=int(rng.integers(1, width + 1)),
        length_penalty=("none", "mean", "gnmt")[rng.integers(3)],
        alpha=float(rng.choice([0.0, 0.6, 1.0, 2.0])),
        shrink=bool(rng.integers(2)),
    )
    asked["seed"] = int(own.integers(2**63))
    return config, asked


def judged(numbers_and_seed: tuple[tuple[int, ...], int]) -> list[dict[str, Any]]:
    """A line for each of these models of one configuration: the problems of float64, and every float32 difference."""
    import gc

    import jax

    from parity_tests.decoding_pair import Pair
    from twinformer.parity.haste import hurried

    numbers, seed = numbers_and_seed
    lines: list[dict[str, Any]] = []
    wide = narrow = None
    with hurried({}):
        for number in numbers:
            config, asked = drawn(number, seed)
            wide = Pair(config.with_dtype("float64"), number, like=wide)
            narrow = Pair(config.with_dtype("float32"), number, like=narrow)
            lines.append({"case": f"{seed}/{number}"} | _line(wide, narrow, asked))
            if lines[-1]["problems"] or "not explained" in lines[-1]["float32"].values():
                lines[-1]["config"] = config.to_dict()
    del wide, narrow
    jax.clear_caches()
    gc.collect()
    return lines


def _line(wide: Any, narrow: Any, asked: dict[str, Any]) -> dict[str, Any]:
    from parity_tests.decoding_pair import explained, tied

    line: dict[str, Any] = {"problems": [], "float32": {}}
    for way in ("greedy", "sampled", "beam"):
        one, other = wide.written(way, asked)
        problems = [f"{way}: {text}" for text in differences(one, other)]
        if way == "beam" and problems and tied(wide, asked, (one, other)):
            line["tied"], problems = problems[0], []
        line["problems"] += problems
    for way in ("greedy", "sampled", "beam"):
        one, other = narrow.written(way, asked)
        same = np.array_equal(one.tokens, other.tokens) and np.array_equal(one.lengths, other.lengths)
        line["float32"][way] = "same" if same else explained(way, wide, narrow, asked, (one, other))
    line["tokens"] = int(one.lengths.sum())
    return line


def differences(one: Any, other: Any) -> list[str]:
    """What is not equal in two results of one call: tokens, lengths, ends; log-probabilities within rounding."""
    found = []
    for name in ("tokens", "lengths", "finished"):
        mine, theirs = getattr(one, name), getattr(other, name)
        if not np.array_equal(mine, theirs):
            found.append(f"{name}: expected {mine.tolist()} as torch has it, got {theirs.tolist()} from flax")
    for name in ("logprobs", "scores"):
        mine, theirs = getattr(one, name, None), getattr(other, name, None)
        if mine is None or found:
            continue
        if not np.array_equal(np.isfinite(mine), np.isfinite(theirs)):
            found.append(f"{name}: expected finite values at the same places, got others")
            continue
        off = np.abs(np.where(np.isfinite(mine), mine, 0) - np.where(np.isfinite(theirs), theirs, 0)).max(initial=0)
        scale = max(1.0, np.abs(mine[np.isfinite(mine)]).max(initial=0))
        if not off <= BOUND * scale:
            found.append(f"{name}: expected a difference of at most {BOUND:g} of {scale:.3g}, got {off:.3g}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON Lines, continued where it ends")
    options = parser.parse_args()
    lines = fuzz.read_lines(options.out)
    done = {line["case"] for line in lines}
    missing = [number for number in range(options.cases) if f"{options.seed}/{number}" not in done]
    todo = [(tuple(group), options.seed) for _, group in itertools.groupby(missing, key=lambda number: number // DRAWS)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with options.out.open("a", encoding="utf-8") as out, Progress(console=console) as progress:
        task = progress.add_task("models", total=options.cases, completed=options.cases - len(missing))
        try:
            for found in fuzz.run_all(judged, todo, options.jobs):
                out.writelines(json.dumps(line) + "\n" for line in found)
                out.flush()
                lines += found
                progress.advance(task, len(found))
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from here")
    return summarize(lines)


def summarize(lines: list[dict[str, Any]]) -> int:
    """0 only if all is equal in float64, and every difference in float32 explained."""
    console = Console()
    wrong = [line for line in lines if line["problems"]]
    draws = sum("tied" in line for line in lines)
    equal = len(lines) - len(wrong) - draws
    console.print(f"{len(lines)} models: {equal} equal in float64, {draws} but for tied hypotheses, {len(wrong)} not")
    for line in wrong:
        console.print(f"{line['case']}: {line['problems'][0]}", style="red")
    left = 0
    for way in ("greedy", "sampled", "beam"):
        outcomes = collections.Counter(line["float32"][way] for line in lines)
        left += outcomes["not explained"]
        console.print(f"float32, {way}: " + ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items()))
    return 1 if wrong or left or not lines else 0


if __name__ == "__main__":
    sys.exit(main())
