"""Set up before anything is imported: float64 in JAX, two threads in PyTorch, shapes checked on every call.

jaxtyping's import hook checks every annotated shape and dtype of both twins while the tests run, with beartype. A call
with a wrong shape is then refused by the hook before the project's own checks see it; a test of those checks asks for
the fixture ``without_shape_hook`` (or uses ``helpers.shape_hook_off()`` around single calls).
"""

import os
import sys

os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import jaxtyping
import pytest
import torch

for _package in ("torch_impl", "flax_impl"):
    if _package in sys.modules:
        raise RuntimeError(f"{_package} was imported before the shape checks were installed")
jaxtyping.install_import_hook(["torch_impl", "flax_impl"], "beartype.beartype")

jax.config.update("jax_enable_x64", True)
torch.set_num_threads(2)

# the same few examples on every run: a test that fails fails for everybody
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=20, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def without_shape_hook():
    """Calls reach the project's own checks (InputError), not jaxtyping's."""
    from parity_tests.helpers import shape_hook_off

    with shape_hook_off():
        yield
