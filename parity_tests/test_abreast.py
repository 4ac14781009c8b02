"""Rungs in a process of their own: the same verdicts, and nothing that happens there is lost."""

import dataclasses
import itertools
import multiprocessing
import os
import signal
import sys

import pytest
import torch

from twinformer import ConfigError
from twinformer.parity import judge, random_case
from twinformer.parity.abreast import APART, apart, beside, is_worth_it
from twinformer.parity.rungs import LADDER
from twinformer.parity.verdict import Rung
from twinformer.presets import preset


@pytest.fixture(scope="module")
def case():
    return random_case("gpt2", preset("gpt2").replace(num_layers=1), seed=3, batch=2, length=12)


def threads(case, names):
    return {name: Rung("differ", f"{case.name}, {os.getpid()}, {torch.get_num_threads()}") for name in names}


def contradiction(case, names):
    raise ConfigError(case.name, ["width: expected 3, got 4", "heads: expected 1, got 2"])


def defect(case, names):
    return {"sampling": 1 // len(case.name[:0])}


def killed(case, names):
    os.kill(os.getpid(), signal.SIGKILL)


def stuck(case, names):
    signal.pause()


def test_one_process_or_two_find_the_same(case):
    rungs = ["persistence", "parameters", "forward"]
    alone, abreast = (judge(case, rungs=rungs, abreast=how) for how in (False, True))
    assert list(abreast.rungs) == list(alone.rungs) == ["parameters", "forward", "persistence"]
    for name, rung in alone.rungs.items():
        other = abreast.rungs[name]
        assert (other.verdict, other.checked, other.notes) == (rung.verdict, rung.checked, rung.notes), name
        assert [one.name for one in other.comparisons] == [one.name for one in rung.comparisons], name
        assert len(rung.comparisons) > 0
    assert abreast.verdict == alone.verdict == "agree"


def test_what_is_found_elsewhere_counts(case, monkeypatch):
    monkeypatch.setattr(sys.modules["twinformer.parity.judge"], "climb_apart", threads)
    monkeypatch.setattr("twinformer.parity.abreast._SMALL", 100)  # of a small model, this process would take it itself
    before = torch.get_num_threads()
    report = judge(case, rungs=["parameters", "sampling"], abreast=True)
    assert report.verdict == "differ"
    name, pid, count = report.rungs["sampling"].checked.split(", ")
    assert (name, int(count)) == ("gpt2", max(1, (os.cpu_count() or 1) // 2))
    assert int(pid) != os.getpid()
    assert torch.get_num_threads() == before


def test_errors_arrive_as_they_are(case):
    with (
        pytest.raises(ConfigError, match="heads: expected 1, got 2") as caught,
        beside(contradiction, case, ["sampling"]) as others,
    ):
        others.wait()
    assert caught.value.subject == "gpt2"
    assert caught.value.problems == ("width: expected 3, got 4", "heads: expected 1, got 2")


@pytest.mark.parametrize(
    ("climb", "says"), [(defect, "ZeroDivisionError"), (killed, "sampling ended with exit code -9")]
)
def test_defects_are_no_verdict(case, climb, says):
    with pytest.raises(RuntimeError, match=says), beside(climb, case, ["sampling"]) as others:
        others.wait()


def test_nobody_is_left_behind(case):
    children = []

    def interrupted():
        children.extend(multiprocessing.active_children())
        assert [child.is_alive() for child in children] == [True]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), beside(stuck, case, ["sampling"]):
        interrupted()
    assert [child.is_alive() for child in children] == [False]


def both(case, names):
    return {name: Rung("agree", str(os.getpid())) for name in names}


def test_each_process_takes_what_the_other_has_not_begun(case):
    names = [f"rung {number}" for number in range(20_000)]
    with beside(both, case, names) as others:
        mine = list(itertools.islice(others.take(), len(names) // 2))  # half of them at most, and the rest there
        found = others.wait()
    assert sorted([*mine, *found], key=names.index) == names
    assert len(mine) > 0
    assert len(found) >= len(names) // 2
    assert {rung.checked for rung in found.values()} != {str(os.getpid())}


def test_nothing_to_take_where_nothing_is_apart(case):
    with beside(both, case, []) as others:
        assert list(others.take()) == []
        assert others.wait() == {}


@pytest.mark.parametrize("small", [True, False])
def test_what_runs_apart(case, small, monkeypatch):
    """Rungs of the ladder, none of which looks at another's verdict or shares its programs."""
    monkeypatch.setattr("twinformer.parity.abreast._SMALL", 10**9 if small else 100)
    names = apart(case)
    assert len(set(names)) == len(names)
    assert set(names) < {step.name for step in LADDER}
    assert set(names) >= set(APART)
    assert not set(names) & {"parameters", "forward", "gradients", "compilation", "sharding"}
    assert ("calls" in names, "optimizer" in names) == (True, small)


def test_two_processes_need_two_cores_and_memory_for_both(case, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr("twinformer.parity.abreast._free_memory", lambda: 0)
    assert is_worth_it(case)
    monkeypatch.setattr("twinformer.parity.abreast._SMALL", 100)
    assert not is_worth_it(case)
    weights = sum(tensor.size for tensor in case.tensors.values())
    monkeypatch.setattr("twinformer.parity.abreast._free_memory", lambda: 1000 * weights)
    assert is_worth_it(case)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
    assert not is_worth_it(case)


def test_free_memory_is_read_in_bytes():
    from twinformer.parity.abreast import _free_memory

    if not sys.platform.startswith("linux"):
        pytest.skip("the figure is that of Linux")
    assert 10**8 < _free_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def precise(case, names):
    return {name: Rung("agree", "7 pairs") for name in names}


def test_no_precision_where_float64_differs_whichever_process_ran_it(case, monkeypatch):
    """The other process measured errors against a truth that turned out to be none."""
    monkeypatch.setattr("twinformer.parity.abreast._SMALL", 100)
    monkeypatch.setattr(sys.modules["twinformer.parity.judge"], "climb_apart", precise)
    rungs = ["parameters", "forward", "precision"]
    assert judge(case, rungs=rungs, abreast=True).rungs["precision"].checked == "7 pairs"

    def differs(evidence):
        return Rung("differ", "1 output", problems=["planted"])

    ladder = [dataclasses.replace(step, check=differs) if step.name == "forward" else step for step in LADDER]
    monkeypatch.setattr(sys.modules["twinformer.parity.judge"], "LADDER", ladder)
    found = judge(case, rungs=rungs, abreast=True).rungs["precision"]
    assert found.verdict == "cannot tell"
    assert found.problems == ["the twins differ in float64 (forward): there is no truth to measure errors against"]
