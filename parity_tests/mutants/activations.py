"""The feed-forward layer: its activation, its gate, its gradient."""

from __future__ import annotations

from typing import Any

from parity_tests.mutants.patching import Patch, halved_gradient
from parity_tests.mutants.registry import mutant

_FEEDFORWARD = "*.feedforward"


def _taken_for(patch: Patch, wanted: str, instead: str) -> None:
    def wrong(activate: Any) -> Any:
        return lambda X, name: activate(X, instead if name == wanted else name)

    patch.function("feedforward", "activate", wrong)


@mutant("G1", case="decoder", culprits=_FEEDFORWARD)
def tanh_for_erf(patch: Patch) -> None:
    _taken_for(patch, "gelu", "gelu_tanh")


@mutant("G2", case="encoder", culprits=_FEEDFORWARD)
def tanh_for_erf_in_an_encoder(patch: Patch) -> None:
    _taken_for(patch, "gelu", "gelu_tanh")


@mutant("G3", case="gelu_tanh", culprits=_FEEDFORWARD)
def erf_for_tanh(patch: Patch) -> None:
    _taken_for(patch, "gelu_tanh", "gelu")


@mutant("G4", case="small-initial", culprits=_FEEDFORWARD)
def tanh_for_erf_near_zero(patch: Patch) -> None:
    """With initial weights all activations are near 0, where the two formulas meet."""
    _taken_for(patch, "gelu", "gelu_tanh")


@mutant("G5", case="geglu", culprits=_FEEDFORWARD)
def tanh_for_erf_in_a_gate(patch: Patch) -> None:
    _taken_for(patch, "gelu", "gelu_tanh")


@mutant("T10", case="llama", culprits=_FEEDFORWARD)
def gelu_for_silu(patch: Patch) -> None:
    _taken_for(patch, "silu", "gelu")


@mutant("T11", case="llama", culprits=_FEEDFORWARD)
def gate_and_up_exchanged(patch: Patch) -> None:
    def wrong(call: Any) -> Any:
        def feedforward(self: Any, *args: Any, **options: Any) -> Any:
            gate, up = self.gate, self.up
            self.gate, self.up = up, gate
            try:
                return call(self, *args, **options)
            finally:
                self.gate, self.up = gate, up

        return feedforward

    patch.method("feedforward", "FeedForward", wrong)


@mutant("T12", case="decoder", culprits=_FEEDFORWARD)
def half_the_gradient_of_gelu(patch: Patch) -> None:
    patch.function(
        "feedforward", "activate", lambda activate: lambda X, name: halved_gradient(patch, activate(X, name))
    )


@mutant("T13", case="gelu_tanh", culprits=_FEEDFORWARD)
def sigmoid_approximation_of_gelu(patch: Patch) -> None:
    patch.function("feedforward", "activate", lambda activate: lambda X, name: activate(1.702 * X, "silu") / 1.702)


@mutant("T14", case="decoder", culprits="stack.blocks.*")
def residual_around_the_feedforward_missing(patch: Patch) -> None:
    """The block gives what the feed-forward adds, without what it was added to."""

    def wrong(call: Any) -> Any:
        def block(self: Any, X: Any, *args: Any, **options: Any) -> Any:
            return call(self, X, *args, **options) - X

        return block

    patch.method("block", "Block", wrong)


@mutant("T15", case="decoder", culprits="stack")
def first_block_used_for_all(patch: Patch) -> None:
    """A loop over layers that always takes the first."""

    def wrong(call: Any) -> Any:
        def stack(self: Any, *args: Any, **options: Any) -> Any:
            blocks = self.blocks
            self.blocks = [blocks[0]] * len(blocks) if not patch.is_torch else type(blocks)([blocks[0]] * len(blocks))
            try:
                return call(self, *args, **options)
            finally:
                self.blocks = blocks

        return stack

    patch.method("stack", "TransformerStack", wrong)
