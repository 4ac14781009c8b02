"""Rung 1, continued: NaN and infinities go where they must in both twins, and nowhere else.

One token gets an embedding that holds NaN and both infinities. Where it stands in padding nothing may be seen of it: at
real positions the output is that of the model without it. Where it stands among real tokens it must be seen, at
exactly the same places in both twins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from twinformer.config import ModelConfig
from twinformer.initializers import stream
from twinformer.parity.case import Arrays, Case
from twinformer.parity.compare import Comparison, compare, set_problems
from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs.forward import BOUND, alone, module_of
from twinformer.parity.twins import Call, Run
from twinformer.parity.verdict import Rung, does_not_apply, rung_of

# what the poisoned row of the embedding table begins with
POISON = (np.nan, np.inf, -np.inf)


def check(evidence: Evidence) -> Rung:
    """Compare runs with poison in the padding to clean ones, and the twins with each other, poison hidden and in sight.

    Gradients are left out: at a padded position the poison meets a cotangent of 0, and what 0 times NaN makes of a
    derivative is no promise of either framework.
    """
    case = evidence.case.in_dtype("float64")
    names = [name for name in ("tokens", "source", "target") if name in case.inputs]
    if case.cotangent.ndim == 2:
        return does_not_apply("the head gives one vector a row: no output belongs to a padded position")
    if any(_vocabulary(case.config, name) < 2 for name in names):
        return does_not_apply("a vocabulary of one token leaves none to poison")
    clean, hidden, visible = _poisoned(case, names)
    comparisons: list[Comparison] = []
    problems: list[str] = []
    runs: list[tuple[Run, Run]] = []
    for twin in evidence.twins:
        evidence.progress(f"{twin.name}: NaN and infinities")
        before = twin.run(clean).output
        after, shown = (twin.run(one) for one in (hidden, visible))
        runs.append((after, shown))
        counted = clean.cotangent != 0
        comparisons.append(
            compare(
                f"output of {twin.name} (hidden against clean)",
                np.where(counted, after.output, 0.0),
                np.where(counted, before, 0.0),
                bound=BOUND,
            )
        )
        if np.isfinite(shown.output).all():
            problems.append(f"{twin.name}: poison among real tokens is not seen in the output")
    sides = (evidence.twins[0].name, evidence.twins[1].name)
    for what, first, second in zip(("hidden", "in sight"), *runs, strict=True):
        problems += set_problems("module", first.modules, second.modules, sides)
        pairs = {"output": (first.output, second.output)}
        pairs |= {path: (seen, second.modules[path]) for path, seen in first.modules.items() if path in second.modules}
        comparisons += [
            compare(f"{path} ({what})", *pair, bound=BOUND)
            for path, pair in pairs.items()
            if np.isfinite(pair[0]).any() or np.isfinite(pair[1]).any()
        ]
    rung = rung_of(f"{len(comparisons)} tensors with NaN, inf and -inf about", comparisons, problems)
    rung.add(_overflowing(evidence, case), module_of)
    return rung


def _overflowing(evidence: Evidence, case: Case) -> list[Comparison]:
    """What overflows on the way is as if it had come: values of one token, finite before their product.

    The first self-attention is called by itself, with one element of a token so large that with one element of a matrix
    it has no product; all else of that row of the matrix is 0, so that no order of a sum decides.
    """
    call = evidence.self_attention(case)
    if call is None:
        return []
    found: list[Comparison] = []
    rows, length = call.arguments[0].shape[:2]
    # each time something has to be left that does not meet it
    if rows >= 2:
        found.append(_large_value(evidence, case, call))
    if length >= 4:
        found.append(_seen_by_one_head(evidence, case, call))
    if case.config.qk_norm == "none" and length >= 2:  # a norm would take the size away again
        found.append(_large_score(evidence, case, call))
    return found


def _large_score(evidence: Evidence, case: Case, call: Call) -> Comparison:
    """A hidden key whose score with every query is infinite, though both are finite: it stays hidden."""
    X = call.arguments[0].copy()
    middle = X.shape[1] // 2
    X[:, middle] *= 1e160
    matrix = f"{call.path}.query.weight"
    large = dataclasses.replace(case, tensors=case.tensors | {matrix: case.tensors[matrix] * 1e160})
    hides = np.arange(X.shape[1]) != middle
    given = dataclasses.replace(
        call, arguments=(X,), options={"mask": np.broadcast_to(hides, (X.shape[1],) * 2).copy()}
    )
    return alone(evidence, large, given, "score of a hidden key overflows")


def _seen_by_one_head(evidence: Evidence, case: Case, call: Call) -> Comparison:
    """A token that is not finite, under a mask of each head's own: every other query meets it, with its last head."""
    X = call.arguments[0].copy()
    T, middle = X.shape[1], X.shape[1] // 2
    X[:, middle] = np.nan
    allowed = np.ones((1, case.config.num_heads, T, T), np.bool_)
    allowed[..., middle] = False
    allowed[:, -1, ::2, middle] = True
    options = {name: value for name, value in call.options.items() if name in ("bias", "positions")}
    given = dataclasses.replace(call, arguments=(X,), options=options | {"mask": allowed})
    return alone(evidence, case, given, "a token that is not finite, seen by one head")


def _large_value(evidence: Evidence, case: Case, call: Call) -> Comparison:
    path, X = f"{call.path}.value.weight", call.arguments[0].copy()
    matrix = np.zeros_like(case.tensors[path])
    matrix[1:] = case.tensors[path][1:]
    matrix[0, 0] = 1e300
    X[0, X.shape[1] // 2, 0] = 1e10
    given = dataclasses.replace(call, arguments=(X, *call.arguments[1:]))
    large = dataclasses.replace(case, tensors=case.tensors | {path: matrix})
    return alone(evidence, large, given, "values of a token overflow")


def _poisoned(case: Case, names: Sequence[str]) -> tuple[Case, Case, Case]:
    """The case without poison, with poison in its padding, and in plain sight; only real positions count."""
    config, tensors = case.config, dict(case.tensors)
    if config.head == "tied":  # the table is the head's matrix as well: poison there would be in every logit
        table = "target_embedding.tokens.weight" if "target" in case.inputs else "embedding.tokens.weight"
        if config.share_embeddings:
            table = "source_embedding.tokens.weight"
        config = config.replace(head="untied")
        tensors["head.weight"] = tensors[table]
    inputs: Arrays = dict(case.inputs)
    seen: Arrays = {}
    bad = dict(tensors)
    for name in names:
        token = _vocabulary(config, name) - 1
        real = case.inputs[_mask(name)] if _mask(name) in case.inputs else np.ones(case.inputs[name].shape, np.bool_)
        tokens = np.where(case.inputs[name] == token, token - 1, case.inputs[name])
        inputs[name] = np.where(real, tokens, token)
        seen[name] = inputs[name].copy()
        seen[name][0, tokens.shape[1] // 2] = token
        prefix = "" if name == "tokens" else f"{name}_"
        path = f"{prefix}embedding.tokens.weight"
        path = path if path in tensors else "source_embedding.tokens.weight"
        bad[path] = bad[path].copy()
        bad[path][token, : len(POISON)] = POISON[: bad[path].shape[1]]
    last = case.inputs.get(_mask(names[-1]))
    cotangent = stream(0, "nonfinite/cotangent").standard_normal(case.cotangent.shape)
    if last is not None:
        cotangent = cotangent * last[:, :, None]
    clean = dataclasses.replace(case, config=config, tensors=tensors, inputs=inputs, cotangent=cotangent, finite=False)
    hidden = dataclasses.replace(clean, tensors=bad)
    return clean, hidden, dataclasses.replace(hidden, inputs=inputs | seen)


def _mask(name: str) -> str:
    return "padding_mask" if name == "tokens" else f"{name}_padding_mask"


def _vocabulary(config: ModelConfig, name: str) -> int:
    return config.source_vocab_size if name == "source" else config.vocab_size
