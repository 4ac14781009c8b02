"""What a rung found: a verdict, the figures behind it, and the first place of disagreement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from twinformer.parity.compare import Comparison, ErrorPair, worst_of

Verdict = Literal["agree", "differ", "cannot tell", "does not apply", "not run"]


@dataclass
class Rung:
    """The outcome of one rung.

    ``problems`` are disagreements (or, with "cannot tell" and "does not apply", the reasons why); ``culprits`` names
    the modules that introduce a difference; ``notes`` are said but decide nothing.
    """

    verdict: Verdict
    checked: str
    comparisons: list[Comparison | ErrorPair] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    culprits: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def worst(self) -> Comparison | ErrorPair | None:
        """The comparison nearest to its bound, or furthest beyond."""
        return worst_of(self.comparisons)

    def add(self, comparisons: Sequence[Comparison], culprit: Callable[[Comparison], str]) -> None:
        """More comparisons. One that fails makes the rung differ, whatever it said, and names what is to blame."""
        self.comparisons += comparisons
        failed = [one for one in comparisons if not one.agrees]
        if failed and self.verdict != "differ":
            self.verdict, self.notes, self.problems = "differ", self.notes + self.problems, []
        self.problems += [one.describe() for one in failed]
        self.culprits = list(dict.fromkeys([*self.culprits, *map(culprit, failed)]))


def rung_of(checked: str, comparisons: Sequence[Comparison | ErrorPair], problems: Sequence[str] = ()) -> Rung:
    """Agreement if there were comparisons, all agree, and there are no other problems.

    Where all that fails lies within the measured noise floor of the computation, the rung cannot tell.
    """
    failed = [comparison for comparison in comparisons if not comparison.agrees]
    if failed or problems:
        found = [*problems, *(comparison.describe() for comparison in failed)]
        if not problems and all(isinstance(one, Comparison) and one.within_noise for one in failed):
            reasons = [f"{text}: rounding alone can do this here (ill-conditioned)" for text in found]
            return Rung("cannot tell", checked, list(comparisons), reasons)
        return Rung("differ", checked, list(comparisons), found)
    if not comparisons:
        return Rung("cannot tell", checked, [], ["nothing was compared"])
    return Rung("agree", checked, list(comparisons))


def does_not_apply(why: str) -> Rung:
    """A rung about something that the model does not have."""
    return Rung("does not apply", why)
