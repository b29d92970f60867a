"""Every layout that a configuration can have on so many GPUs.

A layout is the flags that say how the model and the batch are spread, and what is traded for
memory. The choices of one flag after another are tried, and a branch is left as soon as the checks
of `megatron.validation` find something wrong with the flags chosen so far: none of its rules is
repeated here. Of layouts that do the same only one is tried: without a pipeline there is one
schedule, without tensor parallelism no sequence to split, without data parallelism nothing to
spread the optimizer over.

This file imports no torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron.config import Config
from megatron.errors import ConfigError
from megatron.validation import CHECKS

Values = Mapping[str, Any]

_WRITTEN = {None: "none", False: "false"}
SCHEDULES = ("1f1b", "interleaved", "zb-h1", "zb-2p")
GRANULARITIES = (None, "selective", "full")


@dataclass(frozen=True)
class Layout:
    """How a model and its batch are spread; the fields are flags of the configuration."""

    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    pipeline_model_parallel_split_rank: int | None
    pipeline_schedule: str
    num_layers_per_virtual_pipeline_stage: int | None
    sequence_parallel: bool
    use_distributed_optimizer: bool
    shard_gradients: bool
    recompute_granularity: str | None
    micro_batch_size: int

    def applied_to(self, base: Config) -> Config:
        """The configuration with this layout."""
        return Config.from_flags(base.to_flags() | asdict(self))

    def flags(self) -> list[str]:
        """The words of a command line, which win over all that a script or a file has stated."""
        words = []
        for name, value in asdict(self).items():
            if value is None and name == "pipeline_model_parallel_split_rank":
                continue  # of an encoder-decoder alone
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else [_WRITTEN.get(value, str(value))]
        return words


AXES = tuple(field.name for field in fields(Layout))
# Flags that go with a layout, and mean nothing for another.
COMPANIONS = (
    "pipeline_layers",
    "pipeline_costs",
    "recompute_method",
    "recompute_num_layers",
    "distribute_saved_activations",
)


class Layouts:
    """The layouts of a configuration on a cluster.

    Attributes:
        rejected: choices that the validation has turned down, each with all that would follow it.
    """

    def __init__(
        self, base: Config, fixed: Values, gpus: int, tensor_sizes: Sequence[int] | None = None
    ) -> None:
        """`fixed` are values of axes that are not to be searched, `tensor_sizes` those to try."""
        self._values = {k: v for k, v in base.to_flags().items() if k not in AXES}
        self._fixed, self._gpus, self._tensor_sizes = fixed, gpus, tensor_sizes
        self._rules = Rules(gpus)
        self.rejected = 0

    def __iter__(self) -> Iterator[Layout]:
        self.rejected = 0
        return self._beneath({})

    def _beneath(self, chosen: dict[str, Any]) -> Iterator[Layout]:
        """The layouts that begin with these choices."""
        if len(chosen) == len(AXES):
            yield Layout(**chosen)
            return
        name = AXES[len(chosen)]
        choices = [self._fixed[name]] if name in self._fixed else self._choices(name, chosen)
        for choice in choices:
            more = chosen | {name: choice}
            if self._rules.allow(self._values | more, name):
                yield from self._beneath(more)
            else:
                self.rejected += 1

    def _choices(self, name: str, chosen: Values) -> Sequence[Any]:
        tensor = chosen.get("tensor_model_parallel_size", 1)
        pipeline = chosen.get("pipeline_model_parallel_size", 1)
        match name:
            case "tensor_model_parallel_size":
                wanted = self._tensor_sizes
                return [t for t in divisors(self._gpus) if wanted is None or t in wanted]
            case "pipeline_model_parallel_size":
                return divisors(self._gpus // tensor)
            case "pipeline_model_parallel_split_rank":
                has_split = self._values["model_type"] == "t5" and pipeline > 1
                return range(1, pipeline) if has_split else [None]
            case "pipeline_schedule":
                return SCHEDULES if pipeline > 1 else SCHEDULES[:1]
            case "num_layers_per_virtual_pipeline_stage":
                stated = self._values["pipeline_layers"] is not None
                is_cut = chosen["pipeline_schedule"] == "interleaved" and not stated
                return divisors(self._values["num_layers"]) if is_cut else [None]
            case "sequence_parallel":
                return [True, False] if tensor > 1 else [False]
            case "use_distributed_optimizer":
                return [True, False] if self._gpus > tensor * pipeline else [False]
            case "shard_gradients":
                return [False, True] if chosen["use_distributed_optimizer"] else [False]
            case "recompute_granularity":
                return GRANULARITIES
        batch = self._values["global_batch_size"]
        return divisors(batch // max(self._gpus // (tensor * pipeline), 1)) or [1]


class Rules:
    """The checks of the validation, each asked once for the same values."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._checks = [(check, tuple(inspect.signature(check).parameters)) for check in CHECKS]
        self._answers: dict[Any, bool] = {}

    def allow(self, values: Values, name: str) -> bool:
        """Whether the flags among `values` go together, as far as `name` has a part in it."""
        values = {**values, "world_size": self._world_size}
        return all(
            self._answer(number, values)
            for number, (_, names) in enumerate(self._checks)
            if name in names and all(each in values for each in names)
        )

    def _answer(self, number: int, values: Values) -> bool:
        check, names = self._checks[number]
        wanted = {name: values[name] for name in names}
        key = (number, *wanted.values())
        if key not in self._answers:
            try:
                check(**wanted)
                self._answers[key] = True
            except ConfigError as error:
                self._answers[key] = not error.problems
        return self._answers[key]


def divisors(number: int) -> list[int]:
    """In ascending order; none of 0."""
    return [each for each in range(1, number + 1) if number % each == 0]
