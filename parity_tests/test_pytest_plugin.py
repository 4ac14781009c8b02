"""The pytest plugin, each time in a pytest of its own."""

import json
import os
import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]

PORT = """
import numpy as np
import torch
from flax import nnx

def models(eps):
    torch_model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    flax_model = nnx.Sequential(
        nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.LayerNorm(3, epsilon=eps, use_fast_variance=False, rngs=nnx.Rngs(0))
    )
    return torch_model, flax_model

OPTIONS = dict(inputs=np.ones((2, 4), np.float32), modules={"0": "layers.0", "1": "layers.1"}, weights="telling",
               precision=False)

def test_right(parity):
    parity(*models(1e-5), **OPTIONS)

def test_wrong(parity):
    parity(*models(1e-2), **OPTIONS)

def test_only_looks(parity):
    assert parity.check(*models(1e-2), **OPTIONS).culprits == ["1 (Flax: layers.1)"]
"""


def run(pytester, *arguments):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return pytester.runpytest_subprocess("-p", "no:xdist", "-p", "no:cacheprovider", *arguments)


@pytest.fixture
def plugin(pytester):
    """The plugin by its entry point where the installation has it, by name where it is older."""
    from importlib.metadata import entry_points

    known = [one for one in entry_points(group="pytest11") if one.value == "twinformer.pytest_plugin"]
    return () if known else ("-p", "twinformer.pytest_plugin")


def test_a_right_port_passes_and_a_wrong_one_fails_with_its_culprit(pytester, plugin):
    pytester.makepyfile(test_port=PORT)
    found = run(pytester, *plugin, "--parity-json", "reports")
    found.assert_outcomes(passed=2, failed=1)
    text = found.stdout.str()
    assert "forward: culprit: 1 (Flax: layers.1)" in text
    assert "test_port.py::test_right: port: agree" in text
    assert "test_port.py::test_wrong: port: differ, culprit: 1 (Flax: layers.1)" in text
    assert "not run in some or all: calls, nonfinite" in text
    kept = {path.name: json.loads(path.read_text())["verdict"] for path in (pytester.path / "reports").iterdir()}
    assert kept == {
        "test_port.py_test_right-1.json": "agree",
        "test_port.py_test_wrong-1.json": "differ",
        "test_port.py_test_only_looks-1.json": "differ",
    }


def test_loading_the_plugin_imports_no_framework():
    program = "import sys, twinformer.pytest_plugin; print(sorted({'torch', 'jax', 'flax'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_session_without_checks_says_nothing(pytester, plugin):
    pytester.makepyfile("def test_nothing(): pass")
    assert "twinformer ===" not in run(pytester, *plugin).stdout.str()
