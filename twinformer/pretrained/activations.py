"""The activations of the ``transformers`` library (as of 5.0) that are one of ours.

Not among them: ``gelu_fast`` and ``quick_gelu``, which are other functions than either of our GELUs.
"""

from __future__ import annotations

from twinformer.config import Activation

#: theirs -> ours; of several names for one, the first is the one that we write
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def published_activation(ours: Activation) -> str:
    """The name that ``transformers`` gives to one of our activations."""
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)
