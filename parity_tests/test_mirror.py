"""The twins side by side: same files, same public names, same arguments in the same order with the same defaults.

``forward`` in PyTorch is ``__call__`` in Flax. What one framework needs and the other does not know is listed here,
with its reason, and nothing else differs.
"""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from flax import nnx

from parity_tests.helpers import FLAX, TORCH, parameters
from parity_tests.strategies import seeded_cases
from twinformer import StackConfig
from twinformer.parameters import model_parameters

ROOT = Path(__file__).resolve().parent.parent
#: files of one twin alone
OWN_FILES = {
    "torch": {
        "fused": "PyTorch's own kernels; XLA fuses the formulas by itself",
        "pickled": "published weights in pickles, which PyTorch alone can read without running them",
    },
    "flax": {},
}
FILES = sorted(path.stem for path in (ROOT / "torch_impl").glob("*.py") if path.stem not in OWN_FILES["torch"])

#: arguments of one twin alone: {twin: {argument: reason}}
OWN_ARGUMENTS = {
    "torch": {"device": "PyTorch's tensors are made on a device that is named; JAX places them by itself"},
    "flax": {},
}
#: methods of one twin alone
OWN_METHODS = {"torch": {"extra_repr": "PyTorch's own hook for what a module prints"}, "flax": {}}


def public(twin, file):
    """Classes and functions defined in a file (not imported into it), by name."""
    module = twin.file(file)
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    }


def methods(kind):
    """Public methods and the call, defined by a class or a base of it within the twin, by the mirrored name."""
    found = {}
    for base in reversed(kind.__mro__):
        if base.__module__.partition(".")[0] not in ("torch_impl", "flax_impl"):
            continue
        for name, value in vars(base).items():
            shown = "forward" if name == "__call__" else name
            if callable(getattr(value, "__func__", value)) and (not name.startswith("_") or name == "__call__"):
                found[shown] = getattr(value, "__func__", value)
    return found


def arguments(function, twin):
    """(name, kind, default) in order, without self, cls and what is this twin's alone."""
    return [
        (p.name, p.kind.description, default(p.default))
        for p in inspect.signature(function).parameters.values()
        if p.name not in ("self", "cls", *OWN_ARGUMENTS[twin.name])
    ]


def default(value):
    """Comparable across twins: dataclasses and plain values by what they hold."""
    if value is inspect.Parameter.empty:
        return "no default"
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def test_same_files():
    for twin, own in OWN_FILES.items():
        found = {path.stem for path in (ROOT / f"{twin}_impl").glob("*.py")}
        assert sorted(found) == sorted([*FILES, *own])
    assert len(FILES) >= 12


#: what the contract calls each file to hold
CONTRACT = {
    "dropout": "random_key fold random_words Dropout",
    "linear": "Linear",
    "masks": "causal_mask window_mask padding_mask positions_from segment_mask segment_positions masked_softmax "
    "quarantine",
    "positions": "PositionalEncoding LearnedPositions RotaryEncoding RelativeBias alibi_slopes alibi_bias",
    "norms": "LayerNorm RMSNorm make_norm make_head_norm",
    "attention": "AttentionLayer attend",
    "feedforward": "FeedForward activate",
    "block": "Block",
    "stack": "TransformerStack",
    "embeddings": "TokenEmbedding Embeddings unembed",
    "heads": "Head pool",
    "models": "EncoderModel LanguageModel EncoderDecoder build compiled",
    "weights": "load_weights export_weights initialize load from_pretrained save",
    "losses": "cross_entropy mean_loss next_tokens",
    "optimizers": "Optimizer clip global_norm",
    "training": "Trainer",
    "lora": "init_adapters merge",
    "cache": "init_cache reset_cache reorder_cache",
    "sampling": "RepetitionPenalty Temperature TopK TopP MinP processors greedy draw sequence_keys uniforms",
    "generation": "Generator score",
    "beam": "beam_search",
}


def exported(twin):
    """{name: file} of what the package offers at its top."""
    package = importlib.import_module(twin.package)
    return {name: getattr(package, name).__module__.partition(".")[2] for name in package.__all__}


@pytest.mark.parametrize("twin", [TORCH, FLAX], ids=["torch", "flax"])
def test_the_contracts_names_are_there(twin):
    found = exported(twin)
    assert sorted(CONTRACT) == sorted(name for name in FILES if name != "__init__")
    for file, names in CONTRACT.items():
        assert set(names.split()) <= set(public(twin, file)), file
        assert {name: found.get(name) for name in names.split()} == dict.fromkeys(names.split(), file)


def test_same_names_at_the_top():
    """A name that one twin offers the other offers from the same file. Helpers are its own affair."""
    assert exported(TORCH) == exported(FLAX)


PAIRS = {
    f"{file}.{name}": (public(TORCH, file)[name], public(FLAX, file)[name])
    for name, file in exported(TORCH).items()
    if name in exported(FLAX)  # that the sets are equal is test_same_names_at_the_top
}
CLASSES = {name: pair for name, pair in PAIRS.items() if inspect.isclass(pair[0])}
FUNCTIONS = {name: pair for name, pair in PAIRS.items() if inspect.isfunction(pair[0])}


def test_there_is_something_to_compare():
    assert len(CLASSES) >= 15
    assert len(FUNCTIONS) >= 15


@pytest.mark.parametrize(("ours", "theirs"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_same_arguments_of_functions(ours, theirs):
    assert arguments(ours, TORCH) == arguments(theirs, FLAX)


@pytest.mark.parametrize(("ours", "theirs"), CLASSES.values(), ids=CLASSES)
def test_same_arguments_of_constructors(ours, theirs):
    assert inspect.isclass(theirs)
    assert arguments(ours.__init__, TORCH) == arguments(theirs.__init__, FLAX)


@pytest.mark.parametrize(("ours", "theirs"), CLASSES.values(), ids=CLASSES)
def test_same_methods_with_the_same_arguments(ours, theirs):
    found, others = methods(ours), methods(theirs)
    found = {name: method for name, method in found.items() if name not in OWN_METHODS["torch"]}
    assert sorted(found) == sorted(others)
    for name, method in found.items():
        assert arguments(method, TORCH) == arguments(others[name], FLAX), name


def parts_of(module):
    """Names of the parts and parameters that a module holds, under the contract's names."""
    if isinstance(module, torch.nn.Module):
        return {name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))}
    names = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    held = {name: value for name, value in vars(module).items() if isinstance(value, (nnx.Module, nnx.Param))}
    return {names.get(name, name) if isinstance(value, nnx.Param) else name for name, value in held.items()}


@pytest.mark.parametrize("architecture", ["encoder", "decoder", "encoder-decoder"])
def test_same_attributes(architecture):
    """Part by part down a whole model: the same names lead to the same parts, None where there is none."""
    case = next(c for c in seeded_cases(100, seed=11) if c.config.architecture == architecture and c.config.head_bias)
    config = case.config.replace(qk_norm="rmsnorm", embedding_norm=True, final_norm=True)
    pairs = [("model", TORCH.file("models").build(config), FLAX.file("models").build(config))]
    seen = 0
    while pairs:
        path, ours, theirs = pairs.pop()
        assert type(ours).__name__ == type(theirs).__name__, path
        assert parts_of(ours) == parts_of(theirs), path
        seen += 1
        for name, part in ours.named_children():
            if type(part).__name__ == "ModuleList":
                others = getattr(theirs, name)
                assert len(part) == len(others), f"{path}.{name}"
                pairs += [(f"{path}.{name}.{i}", *pair) for i, pair in enumerate(zip(part, others, strict=True))]
            else:
                pairs.append((f"{path}.{name}", part, getattr(theirs, name)))
    assert seen >= 12


def test_same_parameter_trees():
    """Same paths, same shapes, and in the contract's order where order shows."""
    for case in seeded_cases(25, seed=12):
        ours = {path: v.shape for path, v in parameters(TORCH.file("models").build(case.config, seed=None)).items()}
        theirs = {path: v.shape for path, v in parameters(FLAX.file("models").build(case.config, seed=None)).items()}
        assert ours == theirs
        assert ours == {path: p.shape for path, p in model_parameters(case.config).items()}
        exported = TORCH.file("weights").export_weights(TORCH.file("models").build(case.config, seed=None))
        others = FLAX.file("weights").export_weights(FLAX.file("models").build(case.config, seed=None))
        assert set(exported) == set(others)


# ---- sources: the equations that a file says it holds


def cited():
    """{file: authors and arXiv numbers that the contract names in the file's section}."""
    sections = re.split(r"^## `(\w+)\.py`", (ROOT / "docs" / "contract.md").read_text(encoding="utf-8"), flags=re.M)
    found = {}
    for file, text in zip(sections[1::2], sections[2::2], strict=True):
        found[file] = set(re.findall(r"arXiv:\d{4}\.\d{5}", text))
        found[file] |= set(re.findall(r"([A-Z][a-z]+)(?= et al\.| & [A-Z][a-z]+ \d{4}|,? \d{4}\b)", text))
    return {file: names for file, names in found.items() if names}


CITED = cited()


def test_the_contract_cites():
    """The scan of the contract can fail: it finds these."""
    assert {"arXiv:2104.09864", "Su", "arXiv:1910.10683", "Raffel", "arXiv:2108.12409", "Press", "Vaswani"} <= CITED[
        "positions"
    ]
    assert CITED["dropout"] == {"Salmon"}
    assert {"Shazeer", "arXiv:2002.05202"} <= CITED["feedforward"]
    assert "Zhang" in CITED["norms"]


@pytest.mark.parametrize("twin", [TORCH, FLAX], ids=["torch", "flax"])
@pytest.mark.parametrize("file", CITED)
def test_sources_are_named(twin, file):
    """Whoever the contract names for an equation is named in that file's docstrings."""
    tree = ast.parse((ROOT / twin.package / f"{file}.py").read_text(encoding="utf-8"))
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    text = " ".join(ast.get_docstring(node) or "" for node in nodes)
    assert {name for name in CITED[file] if name not in text} == set()


@pytest.mark.parametrize("twin", [TORCH, FLAX], ids=["torch", "flax"])
def test_public_names_have_docstrings(twin):
    for file in FILES:
        if file != "__init__":
            for name, value in public(twin, file).items():
                assert inspect.getdoc(value), f"{twin.package}.{file}.{name}"


def test_stack_choices_are_config_fields():
    """Both stacks take every StackConfig field by keyword."""
    given = {"norm": "rmsnorm", "norm_bias": False, "window": 2}
    assert set(given) <= {f.name for f in dataclasses.fields(StackConfig)}
    for twin in (TORCH, FLAX):
        stack = twin.file("stack").TransformerStack(6, 8, 4, 5, 2, 1, **given)
        assert {name: getattr(stack.config, name) for name in given} == given
