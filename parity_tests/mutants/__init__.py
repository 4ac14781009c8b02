"""The fault catalogue: real porting faults found in the wild, and some of our own, each planted in one twin at a time.

``catalogue.tsv`` has a line for each, with its source. Every id is a mutant or a control in one of the files here, or
it does not apply, for the reason given in ``absent.py``. ``twinformer mutants`` runs them.
"""

from parity_tests.mutants import (
    absent,
    activations,
    attention,
    decoding,
    dropout,
    fresh,
    masks,
    models,
    norms,
    optimizers,
    positions,
    precision,
    sampling,
    training,
    unforeseen,
    weights,
    writing,
)
from parity_tests.mutants.cases import CASES
from parity_tests.mutants.registry import CONTROLS, DOES_NOT_APPLY, MUTANTS, ROWS
from twinformer.parity.mutation import Catalogue

GROUPS = (
    *(norms, activations, attention, masks, positions, weights, models, dropout, precision),
    *(optimizers, training, decoding, sampling, unforeseen, writing, fresh, absent),
)
CATALOGUE = Catalogue(tuple(MUTANTS), tuple(CONTROLS), CASES, DOES_NOT_APPLY)

__all__ = ["CASES", "CATALOGUE", "CONTROLS", "DOES_NOT_APPLY", "GROUPS", "MUTANTS", "ROWS"]
