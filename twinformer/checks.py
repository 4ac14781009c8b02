"""What both twins ask of their inputs, in one place so that both say it in the same words.

Shapes are tuples, dtypes are names as NumPy spells them (``"float32"``, ``"int64"``, ``"bool"``): no
framework is needed to check them. Every function raises one InputError that names all problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from twinformer.errors import InputError, Problems, WeightsError

FLOATS = ("float64", "float32", "bfloat16", "float16")
INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")


def dtype_name(array: Any) -> str:
    """``"float32"`` for a torch.float32 tensor and for a float32 array alike."""
    return str(array.dtype).removeprefix("torch.")


def check_activations(
    where: str,
    *,
    X: Any,
    model_dim: int,
    H_enc: Any = None,
    mask: Any = None,
    memory_mask: Any = None,
    num_heads: int = 1,
    positions: Any = None,
    bias: Any = None,
    context_length: int | None = None,
    needs_memory: bool = False,
    takes_memory: bool = True,
    needs_positions: bool = False,
) -> None:
    """Inputs of a layer that maps ``X [B, T, D]`` (and ``H_enc [B, S, D]``) to ``[B, T, D]``.

    ``mask`` broadcasts to ``[B, A, T, T]`` and ``memory_mask`` to ``[B, A, T, S]``; ``positions`` is
    ``[B or 1, T]``; ``bias`` broadcasts like ``mask``.
    """
    problems = Problems(where, InputError)
    good_X = _check_matrix(problems, "X", X, "B T D", model_dim)
    good_H = H_enc is not None and _check_matrix(problems, "H_enc", H_enc, "B S D", model_dim)
    if good_X and good_H:
        problems.expect(
            H_enc.shape[0] == X.shape[0],
            f"H_enc: expected the batch of X, B={X.shape[0]}, got {H_enc.shape[0]} in shape {_shape(H_enc)}",
        )
    problems.expect(H_enc is not None or not needs_memory, "H_enc: expected encoder states [B, S, D], got None")
    problems.expect(
        H_enc is None or takes_memory, "H_enc: expected None (there is no cross-attention here), got encoder states"
    )
    problems.expect(memory_mask is None or H_enc is not None, "memory_mask: expected None without H_enc, got a mask")
    problems.expect(positions is not None or not needs_positions, "positions: expected [B, T] whole numbers, got None")
    if good_X:
        B, T = X.shape[0], X.shape[1]
        if context_length is not None:
            problems.expect(
                context_length >= T, f"X: expected at most context_length={context_length} positions, got T={T}"
            )
        _check_mask(problems, "mask", mask, (B, num_heads, T, T))
        _check_mask(problems, "bias", bias, (B, num_heads, T, T), kinds=FLOATS)
        if good_H:
            _check_mask(problems, "memory_mask", memory_mask, (B, num_heads, T, H_enc.shape[1]))
        _check_positions(problems, "positions", positions, B, T)
    problems.raise_if_any()


def check_tokens(
    where: str,
    *,
    tokens: Any,
    vocab_size: int,
    context_length: int,
    lowest: int | None,
    highest: int | None,
    name: str = "tokens",
    padding_mask: Any = None,
    positions: Any = None,
    lowest_position: int | None = None,
    highest_position: int | None = None,
    token_types: Any = None,
    num_token_types: int = 0,
    lowest_type: int | None = None,
    highest_type: int | None = None,
) -> None:
    """Inputs of an embedding: ``tokens [B, T]`` whole numbers, ``padding_mask [B, T]`` boolean, True = real.

    The lowest and highest values are those found in the arrays, or None where they cannot be known (while a
    function is traced, or in an empty array).
    """
    problems = Problems(where, InputError)
    shape = tuple(tokens.shape)
    good = problems.expect(len(shape) == 2, f"{name}: expected rank 2 [B, T], got shape {shape}")
    problems.expect(dtype_name(tokens) in INTEGERS, f"{name}: expected whole numbers, got dtype {dtype_name(tokens)}")
    _check_range(problems, name, lowest, highest, vocab_size)
    if good:
        B, T = shape
        problems.expect(T >= 1, f"{name}: expected at least one position, got T=0")
        problems.expect(
            context_length >= T, f"{name}: expected at most context_length={context_length} positions, got T={T}"
        )
        if padding_mask is not None:
            _check_padding(problems, f"{_prefix(name)}padding_mask", padding_mask, B, T)
        _check_positions(problems, f"{_prefix(name)}positions", positions, B, T)
    _check_range(problems, f"{_prefix(name)}positions", lowest_position, highest_position, context_length)
    if token_types is not None:
        types_shape = tuple(token_types.shape)
        problems.expect(num_token_types > 0, "token_types: expected None (the model has no token types), got an array")
        problems.expect(types_shape == shape, f"token_types: expected the shape of {name} {shape}, got {types_shape}")
        problems.expect(
            dtype_name(token_types) in INTEGERS,
            f"token_types: expected whole numbers, got dtype {dtype_name(token_types)}",
        )
        if num_token_types > 0:
            _check_range(problems, "token_types", lowest_type, highest_type, num_token_types)
    problems.raise_if_any()


def check_sequence(where: str, *, X: Any, model_dim: int, max_len: int, positions: Any = None) -> None:
    """Inputs of a positional encoding: ``X [B, T, D]`` with ``T <= max_len``."""
    problems = Problems(where, InputError)
    if _check_matrix(problems, "X", X, "B T D", model_dim):
        T = X.shape[1]
        problems.expect(max_len >= T, f"X: expected at most max_len={max_len} positions, got T={T}")
        _check_positions(problems, "positions", positions, X.shape[0], T)
    problems.raise_if_any()


def check_width(where: str, *, X: Any, width: int) -> None:
    """Inputs of a layer that acts on the last axis: ``X [..., width]``."""
    problems = Problems(where, InputError)
    shape = tuple(X.shape)
    problems.expect(len(shape) >= 1 and shape[-1] == width, f"X: expected [..., {width}], got shape {shape}")
    problems.expect(dtype_name(X) in FLOATS, f"X: expected a float dtype, got {dtype_name(X)}")
    problems.raise_if_any()


def check_sizes(where: str, **sizes: int) -> None:
    """Sizes given to a constructor: whole numbers, at least 1."""
    problems = Problems(where, InputError)
    for name, size in sizes.items():
        problems.expect(
            isinstance(size, int) and not isinstance(size, bool) and size >= 1,
            f"{name}: expected a whole number of at least 1, got {size!r}",
        )
    problems.raise_if_any()


def check_tensors(
    where: str,
    tensors: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    non_finite: Callable[[Any], int] | None = None,
) -> None:
    """Weights for a model whose parameters have these ``shapes``, by path.

    ``non_finite`` counts the values of one tensor that are NaN or infinite; without it they are not looked for. Raises
    one WeightsError that names every missing, unexpected, mis-shaped, non-float and (if asked) non-finite leaf.
    """
    problems = Problems(where, WeightsError)
    for path, want in shapes.items():
        if not problems.expect(path in tensors, f"{path}: missing, expected shape {want}"):
            continue
        tensor = tensors[path]
        problems.expect(_shape(tensor) == want, f"{path}: expected shape {want}, got {_shape(tensor)}")
        is_float = dtype_name(tensor) in FLOATS
        problems.expect(is_float, f"{path}: expected a float dtype, got {dtype_name(tensor)}")
        count = non_finite(tensor) if is_float and non_finite is not None else 0
        problems.expect(count == 0, f"{path}: expected finite values, got {count} that are not")
    for path in tensors:
        problems.expect(path in shapes, f"{path}: unexpected")
    problems.raise_if_any()


def check_cross_entropy(
    where: str,
    *,
    logits: Any,
    targets: Any,
    real: Any = None,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    lowest: int | None = None,
    highest: int | None = None,
) -> None:
    """Inputs of a loss: ``logits [B, T, V]``, ``targets [B, T]`` whole numbers, ``real [B, T]`` boolean or None.

    The lowest and highest target are those where ``real`` is True, or None where they cannot be known (while a function
    is traced, or where no place is real). Only shape and dtype of the arrays are read.
    """
    problems = Problems(where, InputError)
    shape = _shape(logits)
    good = problems.expect(len(shape) == 3, f"logits: expected rank 3 [B, T, V], got shape {shape}")
    problems.expect(dtype_name(logits) in FLOATS, f"logits: expected a float dtype, got {dtype_name(logits)}")
    kind = dtype_name(targets)
    problems.expect(kind in INTEGERS, f"targets: expected whole numbers, got dtype {kind}")
    if good:
        B, T, V = shape
        problems.expect(V >= 1, f"logits: expected at least one token in the vocabulary, got shape {shape}")
        problems.expect(
            _shape(targets) == (B, T), f"targets: expected shape [B, T] = {(B, T)} as in logits, got {_shape(targets)}"
        )
        if real is not None:
            _check_padding(problems, "real", real, B, T)
        _check_range(problems, "targets", lowest, highest, V)
    _check_number(problems, "smoothing", smoothing, "a number in [0, 1]", lambda x: 0 <= x <= 1)
    _check_number(problems, "z_loss", z_loss, "0 or a positive number", lambda x: x >= 0)
    problems.raise_if_any()


def check_next_tokens(where: str, *, tokens: Any, real: Any = None) -> None:
    """Inputs of the shift by one: ``tokens [B, T]`` whole numbers, ``real [B, T]`` boolean or None."""
    problems = Problems(where, InputError)
    shape = _shape(tokens)
    good = problems.expect(len(shape) == 2, f"tokens: expected rank 2 [B, T], got shape {shape}")
    problems.expect(dtype_name(tokens) in INTEGERS, f"tokens: expected whole numbers, got dtype {dtype_name(tokens)}")
    if good:
        problems.expect(shape[1] >= 1, "tokens: expected at least one position, got T=0")
        if real is not None:
            _check_padding(problems, "real", real, *shape)
    problems.raise_if_any()


def check_leaves(where: str, name: str, leaves: Mapping[str, Any], *, max_norm: float | None = None) -> None:
    """Parameters or gradients by path: every one of a float dtype. ``max_norm`` (None: not known) is positive.

    ``name`` says what they are: ``"parameters"`` or ``"gradients"``. Of the arrays only the dtype is read.
    """
    problems = Problems(where, InputError)
    _check_floats(problems, name, leaves)
    if max_norm is not None:
        _check_number(problems, "max_norm", max_norm, "a positive number", lambda x: x > 0)
    problems.raise_if_any()


def check_update(
    where: str,
    *,
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    state: Mapping[str, Any],
    wanted: Mapping[str, Mapping[str, tuple[tuple[int, ...], str]]],
    lr: float | None = None,
) -> None:
    """Inputs of an optimizer's step: the paths of gradients and state, their shapes, their dtypes.

    ``wanted`` is what the state holds besides ``step``: name -> path -> (shape, dtype name), as the optimizer makes
    it for these parameters. ``lr`` is None where it cannot be known (while a function is traced). Of the arrays only
    shape and dtype are read.
    """
    problems = Problems(where, InputError)
    _check_floats(problems, "parameters", parameters)
    _check_floats(problems, "gradients", gradients)
    for path in sorted({*parameters, *gradients}):
        if path not in gradients:
            problems.add(f"gradients: {path}: missing, expected shape {_shape(parameters[path])}")
        elif path not in parameters:
            problems.add(f"gradients: {path}: unexpected")
        else:
            want, got = _shape(parameters[path]), _shape(gradients[path])
            problems.expect(want == got, f"gradients: {path}: expected shape {want}, got {got}")
    for name in sorted({"step", *wanted, *state}):
        if name not in state:
            problems.add(f"state: {name}: missing")
        elif name == "step":
            step = state[name]
            is_int = isinstance(step, int) and not isinstance(step, bool) and step >= 0
            is_array = hasattr(step, "dtype") and _shape(step) == () and dtype_name(step) in INTEGERS
            problems.expect(is_int or is_array, f"state: step: expected a whole number from 0, got {step!r}")
        elif name not in wanted:
            problems.add(f"state: {name}: unexpected")
        elif not isinstance(state[name], Mapping):
            problems.add(f"state: {name}: expected a mapping by path, got {type(state[name]).__name__}")
        else:
            _check_state(problems, f"state: {name}", state[name], wanted[name])
    if lr is not None:
        _check_number(problems, "lr", lr, "0 or a positive number", lambda x: x >= 0)
    problems.raise_if_any()


def _prefix(name: str) -> str:
    """``source_`` for the argument ``source``; nothing for plain ``tokens``."""
    return "" if name == "tokens" else f"{name}_"


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(array.shape)


def _check_matrix(problems: Problems, name: str, array: Any, axes: str, width: int) -> bool:
    shape = _shape(array)
    good = problems.expect(len(shape) == 3, f"{name}: expected rank 3 [{axes.replace(' ', ', ')}], got shape {shape}")
    if good:
        good = problems.expect(
            shape[-1] == width, f"{name}: expected width D={width} on the last axis, got {shape[-1]} in shape {shape}"
        )
        good &= problems.expect(shape[1] >= 1, f"{name}: expected at least one position, got shape {shape}")
    problems.expect(dtype_name(array) in FLOATS, f"{name}: expected a float dtype, got {dtype_name(array)}")
    return good


def _check_mask(
    problems: Problems, name: str, mask: Any, full: tuple[int, int, int, int], kinds: tuple[str, ...] | None = None
) -> None:
    if mask is None:
        return
    shape = _shape(mask)
    padded = (1,) * (4 - len(shape)) + shape
    fits = len(shape) <= 4 and all(have in (1, want) for have, want in zip(padded, full, strict=False))
    problems.expect(fits, f"{name}: expected a shape that broadcasts to [B, A, T, S] = {full}, got {shape}")
    allowed = ("bool", *FLOATS) if kinds is None else kinds
    wanted = "bool (True = may attend) or a float dtype (added to the scores)" if kinds is None else "a float dtype"
    problems.expect(dtype_name(mask) in allowed, f"{name}: expected {wanted}, got {dtype_name(mask)}")


def _check_padding(problems: Problems, name: str, mask: Any, B: int, T: int) -> None:
    problems.expect(_shape(mask) == (B, T), f"{name}: expected shape [B, T] = {(B, T)}, got {_shape(mask)}")
    problems.expect(dtype_name(mask) == "bool", f"{name}: expected bool (True = real token), got {dtype_name(mask)}")


def _check_positions(problems: Problems, name: str, positions: Any, B: int, T: int) -> None:
    if positions is None:
        return
    shape = _shape(positions)
    problems.expect(
        len(shape) == 2 and shape[0] in (1, B) and shape[1] == T,
        f"{name}: expected shape [B or 1, T] = [{B} or 1, {T}], got {shape}",
    )
    problems.expect(
        dtype_name(positions) in INTEGERS, f"{name}: expected whole numbers, got dtype {dtype_name(positions)}"
    )


def _check_range(problems: Problems, name: str, lowest: int | None, highest: int | None, size: int) -> None:
    if lowest is not None and highest is not None:
        problems.expect(
            lowest >= 0 and highest < size,
            f"{name}: expected ids from 0 to {size - 1}, got values from {lowest} to {highest}",
        )


def _check_floats(problems: Problems, name: str, leaves: Mapping[str, Any]) -> None:
    for path in sorted(leaves):
        kind = dtype_name(leaves[path])
        problems.expect(kind in FLOATS, f"{name}: {path}: expected a float dtype, got {kind}")


def _check_state(
    problems: Problems, name: str, leaves: Mapping[str, Any], wanted: Mapping[str, tuple[tuple[int, ...], str]]
) -> None:
    for path in sorted({*wanted, *leaves}):
        if path not in leaves:
            problems.add(f"{name}: {path}: missing, expected shape {wanted[path][0]}")
        elif path not in wanted:
            problems.add(f"{name}: {path}: unexpected")
        else:
            got = (_shape(leaves[path]), dtype_name(leaves[path]))
            shape, kind = wanted[path]
            problems.expect(
                got == (shape, kind),
                f"{name}: {path}: expected {kind} of shape {shape}, got {got[1]} of shape {got[0]}",
            )


def _check_number(problems: Problems, name: str, value: Any, wanted: str, is_right: Callable[[Any], bool]) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    problems.expect(is_number and is_right(value), f"{name}: expected {wanted}, got {value!r}")


def check_segments(
    where: str, *, tokens: Any, segments: Any, padding_mask: Any = None, lowest: int | None = None
) -> None:
    """``segments [B, T]``: whole numbers, 0 for padding, another number for each document of a row."""
    problems = Problems(where, InputError)
    problems.expect(padding_mask is None, "padding_mask: expected None with segments (0 there is padding), got a mask")
    shape = _shape(segments)
    problems.expect(shape == _shape(tokens), f"segments: expected the shape of tokens {_shape(tokens)}, got {shape}")
    kind = dtype_name(segments)
    problems.expect(kind in INTEGERS, f"segments: expected whole numbers, got dtype {kind}")
    problems.expect(lowest is None or lowest >= 0, f"segments: expected numbers from 0, got {lowest}")
    problems.raise_if_any()
