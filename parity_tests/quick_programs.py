"""XLA flags for machine code that is made with little care: many small programs, each run a few times."""

from importlib.metadata import version

XLA_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if version("jaxlib").startswith("0.10."):  # XLA ends the process at a flag that it does not know
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
