"""Text on disk to training samples: indexed datasets, samples of each model, blends, batches.

Nothing here imports torch except `megatron.data.loader`, so that the data tools start at once.
"""

from megatron.data.bert_build import build_bert_datasets, max_predictions
from megatron.data.bert_dataset import BertDataset
from megatron.data.blended_dataset import BlendedDataset
from megatron.data.gpt_build import build_gpt_datasets
from megatron.data.gpt_dataset import GPTDataset
from megatron.data.indexed_dataset import (
    IndexedDataset,
    IndexedDatasetBuilder,
    build_indexed_dataset,
    token_dtype,
)
from megatron.data.samples import Sample, SampleDataset
from megatron.data.splits import split_documents
from megatron.data.t5_build import build_t5_datasets
from megatron.data.t5_dataset import T5Dataset

__all__ = [
    "BertDataset",
    "BlendedDataset",
    "GPTDataset",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "Sample",
    "SampleDataset",
    "T5Dataset",
    "build_bert_datasets",
    "build_gpt_datasets",
    "build_indexed_dataset",
    "build_t5_datasets",
    "max_predictions",
    "split_documents",
    "token_dtype",
]
