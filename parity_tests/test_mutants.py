"""The fault catalogue is whole, its runner can fail, and some of its faults are found here and now."""

import contextlib
import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from parity_tests.mutants import CATALOGUE, CONTROLS, DOES_NOT_APPLY, MUTANTS, ROWS
from parity_tests.mutants.patching import Patch
from twinformer.cli import app
from twinformer.parity import mutation_workers
from twinformer.parity.mutation import Bench, Control, Mutant, Outcome, is_right
from twinformer.parity.mutation_report import MutationReport
from twinformer.parity.rungs import LADDER

FILE = Path(__file__).parent / "mutants" / "catalogue.tsv"


# ---- the catalogue


def test_every_entry_is_planted_or_has_a_reason():
    """And none is twice anything."""
    mutants = {mutant.id for mutant in MUTANTS}
    controls = {control.id for control in CONTROLS}
    assert mutants | controls | set(DOES_NOT_APPLY) == set(ROWS)
    assert not mutants & controls
    assert not (mutants | controls) & set(DOES_NOT_APPLY)
    assert all(DOES_NOT_APPLY.values())
    planted = [(one.id, one.twin) for one in (*MUTANTS, *CONTROLS)]
    assert len(set(planted)) == len(planted)


def test_every_line_is_complete():
    with FILE.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t"))
    assert lines[0] == ["id", "group", "mechanism", "where", "classes", "source"]
    for line in lines[1:]:
        assert len(line) == 6, line
        assert all(line), line
    assert len({line[0] for line in lines}) == len(lines)


def test_legitimate_differences_are_controls():
    """What the catalogue calls noise is never a fault."""
    noise = {name for name, row in ROWS.items() if "NOISE" in row["classes"].split()}
    assert noise <= {control.id for control in CONTROLS} | set(DOES_NOT_APPLY)
    assert not noise & {mutant.id for mutant in MUTANTS}


def test_both_twins_are_faulty_in_turn():
    """But for what only a compiler makes a fault of."""
    twins = {mutant.id: {other.twin for other in MUTANTS if other.id == mutant.id} for mutant in MUTANTS}
    assert {name: found for name, found in twins.items() if found != {"torch_impl", "flax_impl"}} == {
        "T134": {"flax_impl"},
        "T140": {"flax_impl"},
        "T153": {"torch_impl"},
        "T187": {"torch_impl"},
        "T194": {"flax_impl"},
        "T195": {"torch_impl"},
        "T196": {"torch_impl"},
        "T198": {"torch_impl"},
        "T199": {"torch_impl"},
        "T207": {"flax_impl"},
        "T211": {"torch_impl"},
        "T212": {"flax_impl"},
    }


@pytest.mark.parametrize("planted", [*MUTANTS, *CONTROLS], ids=lambda planted: planted.label)
def test_everything_planted_can_be_tried(planted):
    """It names a case, rungs that can be run and, if it is to be found by one that names culprits, what is expected."""
    runnable = {step.name for step in LADDER} | {"refusal"}
    assert planted.case in CATALOGUE.cases
    assert planted.rungs
    assert set(planted.rungs) <= runnable
    assert isinstance(planted, Control) or planted.culprits or planted.rungs == ("refusal",)


def test_what_is_planted_is_taken_out_again():
    """Every function of both twins is what it was."""
    names = [n for n in sys.modules if n.partition(".")[0] in ("torch_impl", "flax_impl")]

    def everything():
        found = {}
        for name in names:
            for key, value in vars(sys.modules[name]).items():
                found[name, key] = value
                if isinstance(value, type) and value.__module__.partition(".")[0] in ("torch_impl", "flax_impl"):
                    found |= {(name, key, part): held for part, held in vars(value).items()}
        return found

    before = everything()
    for planted in (*MUTANTS, *CONTROLS):
        with planted.plant():
            changed = everything()
            assert any(changed.get(key) is not before.get(key) for key in changed), planted.label
        after = everything()
        assert after.keys() == before.keys(), planted.label
        assert all(after[key] is before[key] for key in before), planted.label


# ---- the runner can fail


def no_change(twin):
    """A plant that replaces a function by one that does the same."""

    @contextlib.contextmanager
    def plant():
        with Patch(twin) as patch:
            patch.function("feedforward", "activate", lambda activate: activate)
            yield patch

    return plant


def never_called(twin):
    @contextlib.contextmanager
    def plant():
        with Patch(twin) as patch:
            patch.function("positions", "alibi_bias", lambda bias: bias)
            yield patch

    return plant


def crashing(twin):
    @contextlib.contextmanager
    def plant():
        with Patch(twin) as patch:
            patch.function("feedforward", "activate", lambda activate: lambda *args: 1 / 0)
            yield patch

    return plant


@pytest.fixture(scope="module")
def bench():
    return Bench(CATALOGUE.cases)


def made(plant, twin="torch_impl", kind=Mutant, case="small-initial", rungs=("forward",), **more):
    return kind("Z1", twin, "made up", "ours", ("F",), plant(twin), case, rungs, **more)


def report_of(*outcomes):
    report = MutationReport(len(outcomes), {})
    for outcome in outcomes:
        report.add(outcome)
    return report


@pytest.mark.parametrize("twin", ["torch_impl", "flax_impl"])
def test_a_fault_that_changes_nothing_survives(bench, twin):
    outcome = bench.try_(made(no_change, twin))
    assert outcome.state == "survived"
    assert outcome.reached > 0
    report = report_of(outcome)
    assert report.exit_code == 1
    assert report.problems == [f"Z1 in {twin}: survived"]


def test_a_fault_that_is_never_reached_is_an_error(bench):
    outcome = bench.try_(made(never_called))
    assert (outcome.state, outcome.reached) == ("error", 0)
    assert "never reached" in outcome.message
    assert report_of(outcome).exit_code == 1


def test_a_crash_is_not_a_kill(bench):
    outcome = bench.try_(made(crashing))
    assert outcome.state == "error"
    assert "ZeroDivisionError" in outcome.message
    assert report_of(outcome).exit_code == 1


def test_a_control_that_alarms_is_a_problem(bench):
    fault = next(mutant for mutant in MUTANTS if (mutant.id, mutant.twin) == ("G4", "torch_impl"))
    outcome = bench.try_(made(lambda twin: fault.plant, kind=Control))
    assert outcome.state == "alarm"
    assert report_of(outcome).exit_code == 1


def test_a_case_that_differs_by_itself_kills_nothing(bench):
    """A kill on such a case would mean nothing."""
    case = bench.case("small-initial")

    class Unequal(Bench):
        def _climb(self, name, rung, faulty):
            found, culprits = super()._climb(name, rung, faulty)
            return dataclasses.replace(found, verdict="differ"), culprits

    unequal = Unequal({"small-initial": lambda: case})
    outcome = unequal.try_(made(no_change))
    assert outcome.state == "error"
    assert "without any fault" in outcome.message


def test_a_wrong_culprit_counts():
    named = Outcome("Z1", "torch_impl", "mutant", "c", ("F",), "made up", "killed", right=False)
    assert report_of(named).exit_code == 1
    others = [dataclasses.replace(named, id=f"Z{i}", right=True) for i in range(2, 40)]
    assert report_of(named, *others).exit_code == 0, "one in 39 may be wrong"


def test_an_outcome_that_is_missing_is_a_problem():
    report = MutationReport(2, {})
    report.add(Outcome("Z1", "torch_impl", "mutant", "c", ("F",), "made up", "killed"))
    assert report.exit_code == 1


@pytest.mark.parametrize(
    ("named", "expected", "right"),
    [
        (["stack.blocks.0.attention"], ("*.attention",), True),
        (["stack.blocks.0.dropout#2"], ("*.dropout",), True),
        (["stack.blocks.0.attention", "stack.blocks.0.feedforward"], ("*.attention",), False),
        (["stack.blocks.0.cross_attention"], ("*.attention",), False),
        ([], ("*.attention",), False),
    ],
)
def test_what_counts_as_right(named, expected, right):
    assert is_right(named, expected) is right


def test_a_dead_worker_is_not_waited_for(monkeypatch):
    class Dead:
        exitcode = -9

    class Silent:
        def get(self, timeout):
            raise mutation_workers.queue.Empty

    with pytest.raises(RuntimeError, match="-9"):
        next(mutation_workers._messages(Silent(), [Dead()]))


# ---- some faults, by the command


def twinformer(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "twinformer.cli", "mutants", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"COLUMNS": "160"} | environment,
    )


def here(*arguments):
    """Without a process of its own, for what ends before anything is planted."""

    def run(chosen, jobs):
        assert not chosen, "something would be planted"
        yield from ()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mutation_workers, "run", run)
        done = CliRunner().invoke(app, ["mutants", *arguments], env={"COLUMNS": "160"})
    assert "would be planted" not in done.output
    return done


def test_what_would_be_planted_is_noticed():
    with pytest.raises(AssertionError, match="would be planted"):
        here("G4")


def test_some_faults_are_found_and_named(tmp_path):
    """Of each kind: a formula, a weight, a gradient, a mask, a precision, a refusal and a control."""
    file = tmp_path / "matrix.json"
    chosen = ["G4", "W8", "N6", "T71", "P14", "N5", "M2"]
    done = twinformer(*chosen, "--jobs", "1", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert found["killed"] == found["mutants"] == 2 * len(chosen)
    assert found["culprits_right"] == found["culprits_named"] == 2 * (len(chosen) - 1)
    assert found["problems"] == []
    assert {outcome["id"] for outcome in found["outcomes"]} == set(chosen)
    assert all(outcome["reached"] > 0 for outcome in found["outcomes"])
    assert all(baseline["agrees"] for baseline in found["baselines"])
    assert found["settings"]["jax"]
    for word in ("G4", "killed", "right", "14 of 14 mutants killed"):
        assert word in done.stdout


def test_unknown_ids_are_one_message_that_names_all():
    done = here("A7", "A777", "B1")
    assert done.exit_code == 2
    assert "A777" in done.stderr
    assert "B1" in done.stderr
    assert "'A7'" not in done.stderr
    assert "Traceback" not in done.stderr
    refused = here("--twin", "jax")
    assert refused.exit_code == 2
    assert "--twin: expected one of" in refused.stderr


def test_an_entry_that_does_not_apply_says_why():
    done = here("W7")
    assert done.exit_code == 0
    assert "never fused" in done.stdout


def test_without_a_checkout_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(mutation_workers, "ROOT", tmp_path)
    done = here()
    assert done.exit_code == 2
    assert "checkout" in done.stderr


# Whoever is started in the background of a shell ignores Ctrl-C, and so would all that it starts.
_LISTENING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from twinformer.cli import main
sys.argv = ["twinformer", *sys.argv[1:]]
main()
"""


def test_ctrl_c_prints_what_was_done():
    command = [sys.executable, "-c", _LISTENING, "mutants", "--jobs", "1"]  # all: not done in a few seconds
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            _wait_for_workers(process.pid)
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, err
    assert "mutants killed" in out
    assert "interrupted" in err


def _is_a_worker(pid):
    """Imports start processes too, and Python keeps one beside its workers."""
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return False


def _wait_for_workers(pid):
    """Until it has started others: an interrupt in the middle of an import can be lost, whoever imports."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    if not children.exists():  # not everywhere
        time.sleep(20)
        return
    for _ in range(1200):
        if any(_is_a_worker(child) for child in children.read_text().split()):
            time.sleep(1)
            return
        time.sleep(0.1)
    raise AssertionError("no worker within two minutes")


def test_margins_are_json():
    outcome = Outcome("Z1", "torch_impl", "mutant", "c", ("F",), "made up", "killed", seconds=np.float64(1.0))
    json.dumps(report_of(outcome).to_dict(), allow_nan=False)
