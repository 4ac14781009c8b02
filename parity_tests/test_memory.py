"""What is freed stays with the process."""

import platform
import resource
import subprocess
import sys

import pytest

import twinformer.memory
from twinformer.memory import keep_freed_memory

# the file alone, without what its package imports
KEEP = f"""
import resource, runpy, sys
if sys.argv[1] in ("keep", "all"):
    keep_freed_memory = runpy.run_path({twinformer.memory.__file__!r})["keep_freed_memory"]
    assert keep_freed_memory(all_of_it=sys.argv[1] == "all")
"""
PAGES = """
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    b"1" * (40 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
# 3 GB that nobody writes to: the system gives no pages, only the room for them
ROOM = """
bytearray(3 << 30)
print(int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize())
"""
# a program that needs 128 MB and more while it runs, five times; without a loop JAX would take it for a short one
STEPS = """
from twinformer.memory import keep_freed_memory
from twinformer.runs.backends import prepare
keep_freed_memory(all_of_it=True)
if sys.argv[1] == "prepared":
    prepare(("flax",), "float32")
import jax
x = jax.numpy.ones(32 << 20)
once = lambda i, x: jax.lax.optimization_barrier(jax.numpy.sin(x) * 2) + i
program = jax.jit(lambda x: jax.lax.fori_loop(0, 3, once, x).sum())
for call in range(10):
    if call == 5:  # it has all that it needs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


def seen(program, how):
    command = [sys.executable, "-c", KEEP + program, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@needs_glibc
@pytest.mark.parametrize("how", ["keep", "all"])
def test_pages_are_asked_for_once(how):
    """Twelve large arrays after each other: the system gives pages for one of them."""
    assert 0 < seen(PAGES, how) * 6 < seen(PAGES, "leave")


@needs_glibc
def test_more_than_2_gb_are_kept_where_all_of_it_is():
    assert seen(ROOM, "keep") < 2 << 30
    assert seen(ROOM, "all") > 3 << 30


@needs_glibc
def test_memory_that_a_program_of_jax_frees_is_kept():
    """It runs in the main thread, of whose heap its memory then is, once ``prepare`` has been called."""
    pages = 5 * (128 << 20) // resource.getpagesize()
    assert seen(STEPS, "prepared") * 20 < pages
    assert seen(STEPS, "not prepared") >= pages


def test_nothing_is_changed_where_the_library_cannot(monkeypatch):
    class Nothing:
        def __init__(self, name):
            assert name is None

    monkeypatch.setattr(twinformer.memory.ctypes, "CDLL", Nothing)
    assert keep_freed_memory() is False


def test_other_systems_are_not_asked(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(twinformer.memory.ctypes, "CDLL", None)  # would raise
    assert keep_freed_memory() is False
