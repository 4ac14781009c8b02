"""Set up before anything is imported: float64 in JAX, compiled programs kept on disk, shapes checked on every call.

JAX compiles each operation for each shape, which is most of the time that the tests take: machine code is made with
little care (set ``XLA_FLAGS`` for another choice), and the programs are kept in pytest's cache directory, where the
other worker and the next run find them (JAX's key holds the program, the flags, the versions and the machine).
Each worker lowers its programs in one MLIR context.

jaxtyping's import hook checks every annotated shape and dtype of both twins, with beartype, while the tests of the
twins run. A call with a wrong shape is then refused by the hook before the project's own checks see it; a test of those
checks asks for the fixture ``without_shape_hook`` (or uses ``helpers.shape_hook_off()`` around single calls). Where
the twins are not the subject the hook is off: it takes every seventh second.
"""

import contextlib
import gc
import os
import pathlib
import sys

from parity_tests.quick_programs import XLA_FLAGS, share_contexts

os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

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
share_contexts()
# as many processes as cores run side by side under pytest-xdist
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# the same few examples on every run: a test that fails fails for everybody
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=20, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_finish(session):
    """What was imported stays: Python's collector, which took one second in ten, need not look through it, and
    looks through what has lived for long less often."""
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 100)


@pytest.fixture(autouse=True, scope="module")
def shape_hook_by_file(request):
    """Off in some files, for their fixtures too."""
    from parity_tests.helpers import WITHOUT_SHAPE_HOOK, shape_hook_off

    with shape_hook_off() if request.path.stem in WITHOUT_SHAPE_HOOK else contextlib.nullcontext():
        yield


@pytest.fixture
def without_shape_hook():
    """Calls reach the project's own checks (InputError), not jaxtyping's."""
    from parity_tests.helpers import shape_hook_off

    with shape_hook_off():
        yield


@pytest.fixture(scope="module")
def one_thread():
    """For files whose matrices are so small that a second thread costs far more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
