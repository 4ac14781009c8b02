"""What all tests share: the twins by name, arrays in and out, one strict comparison, gradients by name.

@both
def test_it(twin):
    layer = twin.file("linear").Linear(3, 2, **FLOAT64)
    set_parameters(layer, {"weight": W, "bias": b})
    assert_close(layer(twin.array(X)), X @ W.T + b)
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx

FLOAT64 = {"param_dtype": "float64", "compute_dtype": "float64"}


# ---- the twins


@dataclass(frozen=True)
class Twin:
    """One of the two packages. ``twin.file("norms").LayerNorm`` is its LayerNorm."""

    name: str
    package: str

    def file(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{name}")

    def array(self, values: Any) -> Any:
        """This framework's array of NumPy ``values``, dtype kept."""
        return to_torch(values) if self.name == "torch" else to_jax(values)

    def key(self, seed: int) -> Any:
        return self.file("dropout").random_key(seed)


TORCH = Twin("torch", "torch_impl")
FLAX = Twin("flax", "flax_impl")

#: run a test once for each twin, as argument ``twin``
both = pytest.mark.parametrize("twin", [TORCH, FLAX], ids=["torch", "flax"])


#: about the judge, about files of weights, about runs: what they call of the twins, tests of the twins call as well
WITHOUT_SHAPE_HOOK = frozenset(
    f"test_{name}"
    for name in (
        *("abreast", "adaptation", "bench", "cli", "generate_cli", "judge", "kinks", "long_run", "messages", "mirror"),
        *("mutants", "noise", "opened", "original", "porting_example", "ports", "power", "pretrained_bert"),
        *("pretrained_decoders", "pretrained_encoders", "pretrained_seq2seq", "pretrained_torch_nn"),
        *("pretrained_writing", "pytest_plugin", "real_seq2seq", "real_weights", "rounding", "rung_decoding"),
        *("rung_sampling", "rung_training", "rungs", "runs", "shipped", "stochastic", "sweep_decoding", "train_cli"),
    )
)


@contextlib.contextmanager
def shape_hook_off() -> Iterator[None]:
    """Within, jaxtyping checks nothing, so that a wrong call reaches the project's own checks."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


# ---- arrays


def to_torch(values: Any) -> torch.Tensor:
    values = np.array(values)  # a copy of its own
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def to_jax(values: Any) -> jax.Array:
    return jnp.asarray(np.array(values))


def to_numpy(array: Any) -> np.ndarray:
    """NumPy from either framework (or NumPy), dtype kept; bfloat16 becomes ``ml_dtypes.bfloat16``."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        if array.dtype == torch.bfloat16:
            return array.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return array.numpy()
    if isinstance(array, nnx.Variable):
        array = array.get_value()
    return np.asarray(array)


def random_array(seed: int, *shape: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Fixed normal values in float64."""
    return np.random.default_rng(seed).standard_normal(shape) * scale + shift


# ---- comparison


def assert_close(actual: Any, expected: Any, rtol: float = 1e-12, *, name: str = "") -> None:
    """Both are the same: shape, dtype, places of NaN and of each infinity; then ``max |a - e| <= rtol · max |e|``.

    Arrays of either framework or NumPy, or mappings of them (same keys, then each value). The bound is relative to the
    largest finite magnitude of ``expected``, so that no element hides behind its own size. Booleans and whole numbers
    must be equal. Nothing to compare is a failure too.
    """
    where = f"{name}: " if name else ""
    if isinstance(expected, Mapping) or isinstance(actual, Mapping):
        assert isinstance(actual, Mapping), f"{where}expected a mapping, got {type(actual).__name__}"
        assert isinstance(expected, Mapping), f"{where}expected one array, got a mapping"
        missing, surplus = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
        assert missing + surplus == [], f"{where}missing {missing}, unexpected {surplus}"
        assert len(expected) > 0, f"{where}nothing to compare"
        for key in expected:
            assert_close(actual[key], expected[key], rtol, name=f"{where}{key}")
        return
    a, e = to_numpy(actual), to_numpy(expected)
    assert a.shape == e.shape, f"{where}shape {a.shape}, expected {e.shape}"
    assert a.dtype == e.dtype, f"{where}dtype {a.dtype}, expected {e.dtype}"
    assert a.size > 0, f"{where}nothing to compare: shape {a.shape}"
    if a.dtype == np.bool_ or np.issubdtype(a.dtype, np.integer):
        _assert_no_place(a != e, "not equal", a, e, where)
        return
    assert a.dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16), f"{where}no rule for dtype {a.dtype}"
    a, e = a.astype(np.float64), e.astype(np.float64)
    _assert_no_place(np.isnan(a) != np.isnan(e), "NaN in one only", a, e, where)
    for infinity in (np.inf, -np.inf):
        _assert_no_place((a == infinity) != (e == infinity), f"{infinity} in one only", a, e, where)
    finite = np.isfinite(e)
    difference = np.zeros(a.shape)
    difference[finite] = np.abs(a[finite] - e[finite])
    largest = np.abs(e[finite]).max(initial=0.0)
    worst = np.unravel_index(difference.argmax(), a.shape)
    assert difference[worst] <= rtol * largest, (
        f"{where}element {_place(worst)} is {a[worst]!r}, expected {e[worst]!r}: off by {difference[worst]:.3e}, "
        f"allowed {rtol:.1e} of the largest, {largest:.3e}; {(difference > rtol * largest).sum()} of {a.size} are off"
    )


def _assert_no_place(wrong: np.ndarray, what: str, a: np.ndarray, e: np.ndarray, where: str) -> None:
    if wrong.any():
        first = np.unravel_index(wrong.argmax(), wrong.shape)
        raise AssertionError(
            f"{where}{what} at {wrong.sum()} of {wrong.size} places, the first {_place(first)}: "
            f"got {a[first]!r}, expected {e[first]!r}"
        )


def _place(index: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in index)


# ---- parameters and gradients by contract path, PyTorch's orientation, for either twin


def parameters(module: Any) -> dict[str, np.ndarray]:
    """Every parameter by its path (``blocks.0.attention.query.weight``), Linear weights ``[out, in]``."""
    if isinstance(module, torch.nn.Module):
        return {path: to_numpy(leaf) for path, leaf in module.named_parameters()}
    return {path: _turned(parts, leaf) for path, parts, leaf in _flax_leaves(nnx.state(module, nnx.Param))}


def set_parameters(module: Any, values: Mapping[str, Any]) -> None:
    """Set *every* parameter, by the same paths, in place; each is cast to the dtype that it is stored in."""
    have = parameters(module)
    assert set(have) == set(values), f"missing {set(have) - set(values)}, unexpected {set(values) - set(have)}"
    for path, old in have.items():
        assert np.shape(values[path]) == old.shape, f"{path}: {np.shape(values[path])} for {old.shape}"
    if isinstance(module, torch.nn.Module):
        with torch.no_grad():
            for path, leaf in module.named_parameters():
                leaf.copy_(to_torch(values[path]))
        return
    for path, parts, leaf in _flax_leaves(nnx.state(module, nnx.Param)):
        value = np.asarray(values[path])
        value = value.T if parts[-1] == "kernel" else value
        _follow(module, parts).set_value(jnp.asarray(value, leaf.get_value().dtype))


def scatter_parameters(module: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Give every parameter fixed random values, none of them special (norm weights not 1, biases not 0)."""
    values = {}
    for i, (path, old) in enumerate(sorted(parameters(module).items())):
        drawn = random_array(1000 * seed + i, *old.shape, scale=0.5 if old.ndim == 1 else old.shape[-1] ** -0.5)
        values[path] = drawn + (1.0 if "norm" in path.lower() and path.endswith("weight") else 0.0)
    set_parameters(module, values)
    return values


def gradients(
    twin: Twin,
    call: Callable[..., Any],
    inputs: Mapping[str, np.ndarray],
    module: Any = None,
    cotangent: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Output, and the gradients of ``sum(output · cotangent)`` by float input and by parameter path.

    ``call(module, **inputs)``, or ``call(**inputs)`` without a module, gives one array. The cotangent is fixed random
    unless given. A leaf that plays no part has gradient 0 in both twins.
    """
    native = {name: twin.array(value) for name, value in inputs.items()}
    floats = [name for name, value in inputs.items() if np.asarray(value).dtype.kind == "f"]
    if twin.name == "torch":
        for name in floats:
            native[name].requires_grad_(True)
        output = call(module, **native) if module is not None else call(**native)
        names = dict(module.named_parameters()) if module is not None else {}
        leaves = {name: native[name] for name in floats} | names
        found = torch.autograd.grad(
            output,
            list(leaves.values()),
            _cotangent(twin, output, cotangent),
            allow_unused=True,
            materialize_grads=True,
        )
        return to_numpy(output), {name: to_numpy(g) for name, g in zip(leaves, found, strict=True)}

    graph, state = nnx.split(module) if module is not None else (None, {})

    def run(state: Any, given: dict[str, Any]) -> Any:
        full = native | given
        return call(nnx.merge(graph, state), **full) if module is not None else call(**full)

    output, pull = jax.vjp(run, state, {name: native[name] for name in floats})
    state_grads, input_grads = pull(_cotangent(twin, output, cotangent))
    grads = {name: to_numpy(g) for name, g in input_grads.items()}
    if module is not None:
        grads |= {path: _turned(parts, g) for path, parts, g in _flax_leaves(state_grads)}
    return to_numpy(output), grads


def assert_twins_agree(
    call: Callable[..., Any],
    inputs: Mapping[str, np.ndarray],
    build: Callable[[Twin], Any] | None = None,
    *,
    rtol: float = 1e-12,
    grad_rtol: float = 1e-11,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Outputs and all gradients of the twins agree. ``build(twin)`` makes the module, if there is one.

    ``call(twin, module, **inputs)``, or ``call(twin, **inputs)``, gives one array. Returns the output and gradients of
    the PyTorch twin.
    """
    results = []
    for twin in (TORCH, FLAX):
        module = build(twin) if build is not None else None
        results.append(gradients(twin, lambda *args, _twin=twin, **kw: call(_twin, *args, **kw), inputs, module))
    (torch_out, torch_grads), (flax_out, flax_grads) = results
    assert_close(flax_out, torch_out, rtol, name="output")
    if torch_grads or flax_grads:
        assert_close(flax_grads, torch_grads, grad_rtol, name="gradient")
    return torch_out, torch_grads


def _cotangent(twin: Twin, output: Any, given: np.ndarray | None) -> Any:
    values = random_array(4242, *output.shape) if given is None else np.asarray(given)
    return twin.array(values.astype(to_numpy(output).dtype))


def _flax_leaves(state: Any) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    names = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    for parts, leaf in nnx.to_flat_state(state):
        yield ".".join(str(part) for part in (*parts[:-1], names.get(parts[-1], parts[-1]))), parts, leaf


def _turned(parts: tuple[Any, ...], leaf: Any) -> np.ndarray:
    value = to_numpy(leaf)
    return value.T if parts[-1] == "kernel" else value


def _follow(module: Any, parts: tuple[Any, ...]) -> Any:
    for part in parts:
        module = module[part] if isinstance(part, int) else getattr(module, part)
    return module


# ---- the stream of random numbers, in whole Python numbers: the reference for both twins


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al. 2011), written for reading, not for speed."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & 0xFFFFFFFF,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def reference_key(seed: int) -> tuple[int, int]:
    return seed & 0xFFFFFFFF, seed >> 32


def reference_fold(key: tuple[int, int], number: int) -> tuple[int, int]:
    return philox((number, 0, 0, 1), key)[:2]


def reference_words(key: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    words = [word for block in range(-(-count // 4)) for word in philox((block, 0, 0, 0), key)]
    return np.array(words[:count], dtype=np.int64).reshape(shape)


def reference_dropout(X: np.ndarray, rate: float, key: tuple[int, int]) -> np.ndarray:
    """``X`` with dropout from ``key`` (two whole numbers), in X's dtype."""
    kept = reference_words(key, X.shape) >= int(np.floor(rate * 2**32))
    return np.where(kept, X * X.dtype.type(1 / (1 - rate)), X.dtype.type(0))
