"""Who imports whom: neither twin the other's framework, and ``twinformer`` none; nor anything else that is not needed.

What an import costs in time is measured by ``benchmarks/import_cost.py``; here is what decides it: the set of modules.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORKS = {
    "torch": {"torch", "torchgen", "functorch", "torch_impl"},
    "flax": {"jax", "jaxlib", "flax", "optax", "orbax", "flax_impl"},
}
WITNESSES = {"transformers", "tokenizers", "hypothesis", "pytest", "beartype"}


def loaded(statement):
    """Top-level names of every module that a fresh interpreter holds after ``statement``."""
    report = "import sys, json; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\n{report}"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return set(json.loads(done.stdout))


def test_the_report_sees_what_is_imported():
    """The scan itself can fail: it finds a framework where one is imported."""
    assert "jax" in loaded("import jax")
    assert "jax" not in loaded("pass")


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import torch_impl", FRAMEWORKS["flax"] | WITNESSES),
        ("import flax_impl", FRAMEWORKS["torch"] | WITNESSES),
        ("import twinformer", FRAMEWORKS["torch"] | FRAMEWORKS["flax"] | WITNESSES),
        ("import twinformer.config, twinformer.checkpoint, twinformer.initializers, twinformer.parameters", None),
        ("import twinformer.sharded", None),
    ],
)
def test_what_an_import_does_not_pull_in(statement, forbidden):
    forbidden = FRAMEWORKS["torch"] | FRAMEWORKS["flax"] | WITNESSES if forbidden is None else forbidden
    assert loaded(statement) & forbidden == set()


def test_random_numbers_that_are_not_compiled_load_no_compiler():
    """PyTorch's compiler takes two seconds to import, and brings SymPy: at the first dropout, to whoever uses some."""
    words = "key = d.random_key(1); d.fold(key, 2); d.random_words(key, (3,)); d.drop(torch.ones(4, 5), 0.5, key)"
    rows = "d.philox_rows(key[None], torch.arange(3), 0)"
    used = f"import torch; import torch_impl.dropout as d; {words}; {rows}"
    assert "sympy" not in loaded(used)
    assert "sympy" in loaded(f"{used}; import torch._dynamo")


def third_party(names):
    return {name for name in names if name not in sys.stdlib_module_names and not name.startswith("_")}


#: what a twin may import beyond its framework
ALLOWED = {"torch_impl", "flax_impl", "twinformer", "jaxtyping", "numpy", "ml_dtypes", "wadler_lindig"}


@pytest.mark.parametrize(
    ("twin", "framework"), [("torch_impl", "import torch"), ("flax_impl", "import jax, jax.numpy, flax, flax.nnx")]
)
def test_a_twin_costs_little_more_than_its_framework(twin, framework):
    """Beyond the framework only the project itself, jaxtyping (and its printer), NumPy and its dtypes."""
    beyond = third_party(loaded(f"import {twin}")) - third_party(loaded(framework))
    assert twin in beyond
    assert beyond <= ALLOWED, f"also imports {sorted(beyond - ALLOWED)}"


# ---- in the source


def imports_of(file):
    """Every module that a file imports, wherever in it, under TYPE_CHECKING too; by its top-level name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield str(node.module).partition(".")[0]


def sources(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 5, f"{package}: only {len(files)} files found"
    return files


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("torch_impl", FRAMEWORKS["flax"]),
        ("flax_impl", FRAMEWORKS["torch"]),
        ("twinformer", FRAMEWORKS["torch"] | FRAMEWORKS["flax"]),
    ],
)
def test_no_source_names_the_other_framework(package, forbidden):
    """``twinformer/parity`` and ``twinformer/cli.py`` may: they are the one place that sees both. ``sharded.py`` names
    both and loads one."""
    may = {ROOT / "twinformer" / "cli.py", ROOT / "twinformer" / "sharded.py"}
    found = {
        str(file.relative_to(ROOT)): sorted(set(imports_of(file)) & forbidden)
        for file in sources(package)
        if file not in may and ROOT / "twinformer" / "parity" not in file.parents
    }
    assert {file: names for file, names in found.items() if names} == {}


def test_the_source_scan_sees_frameworks():
    """The scan itself can fail: it finds PyTorch in the PyTorch twin."""
    assert "torch" in set(imports_of(ROOT / "torch_impl" / "linear.py"))
    assert {"torch_impl", "flax_impl"} <= {name for f in sources("twinformer/parity") for name in imports_of(f)}
