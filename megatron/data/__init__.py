"""Text on disk to training samples: indexed datasets, samples of BERT, batches.

Nothing here imports torch except `megatron.data.loader`, so that the data tools start at once.
"""

from megatron.data.bert_build import build_bert_datasets, max_predictions
from megatron.data.bert_dataset import BertDataset
from megatron.data.indexed_dataset import (
    IndexedDataset,
    IndexedDatasetBuilder,
    build_indexed_dataset,
    token_dtype,
)
from megatron.data.samples import Sample, SampleDataset
from megatron.data.splits import split_documents

__all__ = [
    "BertDataset",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "Sample",
    "SampleDataset",
    "build_bert_datasets",
    "build_indexed_dataset",
    "max_predictions",
    "split_documents",
    "token_dtype",
]
