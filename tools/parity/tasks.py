"""The kinds of pretraining by the name of their model."""

from __future__ import annotations

from megatron.training import BertPretraining, GPTPretraining, T5Pretraining

TASKS: dict[str, type[BertPretraining | GPTPretraining | T5Pretraining]] = {
    "bert": BertPretraining,
    "gpt": GPTPretraining,
    "t5": T5Pretraining,
}
