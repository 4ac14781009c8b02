"""The ways to run a module: eager in either twin, `torch.compile`, and `jax.jit` on the split module."""

import contextlib
import warnings
from typing import Any

import jax
import pytest
import torch
from flax import nnx

from parity_tests.helpers import FLAX, TORCH, shape_hook_off


def eager(module, **inputs):
    return module(**inputs)


def jitted(module, **inputs):
    """Parameters and array arguments are traced; None stays None."""
    graph, state = nnx.split(module)
    return jax.jit(lambda state, inputs: nnx.merge(graph, state)(**inputs))(state, inputs)


#: the module that was compiled last, and its program
_compiled: list[Any] = [None, None]


def torch_compiled(module, **inputs):
    if _compiled[0] is not module:
        # programs are counted by the code of `forward`, whichever module it belongs to: without a reset the compiler
        # gives up on the ninth module of the session
        torch.compiler.reset()
        _compiled[:] = module, torch.compile(module, fullgraph=True)
    with shape_hook_off(), compiler_warnings():
        return _compiled[1](**inputs)


@contextlib.contextmanager
def compiler_warnings():
    """Within, what PyTorch's compiler warns of in its own code is no error: it uses what it deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        yield


#: run a test in every mode, as arguments ``twin`` and ``call``
MODES = [(TORCH, eager), (TORCH, torch_compiled), (FLAX, eager), (FLAX, jitted)]
every_mode = pytest.mark.parametrize(
    ("twin", "call"), MODES, ids=["torch-eager", "torch-compiled", "flax-eager", "flax-jit"]
)
