"""Training runs: options, data, the loop, checkpoints and logs, the same for both twins.

A run sees a twin only as a ``twinformer.learning.Trainer``: batches go in as NumPy arrays, state comes out as NumPy
arrays by name. So a run that one framework began can be gone on with in the other.
"""
