"""Which module of a PyTorch model is which module of its Flax port."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from twinformer.parity.carry import Plan


def match_modules(
    plan: Plan,
    torch_paths: Iterable[str],
    flax_paths: Iterable[str],
    given: Mapping[str, str | None] | None,
) -> dict[str, str]:
    """PyTorch path to Flax path, for modules that can be called.

    Two modules are partners when the weights below the one are exactly those below the other; where several lie
    inside each other with the same weights, equal names go first, then their order from outside. Modules without
    weights are partners when they have the same name within partners. ``given`` goes before all; None is no partner.
    """
    torch_paths, flax_paths = list(torch_paths), list(flax_paths)
    pairs: dict[str, str] = {"": ""}
    excluded = {path for path, partner in (given or {}).items() if partner is None}
    pairs |= {path: partner for path, partner in (given or {}).items() if partner is not None and path in torch_paths}
    by_torch = _groups(torch_paths, {(move.torch, move.flax) for move in plan.moves}, 0)
    by_flax = _groups(flax_paths, {(move.torch, move.flax) for move in plan.moves}, 1)
    for weights, theirs in by_torch.items():
        left = [path for path in theirs if path not in pairs and path not in excluded]
        right = [path for path in by_flax.get(weights, []) if path not in pairs.values()]
        for path in list(left):
            same = next((other for other in right if _last(other) == _last(path)), None)
            if same is not None:
                pairs[path] = same
                left.remove(path)
                right.remove(same)
        if len(left) == len(right):
            pairs |= dict(zip(left, right, strict=True))
    empty = {path for path in flax_paths if not any(_below(move.flax, path) for move in plan.moves)}
    for path in sorted(torch_paths, key=lambda one: one.count(".")):
        if path in pairs or path in excluded or any(_below(move.torch, path) for move in plan.moves):
            continue
        owner = path.rpartition(".")[0]
        while owner and owner not in pairs:
            owner = owner.rpartition(".")[0]
        inside = path.removeprefix(f"{owner}.") if owner else path
        partner = f"{pairs[owner]}.{inside}" if pairs[owner] else inside
        if partner in empty and partner not in pairs.values():
            pairs[path] = partner
    return pairs


def _groups(paths: list[str], moves: set[tuple[str, str]], side: int) -> dict[frozenset[tuple[str, str]], list[str]]:
    """Modules by the weights below them, outermost first; those without any are left out."""
    groups: dict[frozenset[tuple[str, str]], list[str]] = {}
    for path in sorted(paths, key=lambda one: (one.count("."), one)):
        weights = frozenset(move for move in moves if _below(move[side], path))
        if weights:
            groups.setdefault(weights, []).append(path)
    return groups


def _below(leaf: str, module: str) -> bool:
    return not module or leaf.startswith(f"{module}.")


def _last(path: str) -> str:
    return path.rpartition(".")[2]
