"""Checkpoints of Megatron-LM, read as our global tensors and written from them."""

from megatron.checkpoint.megatron_lm.reader import MegatronCheckpoint, open_megatron
from megatron.checkpoint.megatron_lm.writer import write_megatron

__all__ = ["MegatronCheckpoint", "open_megatron", "write_megatron"]
