"""The judge: proves that the twins agree, or names the first place where they do not.

This package, and the command line, are the only parts of ``twinformer`` that import both frameworks.
"""

from twinformer.parity.case import Case, make_case, random_case
from twinformer.parity.compare import Comparison, ErrorPair, compare
from twinformer.parity.judge import CannotJudgeError, judge
from twinformer.parity.report import Report
from twinformer.parity.verdict import Rung

__all__ = [
    "CannotJudgeError",
    "Case",
    "Comparison",
    "ErrorPair",
    "Report",
    "Rung",
    "compare",
    "judge",
    "make_case",
    "random_case",
]
