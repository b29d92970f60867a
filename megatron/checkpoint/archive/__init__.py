"""Files of `torch.save`, read without trusting them and written without holding a model."""

from megatron.checkpoint.archive.reader import LazyArchive, LazyTensor, Unknown
from megatron.checkpoint.archive.writer import DeferredTensor, write_archive

__all__ = ["DeferredTensor", "LazyArchive", "LazyTensor", "Unknown", "write_archive"]
