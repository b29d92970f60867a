"""The runtime gives what one process gives, for every schedule, and runs exactly its table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from megatron.mpu.parallel_state import ParallelState
from megatron.mpu.topology import Topology
from megatron.pipeline.actions import Action, Kind, Schedule, parse_schedule
from megatron.pipeline.p2p import TensorSpec
from megatron.pipeline.runtime import PipelineRuntime
from megatron.pipeline.schedule import SCHEDULES, gpipe, make_schedule, one_f_one_b
from tests.distributed import distributed

ROWS, WIDTH, LAYERS = 3, 5, 4
SPEC = TensorSpec((ROWS, WIDTH), torch.float64)
INTERLEAVED = parse_schedule(
    """
    0F0 0F1 2F0 0F2 2F1 2F2 2B0 2B1 0B0 2B2 0B1 0B2
    1F0 1F1 3F0 3B0 1F2 3F1 3B1 1B0 3F2 3B2 1B1 1B2
    """
)
V_SHAPED = parse_schedule(
    """
    0F0 0F1 3F0 3B0 3F1 3B1 0B0 0B1
    1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1
    """
)


class Marked(torch.autograd.Function):
    """The identity, which says when the backward pass comes by."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mark: Callable[[], None]) -> torch.Tensor:
        ctx.mark = mark
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.mark()
        return gradients[0], None


class Layers(nn.Module):
    """Some layers of an MLP whose weights depend on the layers' numbers alone."""

    def __init__(self, numbers: Sequence[int], log: list[Action], stage: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in numbers)
        for number, parameter in zip(numbers, self.linears, strict=True):
            generator = torch.Generator().manual_seed(number)
            for weight in parameter.parameters():
                weight.data.normal_(generator=generator)
        self.log, self.stage = log, stage
        self.input: torch.Tensor | None = None

    def set_input_tensor(self, input_tensor: torch.Tensor) -> None:
        self.input = input_tensor

    def forward(self, batch: torch.Tensor, micro_batch: int) -> torch.Tensor:
        x = batch if self.stage == 0 else self.input
        assert x is not None
        self.log.append(Action(self.stage, Kind.FORWARD, micro_batch))
        backward = Action(self.stage, Kind.BACKWARD, micro_batch)
        for linear in self.linears:
            x = linear(x).tanh()
        return Marked.apply(x, lambda: self.log.append(backward))


def make_batches(micro_batches: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(micro_batches)
    shape = (micro_batches, ROWS, WIDTH)
    return list(torch.randn(shape, generator=generator, dtype=torch.float64))


class Rank:
    """One rank's chunks under a schedule, with the runtime that drives them."""

    def __init__(self, schedule: Schedule, state: ParallelState) -> None:
        self.log: list[Action] = []
        self.schedule = schedule
        self.table = schedule.ranks[state.pipeline.rank]
        self.stages = schedule.stages_of(state.pipeline.rank)
        each = LAYERS // schedule.num_stages
        self.numbers = {s: range(s * each, (s + 1) * each) for s in self.stages}
        self.chunks = [Layers(self.numbers[s], self.log, s) for s in self.stages]
        self.runtime = PipelineRuntime(self.chunks, schedule, state, self.step, SPEC)
        self.holds_last = schedule.num_stages - 1 in self.stages

    def step(
        self, chunk: Layers, batch: torch.Tensor, micro_batch: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = chunk(batch, micro_batch)
        if chunk.stage < self.schedule.num_stages - 1:
            return output, {}
        loss = output.square().sum() * (1 + micro_batch)
        return loss, {"loss": loss.detach(), "micro_batch": torch.tensor(micro_batch)}

    def check(self, losses: list[dict[str, torch.Tensor]], scale: float = 1.0) -> None:
        """Compare the losses and the gradients of one step with those of one process."""
        whole = Layers(range(LAYERS), [], 0)
        expected = []
        for i, batch in enumerate(make_batches(self.schedule.num_micro_batches)):
            loss = whole(batch, i).square().sum() * (1 + i)
            (scale * loss).backward()
            expected.append({"loss": loss.detach(), "micro_batch": torch.tensor(i)})
        torch.testing.assert_close(losses, expected if self.holds_last else [], rtol=0, atol=1e-12)
        for stage, chunk in zip(self.stages, self.chunks, strict=True):
            for number, linear in zip(self.numbers[stage], chunk.linears, strict=True):
                for ours, theirs in zip(
                    linear.parameters(), whole.linears[number].parameters(), strict=True
                ):
                    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def check_training(schedule: Schedule, state: ParallelState) -> None:
    rank = Rank(schedule, state)
    batches = make_batches(schedule.num_micro_batches)
    announced: list[tuple[int, Action]] = []

    def on_last_backward(index: int) -> None:
        left = [a for a in rank.table if a not in rank.log]
        announced.append((index, left[0]))

    losses = rank.runtime.run(iter(batches), on_last_backward=on_last_backward)
    rank.check(losses)
    assert rank.log == list(rank.table)
    last = {a.stage: a for a in rank.table if a.kind is Kind.BACKWARD}
    assert sorted(announced) == [(i, last[stage]) for i, stage in enumerate(rank.stages)]

    rank.log.clear()
    evaluated = rank.runtime.run(batches, forward_only=True, on_last_backward=on_last_backward)
    torch.testing.assert_close(evaluated, losses)
    assert rank.log == [a for a in rank.table if a.kind is Kind.FORWARD]
    assert len(announced) == len(rank.stages)

    for chunk in rank.chunks:
        chunk.zero_grad()
    rank.check(rank.runtime.run(batches, loss_scale=torch.tensor(1024.0)), scale=1024.0)


@distributed(2)
def test_two_stages_equal_one_process() -> None:
    state = ParallelState.create(Topology(2, pipeline=2))
    for name in SCHEDULES:
        for micro_batches in (1, 2, 5):
            check_training(make_schedule(name, 2, micro_batches), state)


@distributed(4)
def test_four_stages_equal_one_process() -> None:
    state = ParallelState.create(Topology(4, pipeline=4))
    for name in SCHEDULES:
        for micro_batches in (1, 2, 3, 4, 9):
            check_training(make_schedule(name, 4, micro_batches), state)


@distributed(4)
def test_two_pipelines_beside_each_other_equal_one_process() -> None:
    check_training(one_f_one_b(2, 3), ParallelState.create(Topology(4, pipeline=2)))


@distributed(2)
def test_several_chunks_per_rank_equal_one_process() -> None:
    state = ParallelState.create(Topology(2, pipeline=2))
    # Such stages also pass activations from rank 1 back to rank 0.
    forward, backward = dist.new_group([0, 1]), dist.new_group([0, 1])
    both_ways = replace(
        state,
        forward_edges={**state.forward_edges, (1, 0): forward},
        backward_edges={**state.backward_edges, (0, 1): backward},
    )
    for schedule in (INTERLEAVED, V_SHAPED):
        check_training(schedule, both_ways)


@distributed(2)
def test_a_schedule_over_an_edge_without_communicator_is_refused() -> None:
    state = replace(ParallelState.create(Topology(2, pipeline=2)), backward_edges={})
    with pytest.raises(ValueError, match="the schedule sends gradients from rank 1 to rank 0, for"):
        Rank(gpipe(2, 1), state)


@pytest.mark.parametrize(
    "schedule",
    [
        one_f_one_b(1, 1),
        gpipe(1, 3),
        one_f_one_b(1, 3),
        parse_schedule("0F0 1F0 0F1 1B0 1F1 0B0 1B1 0B1"),
    ],
    ids=str,
)
def test_one_rank_needs_no_communication(schedule: Schedule) -> None:
    check_training(schedule, ParallelState.single())


def test_evaluation_builds_no_graph() -> None:
    rank = Rank(one_f_one_b(1, 2), ParallelState.single())
    rank.runtime.run(make_batches(2), forward_only=True)
    assert all(p.grad is None for p in rank.chunks[0].parameters())


@distributed(2)
def test_a_sent_activation_is_freed_before_its_backward_pass() -> None:
    state = ParallelState.create(Topology(2, pipeline=2))
    rank = Rank(one_f_one_b(2, 4), state)
    stored: dict[int, StorageWeakRef] = {}
    alive: list[set[int]] = []

    def step(
        chunk: Layers, batch: torch.Tensor, micro_batch: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        alive.append({i for i, storage in stored.items() if not storage.expired()})
        output, parts = rank.step(chunk, batch, micro_batch)
        stored[micro_batch] = StorageWeakRef(output.untyped_storage())
        return output, parts

    PipelineRuntime(rank.chunks, rank.schedule, state, step, SPEC).run(make_batches(4))
    if state.rank == 0:  # runs 0F0 0F1 0B0 0F2 0B1 0F3 0B2 0B3
        assert alive == [set(), {0}, {1}, {2}]
        assert all(storage.expired() for storage in stored.values())


@distributed(2)
def test_half_precision_activations_travel() -> None:
    state = ParallelState.create(Topology(2, pipeline=2))
    for dtype in (torch.bfloat16, torch.float16):
        chunk = Layers([state.rank], [], state.rank).to(dtype)
        batches = [batch.to(dtype) for batch in make_batches(2)]

        def step(
            chunk: Layers, batch: torch.Tensor, micro_batch: int
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            output = chunk(batch, micro_batch)
            return (output.float().sum(), {}) if chunk.stage else (output, {})

        spec = TensorSpec((ROWS, WIDTH), dtype)
        PipelineRuntime([chunk], one_f_one_b(2, 2), state, step, spec).run(batches, loss_scale=8)
        assert all(p.grad is not None and p.grad.dtype == dtype for p in chunk.parameters())


@distributed(2)
def test_a_frozen_first_stage_is_left_alone() -> None:
    state = ParallelState.create(Topology(2, pipeline=2))
    rank = Rank(one_f_one_b(2, 2), state)
    if state.rank == 0:
        rank.chunks[0].requires_grad_(False)
    rank.runtime.run(make_batches(2))
    trained = [p.grad is not None for p in rank.chunks[0].parameters()]
    assert all(trained) if state.rank else not any(trained)


@distributed(2)
def test_an_activation_that_was_not_announced_is_refused_before_it_is_sent() -> None:
    state = ParallelState.create(Topology(2, pipeline=2))
    rank = Rank(gpipe(2, 1), state)
    if state.rank == 0:
        problem = (
            r"stage 0 made the activation of micro-batch 0 as torch.float64 \[1, 5\]; "
            r"the pipeline carries torch.float64 \[3, 5\]"
        )
        with pytest.raises(ValueError, match=problem):
            rank.runtime.run([torch.ones(1, WIDTH, dtype=torch.float64)])


def test_too_few_batches_are_refused() -> None:
    rank = Rank(gpipe(1, 3), ParallelState.single())
    with pytest.raises(ValueError, match="wants micro-batch 2, but there are only 2 batches"):
        rank.runtime.run(make_batches(2))


def test_no_more_batches_are_taken_than_needed() -> None:
    rank = Rank(gpipe(1, 2), ParallelState.single())
    batches = iter(make_batches(2) * 2)
    for _ in range(2):
        rank.runtime.run(batches)
    assert next(batches, None) is None


@pytest.mark.parametrize(
    ("schedule", "problem"),
    [
        (gpipe(2, 1), "the schedule is for 2 ranks, the pipeline has 1"),
        (parse_schedule("0F0 1F0 1B0 0B0"), "1 chunks given for the 2 stages of pipeline rank 0"),
        (parse_schedule("0F0 0B0 0W0"), "weight-gradient actions"),
        (parse_schedule("0B0 0F0"), "the schedule deadlocks"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(schedule: Schedule, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        PipelineRuntime(
            [Layers([0], [], 0)],
            schedule,
            ParallelState.single(),
            lambda *_: (torch.ones(()), {}),
            SPEC,
        )
