"""Checkpoints that any layout can load, and maps to the formats of other systems."""

from megatron.checkpoint.reader import Checkpoint, load_config, load_global_tensors
from megatron.checkpoint.save_load import find_checkpoint, load_checkpoint, save_checkpoint

__all__ = [
    "Checkpoint",
    "find_checkpoint",
    "load_checkpoint",
    "load_config",
    "load_global_tensors",
    "save_checkpoint",
]
