"""A few hundred damaged published directories. Ten thousand: ``python -m parity_tests.damage``."""

from pathlib import Path

import pytest

from parity_tests import damage
from twinformer.errors import CheckpointError

# torch warns of pickles of other protocols before it refuses them; the suite would make an error of that
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


def test_damaged_directories_are_refused_or_read() -> None:
    summary = damage.run(300, seed=2)
    assert summary["defects"] == {}
    outcomes = summary["outcomes"]
    assert sum(outcomes.values()) == 300
    for call in ("convert", "inspect", "from_pretrained"):
        assert outcomes[f"{call} read"] > 0
        assert outcomes[f"{call} refused"] > 0


def test_a_defect_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(directory: Path, **_: object) -> None:
        raise KeyError(directory.name)

    monkeypatch.setattr(damage, "inspect", broken)
    found = damage.run(30, seed=2)
    assert found["outcomes"]["defect"] > 0
    assert all("KeyError" in defect for defect in found["defects"])


def test_what_is_left_behind_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves(_: Path, out: Path, **__: object) -> None:
        out.mkdir()
        raise CheckpointError("here", ["expected nothing, got something"])

    monkeypatch.setattr(damage, "convert", leaves)
    assert any("left behind" in defect for defect in damage.run(30, seed=2)["defects"])
