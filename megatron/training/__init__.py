"""The loop that wires everything: training, evaluation, reports, checkpoints.

Read in this order: `loop` (the course of a run), `trainer` (one step of it), `task` (what a kind of
pretraining brings), `gpt` (one such kind); then `plan` (which pipeline schedule) and `batch_ramp`
(how large a step).
"""

from megatron.training.bert import BertPretraining
from megatron.training.evaluation import open_for_evaluation
from megatron.training.gpt import GPTPretraining
from megatron.training.loop import pretrain
from megatron.training.t5 import T5Pretraining
from megatron.training.task import Datasets, SampleCounts, Task
from megatron.training.trainer import Step, Trainer

__all__ = [
    "BertPretraining",
    "Datasets",
    "GPTPretraining",
    "SampleCounts",
    "Step",
    "T5Pretraining",
    "Task",
    "Trainer",
    "open_for_evaluation",
    "pretrain",
]
