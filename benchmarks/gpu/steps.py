"""A step of training by each contestant, on one GPU.

    megatron       this project, as its loop calls it
    transformers   its BERT or GPT-2 with PyTorch's fused attention and fused AdamW, compiled
    plain          a GPT in plain PyTorch with the same, compiled
    product        no model: a product of two matrices, the limit of them all

The peers hold weights and moments in bfloat16 and run under autocast, the fastest way that their
users have; this project holds float32 masters and float32 moments besides.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.machine import MATRIX, products
from benchmarks.gpu.measuring import first_line
from benchmarks.gpu.models import TASKS, Training, batches, configuration
from benchmarks.peers import AbsentError
from benchmarks.peers.plain_gpt import PlainGPT, mean_loss
from benchmarks.peers.sizes import STD, Sizes
from benchmarks.peers.updates import Update
from megatron.training.initialize import initialize, let_segments_expand
from megatron.training.task import Batch
from megatron.training.trainer import Trainer

Step = Callable[[], Tensor]
FIRST_STEPS = 4  # in which everything is compiled, recorded and allocated
IGNORED = -100  # a label that `transformers` leaves out of the loss


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A contestant: whose step of what, on which device, and this project's flags."""

    contestant: str
    training: Training
    device_type: str
    kernels: str = "torch"
    cuda_graphs: bool = False
    packed: bool = False

    @property
    def title(self) -> str:
        """For the report."""
        if self.contestant != "megatron":
            return self.contestant
        options = {"CUDA graphs": self.cuda_graphs, "packed": self.packed}
        chosen = [words for words, is_chosen in options.items() if is_chosen]
        return ", ".join(["megatron", f"kernels {self.kernels}", *chosen])


def serve(pipe: Connection, spec: Spec) -> None:
    """The process of a contestant: builds when told to, then runs as many steps as it is asked for.

    Answers with {"losses": of the first steps, "seconds": of the last of them, "peak": bytes} or
    {"absent": why}, then with {"seconds": of a step, "peak": bytes}. Ends when the other side does.
    """
    device = torch.device(spec.device_type)
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        pipe.recv()
        let_segments_expand(device)
        step = BUILDERS[spec.contestant](spec)
        losses = []
        for _ in range(FIRST_STEPS):
            start = time.perf_counter()
            losses.append(float(step()))
        seconds = time.perf_counter() - start
        pipe.send({"losses": losses, "seconds": seconds, "peak": _peak(spec.device_type)})
        while True:
            pipe.send(burst(step, pipe.recv(), spec.device_type))
    except EOFError:
        return
    except Exception as error:  # whatever a framework raises; it is reported
        traceback.print_exc()
        pipe.send({"absent": first_line(error)})


def burst(step: Step, count: int, device_type: str) -> dict[str, float]:
    """Times `count` steps behind one that does not count: it takes back the memory given up."""
    step()
    _synchronize(device_type)
    start = time.perf_counter()
    for _ in range(count):
        step()
    _synchronize(device_type)
    seconds = (time.perf_counter() - start) / count
    return {"seconds": seconds, "peak": _peak(device_type)}


def _synchronize(device_type: str) -> None:
    if device_type == "cuda":
        torch.cuda.synchronize()


def _peak(device_type: str) -> int:
    """Bytes that were taken at most; gives back to the others what is free of them."""
    if device_type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.max_memory_reserved()


def megatron(spec: Spec) -> Step:
    """This project."""
    config = configuration(
        spec.training,
        kernels=spec.kernels,
        device_type=spec.device_type,
        cuda_graphs=spec.cuda_graphs,
        packed=spec.packed,
    )
    trainer = Trainer(config, TASKS[spec.training.kind](config), initialize(config))
    made = [_pinned(batch, spec.device_type) for batch in batches(spec.training, config)]
    return lambda: trainer.step(made).parts.sum()


def _pinned(batch: Batch, device_type: str) -> Batch:
    """As the loader hands batches over."""
    if device_type != "cuda":
        return batch
    return {name: field.pin_memory() for name, field in batch.items()}


def transformers(spec: Spec) -> Step:
    """BERT or GPT-2 of `transformers`."""
    try:
        from transformers import (
            BertConfig,
            BertForPreTraining,
            GPT2Config,
            GPT2LMHeadModel,
        )
    except ImportError as error:
        raise AbsentError(f"transformers does not import: {error}") from error
    sizes = spec.training
    model: nn.Module
    with torch.device(spec.device_type):
        if sizes.kind == "bert":
            model = BertForPreTraining(
                BertConfig(
                    vocab_size=sizes.vocabulary,
                    hidden_size=sizes.hidden,
                    num_hidden_layers=sizes.layers,
                    num_attention_heads=sizes.heads,
                    intermediate_size=4 * sizes.hidden,
                    max_position_embeddings=sizes.sequence,
                    hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                )
            )
        else:
            model = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=sizes.vocabulary,
                    n_positions=sizes.sequence,
                    n_embd=sizes.hidden,
                    n_layer=sizes.layers,
                    n_head=sizes.heads,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                    resid_pdrop=0.0,
                    use_cache=False,
                )
            )
    model.set_attn_implementation("sdpa")
    inputs = [_labelled(batch, sizes) for batch in _own_batches(spec)]
    return _loop(spec, model, lambda fields: model(**fields).loss, inputs)


def _labelled(batch: Batch, sizes: Training) -> Batch:
    """The batch as `transformers` wants it; GPT-2 shifts the labels by itself."""
    if sizes.kind == "gpt":
        tokens = batch["tokens"][:, :-1].contiguous()
        return {"input_ids": tokens, "labels": tokens}
    labels = torch.full_like(batch["input_ids"], IGNORED)
    # No token is padding; given no mask, it takes the fastest attention that there is.
    return {
        "input_ids": batch["input_ids"],
        "token_type_ids": batch["tokentype_ids"],
        "labels": labels.scatter(1, batch["masked_positions"], batch["masked_labels"]),
        "next_sentence_label": batch["is_random"],
    }


def plain(spec: Spec) -> Step:
    """The GPT in plain PyTorch."""
    training = spec.training
    sizes = _Unfilled(
        hidden=training.hidden,
        layers=training.layers,
        heads=training.heads,
        sequence=training.sequence,
        vocabulary=training.vocabulary,
        batch=training.micro_batch * training.micro_batches,
        micro_batches=training.micro_batches,
    )
    with torch.device(spec.device_type):
        model = PlainGPT(sizes, range(sizes.layers))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=STD)

    def loss(tokens: Tensor) -> Tensor:
        return mean_loss(model(tokens[:, :-1]), tokens[:, 1:])

    return _loop(spec, model, loss, [batch["tokens"] for batch in _own_batches(spec)])


class _Unfilled(Sizes):
    """Sizes without weights that all contestants share: here nobody compares losses."""

    @property
    def weights(self) -> dict[str, Tensor]:
        return {}


def _own_batches(spec: Spec) -> list[Batch]:
    """The micro-batches on the device."""
    config = configuration(spec.training, kernels="torch", device_type=spec.device_type)
    return [
        {name: field.to(spec.device_type) for name, field in batch.items()}
        for batch in batches(spec.training, config)
    ]


def _loop(
    spec: Spec, model: nn.Module, loss: Callable[[Any], Tensor], inputs: Sequence[Any]
) -> Step:
    """The usual loop over micro-batches, with clipping and the fused AdamW."""
    device = torch.device(spec.device_type)
    model.to(device, torch.bfloat16).train()
    if device.type == "cuda":
        loss = torch.compile(loss)
    update = Update(model.parameters())

    def step() -> Tensor:
        total = torch.zeros((), device=device)
        for each in inputs:
            with torch.autocast(device.type, torch.bfloat16):
                part = loss(each) / len(inputs)
            part.backward()
            total += part.detach()
        update()
        return total

    return step


def product(spec: Spec) -> Step:
    """A product of two matrices."""
    size = MATRIX if spec.device_type == "cuda" else 64
    actions = products(size, spec.device_type)

    def step() -> Tensor:
        for action in actions:
            made: Tensor = action()
        return made[0, 0]

    return step


PRODUCTS = 2  # of a step of `product`

BUILDERS: dict[str, Callable[[Spec], Step]] = {
    "megatron": megatron,
    "transformers": transformers,
    "plain": plain,
    "product": product,
}
