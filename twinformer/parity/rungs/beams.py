"""Rung 8, continued: which hypotheses a beam keeps; the texts as streams, and what is scored.

Both twins search with the case's model and both length penalties, against the reference's own search, which asks for
one full forward in each step. With all weights zero every continuation ties, and only the order decides. Where the
context has room a search goes on beyond the first block of slots: then its sums are held against a full forward.
"""

from __future__ import annotations

from twinformer.parity.evidence import Evidence
from twinformer.parity.remembered import Remembered
from twinformer.parity.rungs.sampling import add, prepared, verdict
from twinformer.parity.verdict import Rung, does_not_apply
from twinformer.parity.writing_checks import Problems, rescored, scored_low, searched, written


def check(evidence: Evidence) -> Rung:
    """Beams first, then the other ways to the same tokens and log-probabilities."""
    whole = evidence.case
    if whole.config.architecture == "encoder":
        return does_not_apply("an encoder writes no tokens: there is nothing to search")
    if not whole.config.predicts_tokens:
        return does_not_apply("the model predicts no tokens: there is nothing to search")
    case, writing = prepared(whole)
    comparisons = []
    problems: Problems = {}
    hypotheses = tokens = 0
    twins = (Remembered(evidence.twins[0]), evidence.twins[1])  # both are held against what the first gives
    for twin in twins:
        evidence.progress(f"{twin.name}: beam search")
        wrong, count = searched(twin, twins[0], case, writing)
        add(problems, twin.name, wrong)
        hypotheses += count
        evidence.progress(f"{twin.name}: greedy, as streams, and scored")
        # first: what is asked below of a twin that remembers is not written again, and a generator has to write twice
        figures, wrong, count = written(twin, twins[0], case, writing, "greedy")
        comparisons += figures
        add(problems, twin.name, wrong)
        tokens += count
        for ask in (rescored, scored_low):
            figures, wrong = ask(twin, twins[0], case, writing)
            comparisons += figures
            add(problems, twin.name, wrong)
    return verdict(f"{hypotheses} hypotheses, {tokens} tokens written", comparisons, problems, case, whole)
