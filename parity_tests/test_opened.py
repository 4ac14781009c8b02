"""What ``from_pretrained`` makes of a published directory is what is judged, and what is not is seen."""

import json

import numpy as np
import pytest
import torch

import flax_impl
import torch_impl
from parity_tests.helpers import shape_hook_off
from parity_tests.test_cli import here
from parity_tests.test_original import publish
from twinformer.parity.evidence import Evidence
from twinformer.parity.opened import NAME, check_opened
from twinformer.parity.report import Report
from twinformer.parity.subjects import find


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Llama, whose angles come from a table that no file holds."""
    return publish("llama", "LlamaForCausalLM", tmp_path_factory.mktemp("llama") / "model")


def opened(place):
    subject = find(str(place))
    report = Report(subject="llama", description="", rungs={}, config={})
    with shape_hook_off():
        check_opened(place, Evidence(subject.case), report)
    return report.witnesses[NAME]


def test_both_twins_open_it_as_it_is(place):
    rung = opened(place)
    assert rung.verdict == "agree", rung.problems
    names = {one.name for one in rung.comparisons}
    assert {"output of torch_impl", "output of flax_impl", "embedding.tokens.weight of flax_impl"} <= names
    assert not rung.notes


def off_by_rounding(open_it):
    def wrong(directory, **options):
        model = open_it(directory, **options)
        weights = flax_impl.export_weights(model)
        path = next(path for path in weights if path.endswith("query.weight"))
        weights[path] = np.nextafter(weights[path], np.inf)
        flax_impl.load_weights(model, weights)
        return model

    return wrong


def frequencies_of_another_base(open_it):
    def wrong(directory, **options):
        model = open_it(directory, **options)
        for part in model.modules():
            if hasattr(part, "exact"):
                part.exact = [x * (1 + 1e-9) for x in part.exact]
        return model

    return wrong


def without_tables(open_it):
    """As it once was: a table stays where nothing is computed."""

    def wrong(directory, **options):
        model = open_it(directory, **options)
        for part in model.modules():
            if hasattr(part, "rounded"):
                part.rounded = torch.empty_like(part.rounded, device="meta")
        return model

    return wrong


@pytest.mark.parametrize(
    ("package", "fault", "says"),
    [
        (flax_impl, off_by_rounding, "query.weight of flax_impl"),
        (torch_impl, frequencies_of_another_base, "output of torch_impl"),
    ],
    ids=["a weight", "a table"],
)
def test_another_model_is_seen(package, fault, says, place, monkeypatch):
    monkeypatch.setattr(package, "from_pretrained", fault(package.from_pretrained))
    rung = opened(place)
    assert rung.verdict == "differ"
    assert says in rung.problems[0]


def test_a_model_that_does_not_run_is_no_agreement(place, monkeypatch):
    monkeypatch.setattr(torch_impl, "from_pretrained", without_tables(torch_impl.from_pretrained))
    with pytest.raises((NotImplementedError, RuntimeError)):
        opened(place)


def test_on_the_command_line_with_persistence(place, tmp_path):
    file = tmp_path / "report.json"
    done = here("parity", str(place), "--rungs", "parameters,persistence", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    (witness,) = json.loads(file.read_text())["witnesses"]
    assert (witness["name"], witness["verdict"]) == (NAME, "agree")
