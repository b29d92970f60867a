"""Short trainings of small networks on any layout, recorded as whole tensors by global name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from megatron.config import Config, all_flags
from megatron.mpu import ParallelState
from megatron.ops import compiled, kernels
from megatron.training.initialize import rank_grid
from megatron.training.task import Batch
from megatron.training.trainer import Trainer
from tests.distributed import run_distributed
from tools.parity.comparison import Row, Tolerances, compare
from tools.parity.recording import RankRecord, Recording, assemble, record
from tools.parity.samples import own_micro_batches, synthetic_samples
from tools.parity.tasks import TASKS

STEPS = 10
TOLERANCES = {"fp64": Tolerances(*[1e-11] * 5), "fp32": Tolerances(*[1e-5] * 5)}

BASE: dict[str, Any] = {
    "num_layers": 5,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "seq_length": 24,
    "max_position_embeddings": 24,
    # Divisible by no tensor size, as the layers are by no number of stages.
    "vocab_size": 101,
    "make_vocab_size_divisible_by": 8,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "fp64": True,
    "use_cpu": True,
    "gradient_bucket_size": 3000,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "train_iters": STEPS,
    "lr": 1e-3,
    "lr_warmup_iters": 3,
}

NETWORKS: dict[str, dict[str, Any]] = {
    "bert": {},
    "bert, one head": {
        "num_layers": 4,
        "hidden_size": 48,
        "num_attention_heads": 12,
        "bert_no_binary_head": True,
        "activation": "gelu_tanh",
        "apply_residual_connection_post_layernorm": True,
    },
    "bert, norms behind": {
        "num_layers": 4,
        "norm_position": "post",
        "activation": "relu",
        "head_activation": "gelu",
        "num_tokentypes": 3,
        "untie_embeddings_and_output_weights": True,
        "attention_scale": 0.2,
    },
    "bert, distances": {
        "num_layers": 4,
        "position_embedding_type": "relative_key_query",
        "activation": "quick_gelu",
    },
    "gpt": {"model_type": "gpt"},
    "gpt, documents": {
        "model_type": "gpt",
        "num_layers": 4,
        "num_attention_heads": 6,
        "hidden_size": 24,
        "reset_position_ids": True,
        "reset_attention_mask": True,
        "eod_mask_loss": True,
    },
    "llama": {
        "model_type": "gpt",
        "num_layers": 6,
        "num_query_groups": 4,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "ffn_hidden_size": 96,
        "disable_bias_linear": True,
        "untie_embeddings_and_output_weights": True,
    },
    "llama, documents": {
        "model_type": "gpt",
        "num_layers": 4,
        "num_attention_heads": 12,
        "hidden_size": 48,
        "num_query_groups": 6,
        "position_embedding_type": "rope",
        "rotary_percent": 0.5,
        "normalization": "RMSNorm",
        "geglu": True,
        "ffn_hidden_size": 96,
        "reset_position_ids": True,
        "reset_attention_mask": True,
    },
    "t5": {
        "model_type": "t5",
        "num_layers": 3,
        "decoder_num_layers": 2,
        "decoder_seq_length": 16,
        "vocab_extra_ids": 5,
    },
    "t5, relative": {
        "model_type": "t5",
        "num_layers": 2,
        "decoder_num_layers": 3,
        "hidden_size": 24,
        "num_attention_heads": 6,
        "decoder_seq_length": 12,
        "vocab_extra_ids": 5,
        "position_embedding_type": "relative",
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "normalization": "RMSNorm",
        "geglu": True,
        "ffn_hidden_size": 48,
        "disable_bias_linear": True,
        "untie_embeddings_and_output_weights": True,
    },
    "t5, rotary": {
        "model_type": "t5",
        "num_layers": 2,
        "decoder_num_layers": 2,
        "num_query_groups": 4,
        "vocab_extra_ids": 5,
        "position_embedding_type": "rope",
        "swiglu": True,
        "ffn_hidden_size": 64,
    },
}

OF_THE_TRAINING = (
    "num_layers",
    "decoder_num_layers",
    "fp64",
    "adam_eps",
    "clip_grad",
    "global_batch_size",
    "rampup_batch_size",
    "train_iters",
    "train_samples",
    "lr_warmup_iters",
    "lr_warmup_samples",
    "seed",
)
"""Flags that decide what is computed; all others of a case only say how."""


@dataclass(frozen=True)
class Case:
    """A network of `NETWORKS`, and the flags and the number of ranks to train it with."""

    network: str = "bert"
    ranks: int = 1
    flags: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, network: str = "bert", ranks: int = 1, **flags: Any) -> Case:
        """The case with these flags in place of the base's."""
        return cls(network, ranks, tuple(sorted(flags.items())))

    def with_flags(self, **flags: Any) -> Case:
        """This case with some flags set otherwise."""
        return Case.of(self.network, self.ranks, **dict(self.flags) | flags)

    def config(self) -> Config:
        """The run's configuration."""
        return Config.from_flags(BASE | NETWORKS[self.network] | dict(self.flags))

    @property
    def precision(self) -> str:
        """The number format by its flag."""
        return "fp64" if self.config().model.fp64 else "fp32"

    def on_one_process(self) -> Case:
        """The same training in one process, with nothing parallel, shared out or recomputed."""
        flags = {name: value for name, value in self.flags if name in OF_THE_TRAINING}
        train = self.config().train
        sizes = (train.global_batch(self.data_size), *(train.rampup_batch_size or ())[:2])
        return Case.of(self.network, **flags | {"micro_batch_size": math.gcd(*sizes)})

    @property
    def data_size(self) -> int:
        """Replicas of the model."""
        return self.config().parallel.data_parallel_size(self.ranks)

    def options(self) -> list[str]:
        """What of the layout is not the default, without numbers."""
        config = self.config()
        parallel, train = config.parallel, config.train
        options = {
            "tensor": parallel.tensor_model_parallel_size > 1,
            "pipeline": parallel.pipeline_model_parallel_size > 1,
            "data": self.data_size > 1,
            "uneven stages": parallel.pipeline_layers is not None,
            "fewer micro-batches than stages": (
                train.num_micro_batches(self.data_size) < parallel.pipeline_model_parallel_size
            ),
            "ramp": train.rampup_batch_size is not None,
            "sequence parallel": parallel.sequence_parallel,
            "distributed optimizer": parallel.use_distributed_optimizer,
            "sharded gradients": parallel.shard_gradients,
            "stored split": parallel.distribute_saved_activations,
            "unfused attention": config.model.attention_backend == "unfused",
            f"recompute {parallel.recompute_granularity}": parallel.recompute_granularity,
            f"schedule {parallel.schedule}": parallel.pipeline_model_parallel_size > 1,
        }
        return [name for name, given in options.items() if given]

    def __str__(self) -> str:
        defaults = {name: flag.default for name, flag in all_flags().items()} | BASE
        words = [
            f"{_SHORT.get(name, name)}={_text(value)}"
            for name, value in self.flags
            if value != defaults[name]
        ]
        return f"{self.network}: {self.ranks} ranks, {' '.join(words)}"


_SHORT = {
    "tensor_model_parallel_size": "tensor",
    "pipeline_model_parallel_size": "pipeline",
    "pipeline_model_parallel_split_rank": "split",
    "num_layers_per_virtual_pipeline_stage": "virtual_layers",
    "pipeline_layers": "layers",
    "pipeline_schedule": "schedule",
    "pipeline_costs": "costs",
    "micro_batch_size": "micro",
    "global_batch_size": "global",
    "rampup_batch_size": "ramp",
    "gradient_bucket_size": "bucket",
}


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def own_batches(case: Case, step: int, size: int, data_rank: int) -> list[Batch]:
    """The micro-batches of one data-parallel rank in one step of ``size`` samples."""
    config = case.config()
    samples = synthetic_samples(config, size, seed=1000 * config.train.seed + step)
    return own_micro_batches(config, samples, data_rank, case.data_size)


def new_trainer(case: Case) -> Trainer:
    """The trainer of this rank; its process groups must be there."""
    config = case.config()
    alone = case.ranks == 1
    state = ParallelState.single() if alone else ParallelState.create(rank_grid(config, case.ranks))
    kind = TASKS[config.model.model_type]
    # Random samples know no tokenizer whose files could be kept.
    task = type(kind.__name__, (kind,), {"tokenizer_files": ()})(config)
    return Trainer(config, task, state)


def train(case: Case) -> Recording:
    """Train on the case's layout; in this process where it is a single rank."""
    if case.ranks == 1:
        ranks = [_train_rank(case)]
    else:
        ranks = run_distributed(case.ranks, _train_rank, case)
    return assemble(ranks)


def _train_rank(case: Case) -> RankRecord:
    torch.set_num_threads(1)
    trainer = new_trainer(case)
    rank = trainer.state.data.rank
    options = case.config().train
    with kernels.using(options.kernels), compiled.using(options.compile):
        result = record(trainer, STEPS, lambda step, size: own_batches(case, step, size, rank))
    trainer.finish()
    if dist.is_initialized():
        trainer.state.destroy()
    return result


def rows_against_one_process(case: Case) -> list[Row]:
    """The comparison of the case with the same training in one process."""
    expected = _one_process(case.on_one_process())
    return compare(train(case), expected, TOLERANCES[case.precision])


@cache
def _one_process(case: Case) -> Recording:
    return train(case)


def assert_equals_one_process(case: Case) -> None:
    """The case's losses, norms, gradients and weights are those of one process."""
    for row in rows_against_one_process(case):
        assert row.agrees, f"{case}\n{row.quantity}, {row.where}: differs by {row.difference:.2e}"
