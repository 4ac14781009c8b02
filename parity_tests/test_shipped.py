"""The models that come with the package: small, whole, found by name, and as good as their page says."""

import re

import numpy as np
import pytest

import torch_impl
from twinformer.checkpoint import read_model
from twinformer.data.guitar.arpeggio import score
from twinformer.data.guitar.arpeggio_data import ArpeggioTabs
from twinformer.data.guitar.baselines import lowest_fret
from twinformer.parameters import model_parameters
from twinformer.parity.subjects import find
from twinformer.runs import subjects
from twinformer.runs.guitar import predict
from twinformer.shipped import SHIPPED, directory


@pytest.mark.parametrize("name", SHIPPED)
def test_they_are_small_and_whole(name):
    place = directory(name)
    assert (place / "model.safetensors").stat().st_size <= 5_000_000
    config, tensors = read_model(place)
    assert {path: tensor.shape for path, tensor in tensors.items()} == {
        path: parameter.shape for path, parameter in model_parameters(config).items()
    }
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert "twinformer train" in (place / "MADE.md").read_text()
    assert find(name).case.config == config
    assert subjects.find(place).config == config


def test_other_names_are_none():
    assert directory("guitar") is None


def test_the_tablature_model_plays_as_well_as_its_page_says():
    """On the first sequences of the test part; what the page says of all 500 is printed by ``twinformer evaluate``."""
    model = torch_impl.load(directory("guitar-tab"))
    data = ArpeggioTabs("test", model.config.architecture, batch_size=20, size=40)
    found = [[string for string, _ in row] for row in predict(data, data.sequences, "torch", model)]
    mine, rule = score(data.sequences, found), score(data.sequences, [lowest_fret(s.pitches) for s in data.sequences])
    page = (directory("guitar-tab") / "MADE.md").read_text()
    (told,) = re.findall(r"\| this model \| (\d+\.\d) % \|", page)
    assert rule.accuracy < 0.7
    # three standard deviations of some 950 notes, which depend on each other
    assert abs(100 * mine.accuracy - float(told)) < 6
