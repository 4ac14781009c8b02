"""The page: whole, self-contained, and saying what the report says."""

import html.parser
import re

import numpy as np
import pytest

from twinformer.ledger import LEDGER
from twinformer.parity import Report, Rung, compare
from twinformer.parity.compare import ErrorPair
from twinformer.parity.html import as_html
from twinformer.parity.rungs import LADDER
from twinformer.parity.strips import colour, group_of
from twinformer.parity.verdict import rung_of
from twinformer.presets import preset

VOID = {"meta", "br"}
HOSTILE = "<script>alert('&')</script>"


class Outline(html.parser.HTMLParser):
    """Tags in balance, and everything that would be fetched."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def module(name: str, off: float = 0.0):
    return compare(name, np.ones(4) + off, np.ones(4), bound=1e-12)


def report_of(**options) -> Report:
    errors = [module("output", 1e-7), module("output", 2e-7)]
    pair = ErrorPair.of(
        "output (float32, default)", ("torch_impl", "flax_impl"), errors, rounding=2.0**-24, bound=16.0, rms_bound=4.0
    )
    wrong = rung_of("3 outputs", [module("embedding"), module("stack.blocks.0.attention", 1e-3), module("output")])
    wrong.culprits = ["stack.blocks.0.attention"]
    rungs = {"forward": wrong, "precision": rung_of("1 pair", [pair])}
    command = "twinformer parity tiny"
    return Report("tiny", "a model", rungs, config=preset("llama").to_dict(), command=command, **options)


def test_the_page_is_whole_and_fetches_nothing():
    page = as_html(report_of())
    outline = Outline(page)
    assert outline.open == []
    assert outline.fetched == []
    assert "script" not in outline.tags
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", page)


def test_the_page_says_what_the_report_says():
    report = report_of(answers=[{"what": "a ~ b", "published": 0.9429, "torch_impl": 0.9429}])
    text = "\n".join(Outline(as_html(report)).text)
    for step in LADDER:
        assert step.name in text
    for choice in LEDGER:
        assert choice.name in text
    for said in ("differ", "First divergence: ", "stack.blocks.0.attention", "twinformer parity tiny", "0.9429"):
        assert said in text
    for name in report.not_run:
        assert name in text
    assert all(problem in text for rung in report.rungs.values() for problem in rung.problems)


def test_beyond_the_bound_is_marked_and_only_there():
    page = as_html(report_of())
    assert page.count('class="beyond"/>') == 1
    assert page.count('class="mark"/>') == 1
    agreeing = report_of()
    agreeing.rungs["forward"] = rung_of("", [module("embedding")])
    page = as_html(agreeing)
    assert 'class="beyond"/>' not in page
    assert 'class="mark"/>' not in page


def test_names_and_problems_are_escaped():
    report = report_of(notes=[HOSTILE])
    report.subject = report.description = HOSTILE
    report.rungs["gradients"] = Rung("differ", HOSTILE, [module(HOSTILE, 1.0)], [HOSTILE], [HOSTILE], [HOSTILE])
    outline = Outline(as_html(report))
    assert "script" not in outline.tags
    assert outline.open == []


def test_a_page_of_nothing_run():
    assert Outline(as_html(Report("x", "y", {}))).open == []


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("embedding.tokens", "embedding"),
        ("stack.blocks.3.attention.query", "3"),
        ("decoder.blocks.0", "decoder.0"),
        ("gradient of encoder.blocks.1.attention.key.weight (bfloat16, default)", "encoder.1"),
        ("output (float32, default)", "output"),
    ],
)
def test_parts_of_the_model(path, group):
    assert group_of(path) == group


def test_colours_follow_the_logarithm():
    shades = [colour(10.0**e, -17, 0) for e in range(-17, 1)]
    assert len(set(shades)) == len(shades)
    assert colour(0.0, -17, 0) == shades[0] == colour(1e-30, -17, 0)
    assert colour(1e9, -17, 0) == shades[-1]
    assert colour(float("inf"), -17, 0) == colour(float("nan"), -17, 0) == "#000"
