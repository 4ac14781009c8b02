"""The ledger is whole: every field of the configuration stands in it, and every test that it names is there."""

import ast
import dataclasses
from pathlib import Path

import pytest

from parity_tests.mutants import MUTANTS
from twinformer.config import ModelConfig
from twinformer.ledger import LEDGER, as_markdown

HERE = Path(__file__).parent


def test_every_field_of_the_configuration_is_one_choice():
    named = [name for choice in LEDGER for name in choice.fields]
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(ModelConfig))


@pytest.mark.parametrize("choice", LEDGER, ids=lambda choice: choice.name)
def test_every_choice_is_held_by_tests_that_exist(choice):
    assert choice.tests
    for test in choice.tests:
        file, _, function = test.partition("::")
        tree = ast.parse((HERE / file).read_text())
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in functions, test


def test_the_page_is_made_from_the_ledger():
    assert (HERE.parent / "docs" / "ledger.md").read_text() == as_markdown()


@pytest.mark.parametrize("choice", LEDGER, ids=lambda choice: choice.name)
def test_every_fault_that_is_named_is_planted_in_both_twins(choice):
    planted = {mutant.id: set() for mutant in MUTANTS}
    for mutant in MUTANTS:
        planted[mutant.id].add(mutant.twin)
    for name in choice.mutants:
        assert planted.get(name) == {"torch_impl", "flax_impl"}, name


def test_every_choice_that_can_be_wrong_has_a_fault():
    assert {choice.name for choice in LEDGER if not choice.mutants} == {
        "rematerialisation",
        "loop over blocks",
        "initial weights",
    }
