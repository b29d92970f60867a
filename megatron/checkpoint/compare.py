"""What stands between a checkpoint and the model that is to load it, in plain words."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping

from megatron.checkpoint.reader import Checkpoint, is_weight
from megatron.config import ModelConfig

Shape = tuple[int, ...]

# Fields of ModelConfig in which a checkpoint and the model that loads it may differ: they change
# how a model is trained or stored, not what its weights mean.
_FREE_FIELDS = {
    "make_vocab_size_divisible_by",
    "attention_dropout",
    "hidden_dropout",
    "init_method_std",
    "init_method_xavier_uniform",
    "fp16",
    "bf16",
    "fp64",
    "fp8_format",
    "fp8_recipe",
    "fp8_amax_history_len",
    "attention_backend",
}
_RESOLVED = {"ffn_hidden_size": "ffn_size", "kv_channels": "head_size"}
_LINES_PER_KIND = 5


def differences(
    checkpoint: Checkpoint,
    model: ModelConfig,
    wanted: Mapping[str, Shape],
    weights: Collection[str],
) -> list[str]:
    """A line for each difference; none where the checkpoint serves.

    model: the configuration of the model that loads; wanted: the shapes of what this rank loads;
    weights: the names of the whole model's weights, beside which the checkpoint may hold no other.
    Many tensors that differ in the same way are summed up in one line.
    """
    lines = list(_architecture(checkpoint.config.model, model))
    if not lines:  # else the tensors differ by the hundred, for the reasons given already
        lines = list(_tensors(checkpoint, wanted, weights))
    return [f"checkpoint {checkpoint.path}{line}" for line in lines]


def _architecture(saved: ModelConfig, model: ModelConfig) -> Iterator[str]:
    """A line for each flag by which the saved model is another model."""
    for field in dataclasses.fields(ModelConfig):
        attribute = _RESOLVED.get(field.name, field.name)
        there, here = getattr(saved, attribute), getattr(model, attribute)
        if field.name not in _FREE_FIELDS and there != here:
            flag = "--" + field.name.replace("_", "-")
            yield f": {flag} is {_say(there)} there and {_say(here)} here"


def _tensors(
    checkpoint: Checkpoint, wanted: Mapping[str, Shape], weights: Collection[str]
) -> Iterator[str]:
    stored = checkpoint.stored.shapes
    missing = [key for key in wanted if key not in stored]
    yield from _sum_up([f"{key} is missing" for key in missing if is_weight(key)])
    states = [key for key in missing if not is_weight(key)]
    if states:
        yield (
            f" lacks {len(states)} tensors of the optimizer's state, such as {states[0]}; "
            "--no-load-optim starts with a new one"
        )
    yield from _sum_up(
        [
            f"{key} is {stored[key]} there and {shape} here"
            for key, shape in wanted.items()
            if key in stored and stored[key] != shape
        ]
    )
    surplus = [key for key in checkpoint.weights if key not in weights]
    yield from _sum_up([f"{key} has no place in this model" for key in surplus])


def _sum_up(lines: list[str]) -> Iterator[str]:
    yield from (f": {line}" for line in lines[:_LINES_PER_KIND])
    if len(lines) > _LINES_PER_KIND:
        yield f": and {len(lines) - _LINES_PER_KIND} more such tensors, the last: {lines[-1]}"


def _say(value: object) -> str:
    if value is None:
        return "not given"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
