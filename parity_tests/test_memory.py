"""What is freed stays with the process."""

import platform
import subprocess
import sys

import pytest

import twinformer.parity.memory
from twinformer.parity.memory import keep_freed_memory

# the file alone: the package that it is in imports both frameworks
PROGRAM = f"""
import resource, runpy, sys
if sys.argv[1] == "keep":
    assert runpy.run_path({twinformer.parity.memory.__file__!r})["keep_freed_memory"]()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    b"1" * (40 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_pages_are_asked_for_once():
    """Twelve large arrays after each other: the system gives pages for one of them."""
    keep, leave = (
        int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "leave")
    )
    assert 0 < keep * 6 < leave


def test_nothing_is_changed_where_the_library_cannot(monkeypatch):
    class Nothing:
        def __init__(self, name):
            assert name is None

    monkeypatch.setattr(twinformer.parity.memory.ctypes, "CDLL", Nothing)
    assert keep_freed_memory() is False


def test_other_systems_are_not_asked(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(twinformer.parity.memory.ctypes, "CDLL", None)  # would raise
    assert keep_freed_memory() is False
