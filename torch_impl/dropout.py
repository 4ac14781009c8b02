"""One stream of random numbers, and the dropout that reads it.

Philox4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is a
function of a counter and a key: no generator, no state, the same words on every machine and in both twins.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from twinformer.errors import ConfigError, InputError

WORD = 0xFFFFFFFF  # a 32-bit word, all ones; words are kept in int64
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
PIECE = 2**14  # counters worked on at a time on a CPU
FEW = 16  # so many counters are faster one by one on a CPU, as plain numbers

Key = Int64[Tensor, "2"]  # two words; it may lie on the host while what it is for lies elsewhere


def philox(counter: Iterable[int | Tensor], key: Iterable[int | Tensor]) -> tuple[int | Tensor, ...]:
    """Four random words from four counter words and two key words, each a number or an int64 tensor.

    One round: ``(h0, l0) = M0 c0``, ``(h1, l1) = M1 c2`` (high and low words of the 64-bit products), then
    ``c <- (h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0)``. The key moves on by the Weyl constants after every round but
    the last.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for turn in range(ROUNDS):
        if turn:
            k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
        (h0, l0), (h1, l1) = _product(c0, MULTIPLIERS[0]), _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = h1 ^ (c1 ^ k0), l1, h0 ^ (c3 ^ k1), l0
    return c0, c1, c2, c3


def _product(word: int | Tensor, multiplier: int) -> tuple[int | Tensor, int | Tensor]:
    """High and low word of the 64-bit product.

    The product of two words overflows int64, so the multiplier is taken 2³² too small: both are above 2³¹, the
    product then lies in (-2⁶³, 0], and the 2³² · word that is missing belongs to the high word alone.
    """
    product = word * (multiplier - 2**32)
    return (product >> 32) + word, product & WORD


def random_key(seed: int) -> Key:
    """The key of a seed from 0 to 2⁶⁴ - 1: its low and its high 32-bit word. Raises InputError for another."""
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise InputError("random_key", [f"seed: expected a whole number from 0 to 2**64 - 1, got {seed!r}"])
    return torch.tensor([seed & WORD, seed >> 32], dtype=torch.int64)


def fold(key: Key, number: int | Int[Tensor, ""]) -> Key:
    """The key of place ``number`` under ``key``: words 0 and 1 of ``philox((number, 0, 0, 1), key)``."""
    if isinstance(number, Tensor):
        return torch.stack(_tensors(philox((number.to(key), 0, 0, 1), key.unbind())[:2]))
    folded: Tensor = _fold_each(key, [number])[0]
    return folded


def places(rng: Key | None, count: int) -> Sequence[Key | None]:
    """The keys of places ``0 … count - 1`` under ``rng``; without ``rng``, None for each."""
    return [None] * count if rng is None else list(_fold_each(rng, list(range(count))).unbind())


def random_words(key: Key, shape: Sequence[int]) -> Int64[Tensor, "..."]:
    """Words 0 … 2³² - 1: element ``i``, row by row, is word ``i mod 4`` of ``philox((i // 4, 0, 0, 0), key)``.

    Fewer than 2³² elements.
    """
    words: Tensor = _random_words(key, list(shape), key.device)
    return words


def _operator(name: str, outline: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """While compiled an operator of its own, ``twinformer::<name>``, otherwise the function.

    ``outline`` gives an empty tensor as the function's. The compiler takes a call as it is: left to itself it unrolls
    the rounds at every place (minutes of compilation), and takes the first product for an index, computed in 32 bits
    (wrong words). Not compiled, an operator would load the compiler at its first call: two seconds for nothing.
    """

    def wrap(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        operator = torch.library.custom_op(f"twinformer::{name}", function, mutates_args=())
        operator.register_fake(outline)

        @functools.wraps(function)
        def call(*args: Any) -> Tensor:
            found: Tensor = operator(*args) if torch.compiler.is_compiling() else function(*args)
            return found

        return call

    return wrap


@_operator("fold_each", lambda key, numbers: key.new_empty(len(numbers), 2))
def _fold_each(key: Tensor, numbers: list[int]) -> Tensor:
    if key.device.type == "cpu":  # plain numbers are a hundred times faster than tensors of one element
        words = [philox((number, 0, 0, 1), key.tolist())[:2] for number in numbers]
        return torch.tensor(words, dtype=torch.int64)
    counter = torch.tensor(numbers, dtype=torch.int64, device=key.device)
    return torch.stack(_tensors(philox((counter, 0, 0, 1), key.unbind())[:2]), -1)


@_operator("random_words", lambda key, shape, device: torch.empty(shape, dtype=torch.int64, device=device))
def _random_words(key: Tensor, shape: list[int], device: torch.device) -> Tensor:
    count = math.prod(shape)
    blocks = (count + 3) // 4
    if device.type == "cpu":
        lanes = np.empty((blocks, 4), np.int64)
        for start, words in _pieces(blocks, key.tolist()):
            lanes[start : start + words.shape[1]] = words.T
        return torch.from_numpy(lanes.ravel()[:count].reshape(shape))
    counter = torch.arange(blocks, dtype=torch.int64, device=device)
    whole = torch.stack(_tensors(philox((counter, 0, 0, 0), key.to(device).unbind())), -1)
    return whole.flatten()[:count].reshape(shape)


@_operator("dropped", lambda key, shape, bound, device: torch.empty(shape, dtype=torch.bool, device=device))
def _dropped(key: Tensor, shape: list[int], bound: int, device: torch.device) -> Tensor:
    """Which elements have a word below ``bound``."""
    if device.type != "cpu":
        return random_words(key.to(device), shape) < bound
    count = math.prod(shape)
    blocks = (count + 3) // 4
    lanes = np.empty((blocks, 4), np.bool_)
    for start, words in _pieces(blocks, key.tolist()):
        np.less(words.T, np.uint32(bound), out=lanes[start : start + words.shape[1]])
    return torch.from_numpy(lanes.ravel()[:count].reshape(shape))


def _pieces(blocks: int, key: Sequence[int]) -> Iterator[tuple[int, npt.NDArray[np.uint32]]]:
    """``philox((i, 0, 0, 0), key)`` for i from 0 to blocks - 1, some at a time: where they begin, and ``[4, some]``.

    In pieces whose intermediate results stay in the cache of a CPU, and with both halves of a product read where they
    lie: many times faster than whole tensors of int64. What is given is overwritten by the next piece.
    """
    size = min(PIECE, blocks)
    products = np.empty((2, size), "<u8")
    halves = products.view("<u4").reshape(2, size, 2)  # low, high
    state = np.empty((4, size), np.uint32)
    weyl = [[(word + turn * step) & WORD for turn in range(ROUNDS)] for word, step in zip(key, WEYL, strict=True)]
    for start in range(0, blocks, size or 1):
        some = min(size, blocks - start)
        c0, c1, c2, c3 = (lane[:some] for lane in state)
        p0, p1 = products[0, :some], products[1, :some]
        low0, high0, low1, high1 = (halves[i, :some, j] for i in (0, 1) for j in (0, 1))
        c0[:] = np.arange(start, start + some, dtype=np.uint32)
        state[1:] = 0
        for k0, k1 in zip(*weyl, strict=True):
            np.multiply(c0, np.uint64(MULTIPLIERS[0]), out=p0)
            np.multiply(c2, np.uint64(MULTIPLIERS[1]), out=p1)
            np.bitwise_xor(high1, c1, out=c0)
            np.bitwise_xor(high0, c3, out=c2)
            np.bitwise_xor(c0, np.uint32(k0), out=c0)
            np.bitwise_xor(c2, np.uint32(k1), out=c2)
            c1[:], c3[:] = low1, low0
        yield start, state[:, :some]


def philox_rows(keys: Int64[Tensor, "#R 2"], numbers: Int64[Tensor, " R"], place: int) -> Int64[Tensor, "R 2"]:
    """Words 0 and 1 of ``philox((number, 0, 0, place), key)`` for each row; one key may serve all numbers."""
    words: Tensor = _philox_rows(keys, numbers, place)
    return words


@_operator("philox_rows", lambda keys, numbers, place: keys.new_empty(len(numbers), 2))
def _philox_rows(keys: Tensor, numbers: Tensor, place: int) -> Tensor:
    if keys.device.type == "cpu" and len(numbers) <= FEW:
        rows = zip(keys.expand(len(numbers), 2).tolist(), numbers.tolist(), strict=True)
        words = [philox((number, 0, 0, place), key)[:2] for key, number in rows]
        return torch.tensor(words, dtype=torch.int64).reshape(-1, 2)
    return torch.stack(_tensors(philox((numbers, 0, 0, place), keys.unbind(-1))[:2]), -1)


def _tensors(words: tuple[int | Tensor, ...]) -> list[Tensor]:
    return [word for word in words if isinstance(word, Tensor)]


def drop(X: Float[Tensor, "*shape"], rate: float, rng: Key | None) -> Float[Tensor, "*shape"]:
    """``X / (1 - rate)`` where the element's word is at least ``floor(rate · 2³²)``, elsewhere 0 (a NaN too).

    One word for each element. ``rate`` 0 or ``rng`` None: X as it is.
    """
    if rate == 0 or rng is None:
        return X
    dropped = _dropped(rng, list(X.shape), math.floor(rate * 2**32), X.device)
    return (X * (1 / (1 - rate))).masked_fill(dropped, 0.0)


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) with its randomness as an argument, so that nothing is drawn unseen.

    ``rate`` in [0, 1), else ConfigError. The mode of the module (train or eval) plays no part.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ConfigError("Dropout", [f"rate: expected a rate in [0, 1), got {rate}"])
        self.rate = rate

    def forward(self, X: Float[Tensor, "*shape"], rng: Key | None = None) -> Float[Tensor, "*shape"]:
        return drop(X, self.rate, rng)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
