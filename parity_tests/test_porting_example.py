"""The worked example in docs/porting.md: three mistakes found by following the messages alone."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx

from twinformer.parity import check

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "porting.md").read_text()
# what a reader of a message looks at, and the mistake that is found there
WHERE = {"attention": "heads", "attention_norm": "eps", "feedforward_norm": "eps", "feedforward": "gelu"}


def load(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / "examples" / "porting" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def examples():
    return load("torch_encoder"), load("flax_encoder")


def judged(examples, bugs):
    torch.manual_seed(0)
    original = examples[0].Classifier()
    port = examples[1].Classifier(bugs=bugs, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 50, (3, 12))
    return check(
        original,
        port,
        inputs=tokens,
        modules={"layers": "blocks"},
        weights="telling",
        precision=False,
        name="classifier",
    )


def test_following_the_messages_finds_all_three(examples):
    bugs = ["gelu", "eps", "heads"]
    found = []
    while (report := judged(examples, bugs)).verdict == "differ":
        culprit = report.culprits[0]
        assert f"culprit: {culprit}" in TEXT, "the text shows the message"
        found.append(WHERE[culprit.split(" ")[0].rpartition(".")[2]])
        bugs.remove(found[-1])
        assert len(found) <= 3
    report.assert_agrees()
    assert found == ["heads", "eps", "gelu"]
    assert bugs == []
