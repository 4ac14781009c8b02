"""The run over random configurations: what it writes down, and when it is no success."""

import os

import pytest

import twinformer.parity
from parity_tests import fuzz


def _line(verdict, **more):
    return {"case": "1/0", "verdict": verdict, "problems": ["why"], **more}


def test_a_crash_is_written_down(monkeypatch):
    def crash(*args, **options):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(twinformer.parity, "judge", crash)
    line = fuzz.judged((0, 1, fuzz.RUNGS))
    assert line["verdict"] == "crash"
    assert line["problems"] == ["ZeroDivisionError: by zero"]
    assert line["config"]["architecture"] in ("encoder", "decoder", "encoder-decoder")


def test_rungs_are_those_asked_for():
    line = fuzz.judged((0, 1, ("parameters",)))
    assert line["verdict"] == "agree"
    assert line["parameters"]["relative"] == 0
    assert "forward" not in line


@pytest.mark.parametrize(("verdict", "code"), [("agree", 0), ("cannot tell", 0), ("differ", 1), ("crash", 1)])
def test_success(verdict, code, capsys):
    assert fuzz.summarize([_line("agree"), _line(verdict)]) == code
    assert verdict in capsys.readouterr().out


def test_nothing_judged_is_no_success(capsys):
    assert fuzz.summarize([]) == 1
    assert "0 configurations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rungs", "flags"), [("parameters,forward", None), ("forward,precision", ""), ("rounding", "")]
)
def test_low_precision_is_compiled_as_users_have_it(rungs, flags, monkeypatch, tmp_path):
    """Programs made with little care round more: the flags for them are not set where it matters."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(fuzz, "run_all", lambda judge, todo, jobs: iter([_line("agree")]))
    monkeypatch.setattr("sys.argv", ["fuzz", "--cases", "1", "--rungs", rungs, "--out", str(tmp_path / "found.jsonl")])
    assert fuzz.main() == 0
    assert os.environ.pop("XLA_FLAGS", None) == flags
