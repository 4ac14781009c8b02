"""Data: what a model is trained on, as batches of NumPy arrays that both frameworks are given alike."""
