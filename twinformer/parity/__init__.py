"""The judge: proves that the twins agree, or names the first place where they do not.

This package, and the command line, are the only parts of ``twinformer`` that import both frameworks.
"""

from twinformer.parity.carry import Leaf, NamesError
from twinformer.parity.case import Case, make_case, random_case
from twinformer.parity.compare import Comparison, ErrorPair, compare
from twinformer.parity.judge import CannotJudgeError, judge
from twinformer.parity.ports import Inputs, PortError, check
from twinformer.parity.report import Report
from twinformer.parity.verdict import Rung

__all__ = [
    "CannotJudgeError",
    "Case",
    "Comparison",
    "ErrorPair",
    "Inputs",
    "Leaf",
    "NamesError",
    "PortError",
    "Report",
    "Rung",
    "check",
    "compare",
    "judge",
    "make_case",
    "random_case",
]
