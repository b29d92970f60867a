"""What is trained to compare speed, and this project's configuration of it.

Letters: b micro-batch, s sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.random_batches import random_batches
from megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron.training.bert import BertPretraining
from megatron.training.flops import FORWARD_AND_BACKWARD
from megatron.training.gpt import GPTPretraining
from megatron.training.task import Batch, Task

LEARNING_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Training:
    """A model and its batch, in bfloat16 and without dropout.

    Attributes:
        goal: the share of the rate of a matrix product that a step is to reach.
        wanted: whether time is kept for it.
    """

    name: str
    kind: str
    layers: int
    hidden: int
    heads: int
    sequence: int
    vocabulary: int
    micro_batch: int
    micro_batches: int
    goal: float
    wanted: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.micro_batch * self.micro_batches * self.sequence

    def tiny(self) -> Training:
        """The same kind of model at a size for a trial."""
        return replace(
            self,
            name=f"tiny {self.kind}",
            layers=1,
            hidden=32,
            heads=2,
            sequence=16,
            vocabulary=128,
            micro_batch=2,
            micro_batches=2,
        )

    def flops(self) -> float:
        """Operations of a step that the mathematics asks for (`megatron.training.flops`)."""
        config = configuration(self, kernels="torch", device_type="cpu")
        samples = self.micro_batch * self.micro_batches
        return samples * TASKS[self.kind](config).flops_per_sample(config)

    def attention_flops_ahead(self) -> float:
        """Those of them that causal attention does not need, though the field counts them."""
        if self.kind != "gpt":
            return 0.0
        scores = 2.0 * self.layers * self.tokens * self.sequence * self.hidden
        return FORWARD_AND_BACKWARD * scores


TASKS: dict[str, Callable[[Config], Task]] = {"bert": BertPretraining, "gpt": GPTPretraining}


def _gpt_345m(sequence: int) -> Training:
    return Training(
        name=f"GPT-345M, s = {sequence}",
        kind="gpt",
        layers=24,
        hidden=1024,
        heads=16,
        sequence=sequence,
        vocabulary=50304,
        micro_batch=8192 // sequence,
        micro_batches=2,
        goal=0.55,
    )


def _gpt_1_3b(sequence: int) -> Training:
    return replace(
        _gpt_345m(sequence),
        name=f"GPT-1.3B, s = {sequence}",
        hidden=2048,
        micro_batch=4096 // sequence,
        micro_batches=4,
        goal=0.60,
    )


# Each step has 16384 tokens, in micro-batches that fit beside the peers' in 80 GB.
TRAININGS = (
    _gpt_1_3b(1024),
    _gpt_345m(1024),
    replace(_gpt_345m(512), name="BERT-345M, s = 512", kind="bert", vocabulary=30592),
    replace(_gpt_1_3b(2048), wanted=False),
)


def configuration(
    training: Training,
    *,
    kernels: str,
    device_type: str,
    cuda_graphs: bool = False,
    packed: bool = False,
) -> Config:
    """This project's flags."""
    return Config(
        model=ModelConfig(
            model_type=training.kind,
            num_layers=training.layers,
            hidden_size=training.hidden,
            num_attention_heads=training.heads,
            max_position_embeddings=training.sequence,
            vocab_size=training.vocabulary,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bf16=True,
        ),
        parallel=ParallelConfig(use_cpu=device_type == "cpu"),
        optimizer=OptimizerConfig(lr=LEARNING_RATE, lr_decay_style="constant"),
        data=DataConfig(seq_length=training.sequence, pack_sequences=packed),
        train=TrainConfig(
            micro_batch_size=training.micro_batch,
            global_batch_size=training.micro_batch * training.micro_batches,
            train_iters=10**6,
            kernels=kernels,
            cuda_graphs=cuda_graphs,
        ),
    )


def batches(training: Training, config: Config) -> list[Batch]:
    """The micro-batches of a step on the host: random tokens, none of them padding."""
    if training.kind == "bert":
        return random_batches(config, training.micro_batches)
    generator = torch.Generator().manual_seed(0)
    b, s = training.micro_batch, training.sequence
    return [
        {
            "tokens": torch.randint(training.vocabulary, (b, s + 1), generator=generator),
            "loss_weights": torch.ones(b, s),
        }
        for _ in range(training.micro_batches)
    ]
