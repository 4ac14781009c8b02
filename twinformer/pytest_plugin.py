"""The pytest plugin: ``parity(torch_model, flax_model, inputs=…)`` in a test fails with the table and the culprit.

Loading it imports neither framework; that happens in the first test that uses the fixture.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from twinformer.parity import Report

_MADE: pytest.StashKey[list[tuple[str, Report]]] = pytest.StashKey()


class Parity:
    """What the fixture gives: a call checks and asserts, ``check`` only checks."""

    def __init__(self, config: pytest.Config, test: str) -> None:
        self._config, self._test = config, test

    def __call__(self, torch_model: Any, flax_model: Any, **options: Any) -> Report:
        """Check a port (``twinformer.parity.check`` has the options) and assert that it agrees."""
        __tracebackhide__ = True
        report = self.check(torch_model, flax_model, **options)
        report.assert_agrees()
        return report

    def check(self, torch_model: Any, flax_model: Any, **options: Any) -> Report:
        """The report alone; it is listed at the end of the session, and kept with ``--parity-json``."""
        from twinformer.parity import check

        report = check(torch_model, flax_model, **options)
        made = self._config.stash[_MADE]
        made.append((self._test, report))
        directory = self._config.getoption("parity_json")
        if directory is not None:
            name = re.sub(r"[^\w.-]+", "_", f"{self._test}-{sum(test == self._test for test, _ in made)}")
            Path(directory).mkdir(parents=True, exist_ok=True)
            (Path(directory) / f"{name}.json").write_text(json.dumps(report.to_dict(), indent=2, allow_nan=False))
        return report


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("twinformer")
    group.addoption("--parity-json", metavar="DIR", default=None, help="keep the report of every parity check in DIR")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MADE] = []


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Parity:
    """``parity(torch_model, flax_model, inputs=…)``: fails where the port differs, naming the culprit."""
    return Parity(request.config, request.node.nodeid)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    made = config.stash[_MADE]
    if not made:
        return
    terminalreporter.section("twinformer")
    for test, report in made:
        culprits = f", culprit: {', '.join(report.culprits)}" if report.culprits else ""
        terminalreporter.write_line(f"{test}: {report.subject}: {report.verdict}{culprits}")
    left = dict.fromkeys(name for _, report in made for name in report.not_run)
    terminalreporter.write_line(f"not run in some or all: {', '.join(left)}")
