"""What both twins agree on: configuration, names, initial weights, files, and the judge.

Nothing here but ``parity`` and ``cli`` imports PyTorch or JAX (``sharded`` one of them, in a process of its own).
"""

from twinformer.config import ModelConfig, RotaryScaling, StackConfig
from twinformer.errors import CheckpointError, ConfigError, InputError, TwinformerError, WeightsError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "InputError",
    "ModelConfig",
    "RotaryScaling",
    "StackConfig",
    "TwinformerError",
    "WeightsError",
]
