"""What the examples of fine-tuning share: flags, ranks, model, training, and the report.

An example says how a sample is drawn, how samples become a batch, and what counts as right. `run`

1. draws samples and keeps some of them out of training;
2. makes a small model of random weights, or loads --model, spread over the ranks;
3. measures it on the samples kept out, trains it, measures it again, and prints both;
4. saves it to --save, where `transformers` and `from_pretrained` find it.

All ranks draw the same samples from --seed; each data-parallel rank trains on its share of a batch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import Tensor

import megatron.hf
from examples.finetune.language import VOCABULARY
from megatron.errors import CheckpointError, ConfigError
from megatron.hf import ModelOutput, parallel_state
from megatron.hf.fine_tuning import FineTuner
from megatron.hf.fine_tuning_losses import loss_terms, sequence_shape
from megatron.hf.heads import HeadedModel
from megatron.hf.hub import CONFIG_FILE, locate
from megatron.mpu import ParallelState
from megatron.mpu.collectives import all_reduce

Batch = dict[str, Tensor]
Counts = Mapping[str, tuple[Tensor, Tensor | int]]
Sample = TypeVar("Sample", bound=Hashable)

TRAINED_ON, HELD_OUT = 4096, 512
FAMILIES = {"bert": "Bert", "megatron-bert": "MegatronBert"}
OTHER_NAMES = {"BertForCausalLM": "BertLMHeadModel"}
SMALL = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
REPORTS = 10


@dataclass(frozen=True)
class Example(Generic[Sample]):
    """A head and something for it to learn.

    Attributes:
        head: the class, without the name of the family.
        draw: one sample.
        collate: the arguments of the model's `forward` for some samples, labels among them.
        metrics: of an output and its batch, what is measured, as a sum and what to divide it by.
        config: fields of the model's configuration.
    """

    head: str
    draw: Callable[[Random], Sample]
    collate: Callable[[Sequence[Sample]], Batch]
    metrics: Callable[[ModelOutput, Batch], Counts]
    config: Mapping[str, Any] = field(default_factory=dict)


class Parser(argparse.ArgumentParser):
    """The flags of all examples; a wrong one is a ConfigError.

    Args:
        story: the example's docstring, of which the first line is shown.
        steps, lr: the example's own defaults.
    """

    def __init__(self, story: str | None, *, steps: int, lr: float = 2e-3) -> None:
        super().__init__(description=(story or "").splitlines()[0], allow_abbrev=False)
        self.add_argument("--model", help="directory or hub name of a BERT or MegatronBERT")
        self.add_argument("--save", type=Path, help="directory to save the trained model to")
        self.add_argument("--steps", type=_positive, default=steps)
        self.add_argument("--lr", type=float, default=lr)
        self.add_argument("--batch-size", type=_positive, default=64, help="samples of a step")
        self.add_argument("--micro-batch-size", type=_positive, default=32)
        self.add_argument("--seed", type=int, default=1234)
        self.add_argument("--bf16", action="store_true", help="train in bfloat16")
        self.add_argument("--tensor-model-parallel-size", type=_positive, default=1)
        self.add_argument("--pipeline-model-parallel-size", type=_positive, default=1)
        self.add_argument("--pipeline-schedule", default="1f1b")
        self.add_argument("--use-distributed-optimizer", action="store_true")

    def error(self, message: str) -> NoReturn:
        """Raise what `run_command` reports in one line."""
        raise ConfigError(message)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {value}")
    return value


_positive.__name__ = "positive number"  # what argparse calls a value that is none


def correct(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How many labels the largest logits hit, and how many there are; -100 is none.

    Args:
        logits: [..., classes].
        labels: i64[...].
    """
    counted = labels != -100
    return ((logits.argmax(-1) == labels) & counted).sum(), counted.sum()


def run(example: Example[Sample], options: argparse.Namespace) -> None:
    """Train a model on the example and print what it has learned.

    Raises:
        ConfigError, CheckpointError: a flag is impossible, or --model cannot be read.
    """
    state = parallel_state(options.tensor_model_parallel_size, options.pipeline_model_parallel_size)
    _check_batch(options, state)
    say = partial(print, flush=True) if state.rank == 0 else _silently
    if options.save is not None:
        options.save.mkdir(parents=True, exist_ok=True)  # it had better fail now than at the end
    samples = _distinct(example.draw, TRAINED_ON + HELD_OUT, Random(options.seed))
    held_out, trained_on = samples[:HELD_OUT], samples[HELD_OUT:]
    model = _model(example, options, state)
    _check_fits(model, example.collate(samples[:1]), options.model)
    tuner = FineTuner(
        model,
        lr=options.lr,
        total_steps=options.steps,
        warmup_steps=options.steps // 10,
        micro_batch_size=options.micro_batch_size,
        pipeline_schedule=options.pipeline_schedule,
        use_distributed_optimizer=options.use_distributed_optimizer,
        seed=options.seed,
    )
    say(
        f"{type(model).__name__} of {model.num_parameters():,} parameters on tensor "
        f"{state.tensor.size} x pipeline {state.pipeline.size} x data {state.data.size} ranks"
    )
    before = _measure(tuner, example, held_out)
    _train(tuner, example, trained_on, options, say)
    after = _measure(tuner, example, held_out)
    say(_table(f"{HELD_OUT} samples held out", before, after))
    if options.save is not None:
        model.save_pretrained(options.save)
        say(f"saved to {options.save}")


def _check_batch(options: argparse.Namespace, state: ParallelState) -> None:
    """Whether every data-parallel rank gets a whole number of micro-batches."""
    together = options.micro_batch_size * state.data.size
    for name, samples in ("--batch-size", options.batch_size), ("samples held out", HELD_OUT):
        if samples % together:
            raise ConfigError(
                f"{name}: {samples} is no multiple of --micro-batch-size "
                f"{options.micro_batch_size} x {state.data.size} data-parallel ranks"
            )


def _silently(line: str) -> None:
    """What the ranks other than the first say."""


def _model(
    example: Example[Sample], options: argparse.Namespace, state: ParallelState
) -> HeadedModel:
    torch.manual_seed(options.seed)
    fields = {"is_decoder": False, **example.config}  # whatever a loaded model was before
    if options.model is None:
        small = megatron.hf.MegatronBertConfig(**SMALL, **fields)
        model = _class("MegatronBert", example.head)(small, parallel_state=state)
    else:
        model = _class(_family(options.model), example.head).from_pretrained(
            options.model,
            parallel_state=state,
            # A head for another number of labels begins anew.
            ignore_mismatched_sizes=True,
            **fields,
        )
    found: HeadedModel = model.bfloat16() if options.bf16 else model
    return found


def _check_fits(model: HeadedModel, batch: Batch, name: str | None) -> None:
    """Whether a model that was not made for the examples can read them."""
    needed = {
        "vocab_size": len(VOCABULARY),
        "max_position_embeddings": sequence_shape(batch)[1],
        "type_vocab_size": 2,
    }
    problems = [
        f"--model {name}: its {field} is {found}, expected at least {least}"
        for field, least in needed.items()
        if (found := getattr(model.config, field)) < least
    ]
    if problems:
        raise ConfigError(problems)


def _family(name_or_path: str) -> str:
    """The family's name in front of its classes."""
    directory = locate(name_or_path, [CONFIG_FILE], "the example")
    try:
        kind = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--model {name_or_path}: {CONFIG_FILE}: {error}") from error
    if kind not in FAMILIES:
        raise CheckpointError(
            f"--model {name_or_path}: found model_type {kind!r}, expected {' or '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def _class(family: str, head: str) -> Any:
    name = family + head
    return getattr(megatron.hf, OTHER_NAMES.get(name, name))


def _distinct(draw: Callable[[Random], Sample], count: int, random: Random) -> list[Sample]:
    """So many samples of which no two are equal."""
    found: dict[Sample, None] = {}
    while len(found) < count:
        found[draw(random)] = None
    return list(found)


def _own(samples: Sequence[Sample], state: ParallelState) -> Sequence[Sample]:
    """This data-parallel rank's share."""
    return samples[state.data.rank :: state.data.size]


def _train(
    tuner: FineTuner,
    example: Example[Sample],
    samples: Sequence[Sample],
    options: argparse.Namespace,
    say: Callable[[str], None],
) -> None:
    order = _shuffled(samples, Random(options.seed))
    every = max(options.steps // REPORTS, 1)
    start = time.monotonic()
    for number in range(1, options.steps + 1):
        batch = [next(order) for _ in range(options.batch_size)]
        step = tuner.step([example.collate(_own(batch, tuner.state))])
        loss, norm = step.loss, step.grad_norm  # on all ranks: the norm may be a collective
        if number % every == 0 or number == options.steps:
            seconds = time.monotonic() - start
            say(
                f"step {number:>{len(str(options.steps))}}/{options.steps} | loss {loss:.4f} | "
                f"grad norm {norm:.3f} | lr {step.learning_rate:.2e} | {seconds:.1f} s"
            )


def _shuffled(samples: Sequence[Sample], random: Random) -> Iterator[Sample]:
    """The samples without end, each pass in another order."""
    order = list(samples)
    while True:
        random.shuffle(order)
        yield from order


def _measure(
    tuner: FineTuner, example: Example[Sample], samples: Sequence[Sample]
) -> dict[str, float]:
    """The loss and the metrics, as means over all ranks' samples."""
    own, size = _own(samples, tuner.state), tuner.config.train.micro_batch_size
    device = tuner.state.device
    parts = [own[first : first + size] for first in range(0, len(own), size)]
    batches = [
        {name: tensor.to(device) for name, tensor in example.collate(part).items()}
        for part in parts
    ]
    one = torch.ones((), device=device)
    sums: dict[str, Tensor] = {}
    for batch, output in zip(batches, tuner.evaluate(batches), strict=True):
        terms = loss_terms(tuner.model, batch)
        found = {f"loss {n}": (term.share(output, one), term.count) for n, term in enumerate(terms)}
        for name, pair in (found | dict(example.metrics(output, batch))).items():
            both = torch.stack([torch.as_tensor(each).to(device).double() for each in pair])
            sums[name] = sums.get(name, 0) + both
    means = {}
    for name, both in sums.items():
        total, count = all_reduce(both, tuner.state.data).tolist()
        means[name] = total / count
    losses = [means.pop(name) for name in list(means) if name.startswith("loss ")]
    return {"loss": sum(losses), **means}


def _table(title: str, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    width = max(map(len, (title, *before)))
    rows = [f"{title:<{width}}  {'before':>8}  {'after':>8}"]
    rows += [f"{name:<{width}}  {before[name]:8.4f}  {after[name]:8.4f}" for name in before]
    return "\n".join(rows)
