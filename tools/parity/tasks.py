"""The kinds of pretraining by the name of their model."""

from __future__ import annotations

from collections.abc import Callable

from megatron.config import Config
from megatron.training import BertPretraining, GPTPretraining, T5Pretraining
from megatron.training.task import Task

TASKS: dict[str, Callable[[Config], Task]] = {
    "bert": BertPretraining,
    "gpt": GPTPretraining,
    "t5": T5Pretraining,
}
