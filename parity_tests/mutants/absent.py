"""Entries of the catalogue that cannot be planted, and why."""

from parity_tests.mutants.registry import does_not_apply

does_not_apply(
    "no code in the twins: what is cut over devices (rung 10) is never fused, and XLA and FSDP cut it by themselves",
    "W7",
)
does_not_apply("no code in the twins: rung 10 sums over devices; the trainers see whole batches", "L2")
does_not_apply(
    "no code in the twins: a batch holds what the decoder reads beside what it should say (twinformer/data/batch.py)",
    "L9",
)
does_not_apply("no code in the twins: decay goes by the name of a parameter, and layers are not stacked", "O7")
does_not_apply("its only symptom is a crash, under the float64 that every cell of the decoding rung runs in", "X10")
does_not_apply(
    "no code in the twins: initial weights are drawn once, in NumPy, for both (twinformer/initializers.py)",
    "W13",
    "W14",
    "W15",
)
does_not_apply("not planted: float16 is judged in models that are configured so, none of which is so large", "W12")
does_not_apply("needs an accelerator: on a CPU every setting of matrix products computes the same", "X1", "X2", "X8")
does_not_apply("needs eager Flax: the judge compares compiled runs (rung 4 asks about eager = jit)", "X3")
