"""Bytes on the wire: what the algorithms need, and no collective more.

An all-reduce of n bytes on t ranks counts as 2 n (t - 1) / t sent by each, as around a ring; gloo's
all-gathers and reduce-scatters are direct messages (`megatron.mpu.direct`) and are counted as such.

Letters: s sequence, d decoder's sequence, b micro-batch, h hidden, t tensor size.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron.model import build_gpt, build_t5
from megatron.mpu import ParallelState, Topology
from megatron.mpu.stage import encoder_decoder_stages, stages
from megatron.optimizer.layout import BUCKET_MULTIPLE
from tests.distributed import run_distributed
from tests.parity.runs import BASE, Case, new_trainer, own_batches
from tests.parity.wire import Call, recorded

S, B, H = BASE["seq_length"], BASE["micro_batch_size"], BASE["hidden_size"]
D = 16  # the decoder's sequence of the network "t5"
WORD = 8  # bytes of float64


# ---------------------------------------------------------------------------------------- layers


def _calls_of_a_layer(network: str, tensor: int, flags: dict[str, Any]) -> Counter[Call]:
    """What one layer more costs in the forward and the backward pass of a micro-batch."""
    state = ParallelState.create(Topology(tensor, tensor=tensor))
    frozen = flags.pop("frozen", False)

    def calls(layers: int) -> Counter[Call]:
        case = Case.of(network, tensor, tensor_model_parallel_size=tensor, **flags)
        model = _model(case, layers, state)
        model.train().requires_grad_(not frozen)
        # Where all weights are frozen, something has to want a gradient.
        model.language_model.embedding.word_embeddings.weight.requires_grad_()
        tokens = torch.ones(B, S, dtype=torch.int64)
        if network == "t5":
            target = torch.ones(B, D, dtype=torch.int64)
            inputs = (tokens, target, tokens.bool()), {"lm_labels": target}
        else:
            inputs = (tokens,), {"labels": tokens}
        with recorded() as made:
            model(*inputs[0], **inputs[1]).sum().backward()
        return made

    fewer, more = calls(2), calls(3)
    assert not fewer - more
    return more - fewer


def _model(case: Case, layers: int, state: ParallelState) -> Any:
    """The network with so many layers, in the decoder where it has one."""
    if case.network == "t5":
        (stage,) = encoder_decoder_stages([2], [layers], split=0)
        return build_t5(case.config(), state, stage)
    return build_gpt(case.config(), state, stages([layers])[0])


def _sent(calls: Counter[Call]) -> float:
    return sum(call.sent * count for call, count in calls.items())


SPLIT = {"sequence_parallel": True}


@pytest.mark.parametrize("network", ["gpt", "llama"])
@pytest.mark.parametrize("tensor", [2, 4])
def test_a_layer_reduces_twice_in_each_direction(network: str, tensor: int) -> None:
    whole = S * B * H * WORD
    everyone = tuple(range(tensor))
    for calls in run_distributed(tensor, _calls_of_a_layer, network, tensor, {}):
        assert calls == {Call("allreduce", everyone, whole): 4}
        assert _sent(calls) == 8 * whole * (tensor - 1) / tensor


@pytest.mark.parametrize("network", ["gpt", "llama"])
@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_split_sequence_costs_no_more(network: str, tensor: int, frozen: bool) -> None:
    """Plus the inputs of the two column-parallel layers, gathered again for the weights' sake."""
    whole = S * B * H * WORD
    everyone = tuple(range(tensor))
    flags = SPLIT | {"frozen": frozen}
    exchanges = 8 if frozen else 8 + 2
    for calls in run_distributed(tensor, _calls_of_a_layer, network, tensor, flags):
        part = Call("send", everyone, whole // tensor)
        messages = exchanges * (tensor - 1)
        assert calls == {part: messages, part._replace(kind="recv"): messages}
        assert _sent(calls) == exchanges * whole * (tensor - 1) / tensor


@pytest.mark.parametrize(
    ("flags", "reduced", "gathered"),
    [
        ({"recompute_granularity": "selective"}, 4, 0),
        ({"recompute_granularity": "full"}, 6, 0),
        ({"recompute_granularity": "full", "distribute_saved_activations": True}, 6, 1),
    ],
)
def test_recomputing_a_layer_repeats_its_forward_pass(
    flags: dict[str, Any], reduced: int, gathered: int
) -> None:
    whole = S * B * H * WORD
    for calls in run_distributed(2, _calls_of_a_layer, "gpt", 2, flags):
        part = Call("send", (0, 1), whole // 2)
        expected = Counter({Call("allreduce", (0, 1), whole): reduced})
        expected += Counter({part: gathered, part._replace(kind="recv"): gathered})
        assert calls == expected


def test_a_decoders_layer_reduces_for_each_of_its_three_blocks() -> None:
    """And once more, for the gradient of the encoder's output."""
    own, encoders = D * B * H * WORD, S * B * H * WORD
    for calls in run_distributed(2, _calls_of_a_layer, "t5", 2, {}):
        assert calls == {
            Call("allreduce", (0, 1), own): 6,
            Call("allreduce", (0, 1), encoders): 1,
        }


# ----------------------------------------------------------------------------------------- steps

MICRO_BATCHES = 3
LAYOUT = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "micro_batch_size": B,
    "global_batch_size": 2 * MICRO_BATCHES * B,
    "gradient_bucket_size": 10**6,
    "clip_grad": 1.0,
}


@dataclass(frozen=True)
class Observed:
    """What one rank did in a step, and what it holds.

    Attributes:
        stages: numbers of its stages; layers: of all of them together.
        buffers: sizes of its buffers in elements, by whether their gradients are summed over the
            tensor ranks and whether over the stages.
    """

    calls: Counter[Call]
    groups: dict[str, tuple[int, ...]]
    stages: list[int]
    layers: int
    buffers: list[tuple[int, bool, bool]]
    parameters: int


def _step_rank(case: Case) -> Observed:
    trainer = new_trainer(case)
    state, size = trainer.state, trainer.ramp.full
    first, second = (own_batches(case, step, size, state.data.rank) for step in range(2))
    trainer.step(first)
    trainer.optimizer.finish_gather()
    with recorded() as calls:
        trainer.step(second)
        trainer.optimizer.finish_gather()
    trainer.finish()
    gradients = trainer.optimizer.gradients
    places = {p.data_ptr(): p.numel() for b in gradients.buffers for p in b.parameters}
    axes = {name: getattr(state, name) for name in ("tensor", "pipeline", "data", "model")}
    return Observed(
        calls,
        {name: axis.ranks for name, axis in axes.items()},
        [chunk.stage.index for chunk in trainer.chunks],
        sum(chunk.stage.num_layers + chunk.stage.num_decoder_layers for chunk in trainer.chunks),
        [
            (b.values.numel(), b.traits.partial, b.traits.shared in gradients.shared)
            for b in gradients.buffers
        ],
        sum(places.values()),
    )


def _expected(seen: Observed, stages: int, *, split: bool, sharded: bool) -> Counter[Call]:
    """All calls of a step of GPT on this rank."""
    tensor, data, pair = (seen.groups[name] for name in ("tensor", "data", "pipeline"))
    model = tuple(range(8)) if sharded else seen.groups["model"]
    whole, micro_batches = S * B * H * WORD, MICRO_BATCHES
    expected = Counter({Call("allreduce", data, WORD): 1})  # how many tokens there are
    expected[Call("allreduce", model, WORD)] += 1  # the norm of the gradient
    is_first, is_last = 0 in seen.stages, stages - 1 in seen.stages

    # A step's activations and gradients, to and from the other rank of the pipeline.
    activation = whole // len(tensor) if split else whole
    boundaries = sum((index > 0) + (index < stages - 1) for index in seen.stages)
    expected += _both_ways(pair, activation, micro_batches * boundaries)
    if not split:
        # Where the embeddings of the vocabulary's parts add up, and where their logits' gradients.
        reduced = 4 * seen.layers + is_first + is_last
        expected[Call("allreduce", tensor, whole)] += micro_batches * reduced
    else:
        # Embeddings: scattered, their gradient gathered; logits: gathered twice, scattered.
        exchanges = 10 * seen.layers + 2 * is_first + 3 * is_last
        expected += _both_ways(tensor, whole // len(tensor), micro_batches * exchanges)
    if is_last:  # the largest logit; the sum of the exponentials and the target's logit
        expected[Call("allreduce", tensor, S * B * WORD)] += micro_batches
        expected[Call("allreduce", tensor, 2 * S * B * WORD)] += micro_batches
    shards = len(data) if sharded else 1
    for size, _, _ in seen.buffers:
        if sharded:  # gradients scattered, parameters gathered
            expected += _both_ways(data, size // shards * WORD, 2)
        else:
            expected[Call("allreduce", data, size * WORD)] += 1
    # Gradients of what several tensor ranks or both ends of the pipeline hold go together.
    for ranks, sizes in (
        (tensor, [size for size, partial, _ in seen.buffers if partial]),
        (pair, [size for size, _, shared in seen.buffers if shared]),
    ):
        if sizes:
            expected[Call("allreduce", ranks, sum(sizes) // shards * WORD)] += 1
    return expected


def _both_ways(ranks: tuple[int, ...], size: int, count: int) -> Counter[Call]:
    return Counter({Call(kind, ranks, size): count for kind in ("send", "recv")})


@pytest.mark.parametrize(
    ("split", "sharded", "virtual"),
    [(False, False, False), (True, True, False), (True, False, True), (False, True, True)],
)
def test_a_step_makes_these_calls_and_no_others(split: bool, sharded: bool, virtual: bool) -> None:
    case = Case.of(
        "gpt",
        8,
        **LAYOUT,
        sequence_parallel=split,
        use_distributed_optimizer=sharded,
        pipeline_schedule="interleaved" if virtual else "1f1b",
        pipeline_layers=(1, 2, 1, 1) if virtual else (2, 3),
    )
    for seen in run_distributed(8, _step_rank, case):
        expected = _expected(seen, stages=4 if virtual else 2, split=split, sharded=sharded)
        assert seen.calls == expected
        # Each gradient goes over the wire once: a buffer is filled up, but by little.
        filled_up = sum(size for size, _, _ in seen.buffers) - seen.parameters
        assert 0 <= filled_up < 2 * BUCKET_MULTIPLE * len(seen.buffers)


def test_through_a_decoder_both_sequences_travel() -> None:
    case = Case.of(
        "t5",
        4,
        pipeline_model_parallel_size=4,
        pipeline_model_parallel_split_rank=2,
        pipeline_layers=(2, 1, 1, 1),
        micro_batch_size=B,
        global_batch_size=MICRO_BATCHES * B,
    )
    for rank, seen in enumerate(run_distributed(4, _step_rank, case)):
        messages = Counter(
            {call: n for call, n in seen.calls.items() if call.kind in ("send", "recv")}
        )
        # The stages 0 and 1 are the encoder's; the last one of it sends what it has made alone.
        rows = {(0, 1): S, (1, 2): S, (2, 3): S + D}
        expected: Counter[Call] = Counter()
        for boundary, length in rows.items():
            if rank in boundary:
                expected += _both_ways(boundary, length * B * H * WORD, MICRO_BATCHES)
        assert messages == expected
