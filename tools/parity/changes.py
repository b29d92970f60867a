"""What a configuration is changed in, to be compared: little, and each change is said."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron.config import Config, ParallelConfig
from megatron.errors import ConfigError
from megatron.tokenizer.build import build_tokenizer
from megatron.validation import validate

SYNTHETIC_VOCABULARY = 1000

USUAL_TOKENIZERS = {
    "bert": "BertWordPieceLowerCase",
    "gpt": "GPT2BPETokenizer",
    "t5": "BertWordPieceLowerCase",
}
"""What the pretraining programs take where --tokenizer-type is not given."""

PRECISIONS: dict[str, dict[str, bool]] = {
    "fp64": {"fp64": True, "fp16": False, "bf16": False},
    "fp32": {"fp64": False, "fp16": False, "bf16": False},
    "bf16": {"fp64": False, "fp16": False, "bf16": True},
}


@dataclass(frozen=True)
class Wish:
    """How the user wants the configuration shrunk, and in which number format."""

    layers: int | None = None
    hidden: int | None = None
    dtype: str = "fp64"


def comparable(config: Config, wish: Wish, ranks: int) -> tuple[Config, list[str]]:
    """The configuration to compare, and a line about each change that was not asked for.

    Raises ConfigError where the shrunk configuration is impossible.
    """
    values = config.to_flags()
    notes: list[str] = []
    for why, changes in (
        ("asked for", _shrunk(config, wish)),
        ("random numbers differ between layouts", _without_dropout()),
        ("so that the first steps move the weights", _without_warmup()),
        (f"--dtype {wish.dtype}", _in_precision(wish.dtype)),
        ("batches are made by the ranks themselves", {"num_workers": 0}),
        *_vocabulary(config),
    ):
        changed = {name: value for name, value in changes.items() if values[name] != value}
        values |= changed
        notes += (f"--{name.replace('_', '-')} {value}: {why}" for name, value in changed.items())
    result = Config.from_flags(values)
    if problems := validate(result, ranks):
        raise ConfigError(problems)
    return result, notes


def one_process(config: Config, ranks: int) -> Config:
    """The same training in one process, with nothing shared out, deferred or recomputed."""
    parallel, train = config.parallel, config.train
    whole_batch = train.global_batch(parallel.data_parallel_size(ranks))
    values = config.to_flags() | ParallelConfig().__dict__
    kept = ("use_cpu", "distributed_timeout_minutes")
    values |= {name: getattr(parallel, name) for name in kept}
    return Config.from_flags(values | {"global_batch_size": whole_batch})


def _shrunk(config: Config, wish: Wish) -> dict[str, Any]:
    model, parallel = config.model, config.parallel
    changes: dict[str, Any] = {}
    if wish.layers is not None:
        changes |= {"num_layers": wish.layers, "pipeline_layers": None}
        if model.decoder_num_layers is not None:
            changes["decoder_num_layers"] = wish.layers
        if model.model_type != "t5" and parallel.schedule == "interleaved":
            stages = len(parallel.stage_layers(model.num_layers))
            changes["num_layers_per_virtual_pipeline_stage"] = max(1, wish.layers // stages)
    if wish.hidden is not None:
        changes |= {"hidden_size": wish.hidden, "kv_channels": None}
        if model.ffn_hidden_size is not None:
            tensor = parallel.tensor_model_parallel_size
            width = model.ffn_hidden_size * wish.hidden // model.hidden_size
            changes["ffn_hidden_size"] = max(1, width // tensor) * tensor
    return changes


def _without_dropout() -> dict[str, Any]:
    return {"hidden_dropout": 0.0, "attention_dropout": 0.0}


def _without_warmup() -> dict[str, Any]:
    return {"lr_warmup_fraction": None, "lr_warmup_iters": 0, "lr_warmup_samples": 0}


def _in_precision(dtype: str) -> dict[str, Any]:
    changes: dict[str, Any] = dict(PRECISIONS[dtype])
    if dtype != "bf16":
        changes["fp32_residual_connection"] = False
    return changes


def _vocabulary(config: Config) -> list[tuple[str, dict[str, Any]]]:
    """The tokenizer's size where there is one, the stated size, or a small one."""
    data, stated = config.data, config.model.vocab_size
    if not (data.data_path or data.vocab_file or data.tokenizer_model):
        drawn_from = stated or SYNTHETIC_VOCABULARY + data.vocab_extra_ids
        return [("tokens are random numbers", {"vocab_size": drawn_from})]
    usual = data.tokenizer_type or USUAL_TOKENIZERS[config.model.model_type]
    own = build_tokenizer(replace(data, tokenizer_type=usual)).vocab_size
    if stated is not None and stated < own:
        raise ConfigError(f"--vocab-size {stated} is less than the tokenizer's {own}")
    return [
        ("the usual one", {"tokenizer_type": usual}),
        ("the tokenizer's", {"vocab_size": stated or own}),
    ]
