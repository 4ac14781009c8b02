"""Weights carried from a PyTorch model to somebody's Flax port, through a map of names in which nothing is left over.

A layout is a rearrangement: applied to an array that numbers its own elements it says where each element goes. So
the map is checked element by element, every one used once on both sides, and gradients are carried back the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from twinformer.errors import Problems, TwinformerError
from twinformer.parity.values import Array, Arrays

Layout = Literal["by type", "same", "transpose"] | Callable[[Any], Any]
Indices = npt.NDArray[np.int64]


class NamesError(TwinformerError):
    """A map of names that leaves weights over, uses one twice, or does not fit their shapes."""


@dataclass(frozen=True)
class Leaf:
    """Where a PyTorch weight goes: a Flax leaf and how the array is rearranged on the way.

    ``layout``: ``"same"``, ``"transpose"``, a function of the array (``lambda w: w[:24].T``), or ``"by type"``:
    what the type of the PyTorch module that owns the weight and the Flax leaf's name say together. ``into``: the part
    of the Flax leaf that it fills (``np.s_[:, :24]``), where several weights make up one leaf.
    """

    path: str
    layout: Layout = "by type"
    into: Any = None


Names = Mapping[str, str | Leaf | Sequence[Leaf]]


@dataclass(frozen=True)
class Move:
    """One PyTorch weight, or a part of it, on its way: element ``source[i]`` becomes element ``target[i]``."""

    torch: str
    flax: str
    source: Indices
    target: Indices


@dataclass(frozen=True)
class Plan:
    """All moves, with the shapes on both sides. ``canonical`` gives a shared parameter its first name."""

    moves: tuple[Move, ...]
    torch_shapes: dict[str, tuple[int, ...]]
    flax_shapes: dict[str, tuple[int, ...]]
    canonical: dict[str, str]

    def carried(self, weights: Mapping[str, Array]) -> Arrays:
        """PyTorch weights as Flax leaves."""
        made: Arrays = {}
        for move in self.moves:
            weight = weights[self.canonical[move.torch]]
            leaf = made.setdefault(move.flax, np.zeros(self.flax_shapes[move.flax], weight.dtype))
            leaf.reshape(-1)[move.target] = weight.reshape(-1)[move.source]
        return made

    def brought_back(self, leaves: Mapping[str, Array]) -> Arrays:
        """Flax gradients as PyTorch gradients; those of leaves that share a parameter there are added."""
        made: Arrays = {}
        for move in self.moves:
            name = self.canonical[move.torch]
            weight = made.setdefault(name, np.zeros(self.torch_shapes[name], np.float64))
            weight.reshape(-1)[move.source] += leaves[move.flax].reshape(-1)[move.target].astype(np.float64)
        return made

    def sources_of(self, flax: str) -> list[str]:
        """The PyTorch weights that make up a Flax leaf."""
        return [move.torch for move in self.moves if move.flax == flax]


def make_plan(
    model: torch.nn.Module,
    leaves: Mapping[str, Array],
    optional: Iterable[str],
    names: Names | None,
    modules: Mapping[str, str | None] | None,
) -> Plan:
    """The map from names given and names derived; everything wrong with it in one NamesError.

    Names that are not given are derived from the type of the module that owns the weight, under the same path or, where
    ``modules`` renames a module, under the new one. Of the Flax leaves only the ``optional`` ones may be left over.
    """
    problems = Problems("names", NamesError)
    owners = dict(model.named_modules(remove_duplicate=False))
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    canonical = _first_names(tensors)
    needed = set(canonical.values())
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer is not None}
    tensors |= buffers
    canonical |= {name: name for name in buffers}
    wanted: dict[str, list[Leaf]] = {}
    for name, given in (names or {}).items():
        if problems.expect(name in tensors, f"{name}: no such parameter or buffer in the PyTorch model"):
            wanted[name] = [Leaf(given)] if isinstance(given, str) else [given] if isinstance(given, Leaf) else [*given]
    taken = {leaf.path for entries in wanted.values() for leaf in entries}
    for name in tensors:
        if name not in wanted:
            derived = derive(name, owners, modules or {}, leaves)
            if derived and not taken & {leaf.path for leaf in derived}:
                wanted[name] = derived
    moves = []
    for name, entries in wanted.items():
        for leaf in entries:
            if problems.expect(leaf.path in leaves, f"{name}: no leaf {leaf.path} in the Flax model"):
                move = _move(name, tuple(tensors[name].shape), owners, leaf, leaves[leaf.path].shape, problems)
                moves += [move] if move else []
    for name in sorted(needed - {canonical[name] for name in wanted}):
        tried = " or ".join(rule.path for rule in _rules(name, owners, modules or {}, leaves))
        problems.add(f"{name}: PyTorch parameter is not in the map, and the Flax model has no {tried}")
    for path in sorted(set(leaves) - set(optional) - {leaf.path for entries in wanted.values() for leaf in entries}):
        problems.add(f"{path}: Flax leaf is not in the map")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()) and name in wanted:
            problems.add(f"{name}: expected finite values, got {int((~torch.isfinite(tensor)).sum())} that are not")
        if name in wanted:
            for leaf in wanted[name]:
                if leaf.path in leaves and tensor.is_floating_point() != (leaves[leaf.path].dtype.kind in "fV"):
                    problems.add(f"{name}: {tensor.dtype} does not go into {leaf.path} of {leaves[leaf.path].dtype}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not problems.found:
        _expect_each_used_once(moves, shapes, {path: leaf.shape for path, leaf in leaves.items()}, problems)
    problems.raise_if_any()
    return Plan(tuple(moves), shapes, {path: leaf.shape for path, leaf in leaves.items()}, canonical)


def derive(
    name: str,
    owners: Mapping[str, torch.nn.Module],
    modules: Mapping[str, str | None],
    leaves: Mapping[str, Array],
) -> list[Leaf]:
    """The Flax leaves that a weight goes to by the rules, or none."""
    owner, _, last = name.rpartition(".")
    module = owners[owner]
    if isinstance(module, torch.nn.MultiheadAttention) and last.startswith("in_proj_"):
        return _fused(module, renamed(owner, modules), last.removeprefix("in_proj_"), leaves)
    found = [rule for rule in _rules(name, owners, modules, leaves) if rule.path in leaves]
    return found[:1]


def renamed(path: str, modules: Mapping[str, str | None]) -> str:
    """A module's path with its longest renamed beginning replaced."""
    parts = path.split(".") if path else []
    for count in range(len(parts), -1, -1):
        new = modules.get(".".join(parts[:count]))
        if new is not None:
            return ".".join([*([new] if new else []), *parts[count:]])
    return path


_NORMS = (
    torch.nn.LayerNorm,
    torch.nn.RMSNorm,
    torch.nn.GroupNorm,
    torch.nn.modules.batchnorm._BatchNorm,
)
_STATISTICS = {"running_mean": "mean", "running_var": "var"}


def _rules(
    name: str,
    owners: Mapping[str, torch.nn.Module],
    modules: Mapping[str, str | None],
    leaves: Mapping[str, Array],
) -> list[Leaf]:
    """Where a weight may go, by the type of its owner: the first that exists is taken."""
    owner, _, last = name.rpartition(".")
    module = owners[owner]
    above = owners[owner.rpartition(".")[0]] if owner else module
    path = renamed(owner, modules)
    prefix = f"{path}." if path else ""
    if isinstance(above, torch.nn.MultiheadAttention) and owner.endswith("out_proj"):
        heads = above.num_heads
        out = f"{prefix.removesuffix('out_proj.')}out."
        if last == "weight":
            kernel = leaves.get(f"{out}kernel")
            split: Layout = lambda w: w.reshape(w.shape[0], heads, -1).transpose(1, 2, 0)  # noqa: E731
            separate = kernel is not None and kernel.ndim == 3
            return [Leaf(f"{out}kernel", split if separate else "transpose"), Leaf(f"{prefix}kernel", "transpose")]
        return [Leaf(f"{out}bias", "same"), Leaf(f"{prefix}bias", "same")]
    if last == "weight" and isinstance(module, torch.nn.Linear):
        return [Leaf(f"{prefix}kernel", "transpose"), Leaf(f"{prefix}weight", "same")]
    if last == "weight" and isinstance(module, torch.nn.modules.conv._ConvNd) and not module.transposed:
        return [
            Leaf(f"{prefix}kernel", lambda w: w.transpose(*range(2, w.ndim), 1, 0)),
            Leaf(f"{prefix}weight", "same"),
        ]
    if last == "weight" and isinstance(module, torch.nn.Embedding):
        return [Leaf(f"{prefix}embedding", "same"), Leaf(f"{prefix}weight", "same")]
    if last == "weight" and type(module).__name__ == "Conv1D":  # of transformers: a Linear kept as [in, out]
        return [Leaf(f"{prefix}kernel", "same"), Leaf(f"{prefix}weight", "same")]
    if last == "weight" and (isinstance(module, _NORMS) or type(module).__name__.endswith("Norm")):
        return [Leaf(f"{prefix}scale", "same"), Leaf(f"{prefix}weight", "same")]
    if last in _STATISTICS and isinstance(module, _NORMS):
        return [Leaf(f"{prefix}{_STATISTICS[last]}", "same")]
    return [Leaf(f"{prefix}{last}", "same")]


def _fused(module: torch.nn.MultiheadAttention, path: str, last: str, leaves: Mapping[str, Array]) -> list[Leaf]:
    """``in_proj`` holds queries, keys and values one below the other; Flax keeps them apart, heads too if it likes."""
    D, heads = module.embed_dim, module.num_heads
    prefix = f"{path}." if path else ""
    made = []
    for place, part in enumerate(("query", "key", "value")):
        leaf = f"{prefix}{part}.{'kernel' if last == 'weight' else 'bias'}"
        if leaf not in leaves:
            return []
        apart = leaves[leaf].ndim == (3 if last == "weight" else 2)
        made.append(Leaf(leaf, _part_of_fused(place, D, heads if apart else None, is_weight=last == "weight")))
    return made


def _part_of_fused(place: int, D: int, heads: int | None, *, is_weight: bool) -> Layout:
    def layout(w: Any) -> Any:
        part = w[place * D : (place + 1) * D].T if is_weight else w[place * D : (place + 1) * D]
        return part if heads is None else part.reshape(*part.shape[:-1], heads, -1)

    return layout


def _move(
    name: str,
    shape: tuple[int, ...],
    owners: Mapping[str, torch.nn.Module],
    leaf: Leaf,
    wanted: tuple[int, ...],
    problems: Problems,
) -> Move | None:
    layout = leaf.layout
    if layout == "by type":
        options = {rule.path: rule.layout for rule in _rules(name, owners, {}, {})}
        ending = leaf.path.rpartition(".")[2]
        known = {path.rpartition(".")[2]: one for path, one in options.items()}
        layout = known.get(ending, "same" if len(shape) < 2 else "by type")
        if layout == "by type":
            problems.add(
                f"{name}: its layout in {leaf.path} is not known from the name; "
                f'give Leaf("{leaf.path}", "same"), "transpose" or a function'
            )
            return None
    rearrange: Callable[[Any], Any] = (
        layout if callable(layout) else (lambda w: w.T) if layout == "transpose" else (lambda w: w)
    )
    numbered = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
    source = np.asarray(rearrange(numbered))
    places = np.arange(int(np.prod(wanted)), dtype=np.int64).reshape(wanted)
    target = places if leaf.into is None else places[leaf.into]
    how = layout if isinstance(layout, str) else "its function"
    if source.shape != target.shape:
        problems.add(f"{name}: expected shape {target.shape} for {leaf.path}, got {source.shape} (layout: {how})")
        return None
    again = np.asarray(rearrange(numbered * 3 + 7))
    if not np.array_equal(again, source * 3 + 7):
        problems.add(f"{name}: the layout of {leaf.path} changes values; expected a rearrangement")
        return None
    return Move(name, leaf.path, source.reshape(-1), target.reshape(-1))


def _expect_each_used_once(
    moves: Sequence[Move],
    torch_shapes: Mapping[str, tuple[int, ...]],
    flax_shapes: Mapping[str, tuple[int, ...]],
    problems: Problems,
) -> None:
    for name in dict.fromkeys(move.torch for move in moves):
        used = np.zeros(int(np.prod(torch_shapes[name])), np.int64)
        for move in moves:
            if move.torch == name:
                np.add.at(used, move.source, 1)
        _say_uses(name, used, "used", problems)
    for path in dict.fromkeys(move.flax for move in moves):
        filled = np.zeros(int(np.prod(flax_shapes[path])), np.int64)
        for move in moves:
            if move.flax == path:
                np.add.at(filled, move.target, 1)
        from_where = ", ".join(move.torch for move in moves if move.flax == path)
        _say_uses(f"{path} (from {from_where})", filled, "filled", problems)


def _say_uses(what: str, counts: Indices, verb: str, problems: Problems) -> None:
    if (counts == 0).any():
        problems.add(f"{what}: {int((counts == 0).sum())} of {counts.size} elements are never {verb}")
    if (counts > 1).any():
        problems.add(f"{what}: {int((counts > 1).sum())} of {counts.size} elements are {verb} more than once")


def _first_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
