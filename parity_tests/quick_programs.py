"""Many small programs, each run a few times: machine code made with little care (XLA's flags), and one MLIR context."""

import threading
from importlib.metadata import version
from typing import Any

XLA_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if version("jaxlib").startswith("0.10."):  # XLA ends the process at a flag that it does not know
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"

# a context keeps every type, constant and place in a file that it has seen: after so many programs it is given up
_PROGRAMS = 500


def share_contexts() -> None:
    """JAX makes a new MLIR context for each program, which takes about as long as tracing and lowering a small one.

    From here on each thread lowers its programs in a context that it has. Nothing happens where JAX has no such
    function (it is not public).
    """
    from jax._src.interpreters import mlir

    make = getattr(mlir, "make_ir_context", None)
    if make is None or getattr(make, "shares", False):
        return
    kept = threading.local()

    def shared() -> Any:
        if getattr(kept, "programs", _PROGRAMS) >= _PROGRAMS:
            kept.context, kept.programs = make(), 0
        kept.programs += 1
        return kept.context

    shared.shares = True  # type: ignore[attr-defined]
    mlir.make_ir_context = shared
