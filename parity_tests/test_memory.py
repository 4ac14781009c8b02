"""What is freed stays with the process."""

import platform
import subprocess
import sys

import pytest

import twinformer.memory
from twinformer.memory import keep_freed_memory

# the file alone, without what its package imports
KEEP = f"""
import resource, runpy, sys, threading
if sys.argv[1] != "leave":
    keep_freed_memory = runpy.run_path({twinformer.memory.__file__!r})["keep_freed_memory"]
    assert keep_freed_memory(of_threads=sys.argv[1] == "of threads")
"""
PAGES = """
def work():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(12):
        b"1" * (int(sys.argv[3]) << 20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if sys.argv[2] == "here":
    work()
else:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""
# 3 GB that nobody writes to: the system gives no pages, only the room for them
ROOM = """
bytearray(3 << 30)
print(int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize())
"""

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


def seen(program, *arguments):
    command = [sys.executable, "-c", KEEP + program, *map(str, arguments)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@needs_glibc
@pytest.mark.parametrize("how", ["keep", "of threads"])
def test_pages_are_asked_for_once(how):
    """Twelve large arrays after each other: the system gives pages for one of them."""
    assert 0 < seen(PAGES, how, "here", 40) * 6 < seen(PAGES, "leave", "here", 40)


@needs_glibc
def test_a_thread_asks_for_pages_once_too():
    """Arrays that are larger than any heap of a thread."""
    assert 0 < seen(PAGES, "of threads", "thread", 80) * 6 < seen(PAGES, "keep", "thread", 80)


@needs_glibc
def test_more_than_2_gb_are_kept_for_threads_only():
    assert seen(ROOM, "keep") < 2 << 30
    assert seen(ROOM, "of threads") > 3 << 30


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
