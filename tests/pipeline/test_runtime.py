"""The runtime gives what one process gives, for every schedule, and runs exactly its table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from megatron.mpu import ColumnParallelLinear
from megatron.mpu.deferral import current_deferral, outstanding
from megatron.mpu.init import zeros
from megatron.mpu.parallel_state import ParallelState
from megatron.mpu.topology import Topology
from megatron.pipeline.actions import Action, Kind, Schedule, parse_schedule
from megatron.pipeline.p2p import TensorSpec
from megatron.pipeline.runtime import PipelineRuntime
from megatron.pipeline.schedule import SCHEDULES, gpipe, make_schedule, one_f_one_b
from megatron.pipeline.simulator import Costs
from tests.distributed import distributed

ROWS, WIDTH, LAYERS = 3, 5, 12
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
        self.linears = nn.ModuleList(
            ColumnParallelLinear(
                WIDTH,
                WIDTH,
                name=f"layers.{number}",
                state=ParallelState.single(),
                init_method=zeros,
                dtype=torch.float64,
            )
            for number in numbers
        )
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
        for linear in self.linears:
            x = linear(x).tanh()
        return Marked.apply(x, lambda: self._note_backward(micro_batch))

    def _note_backward(self, micro_batch: int) -> None:
        self.log.append(Action(self.stage, Kind.BACKWARD, micro_batch))
        if (deferred := current_deferral()) is not None:
            first = nn.Parameter(torch.zeros(()))
            deferred.add(first, lambda: self._note_weight(micro_batch))

    def _note_weight(self, micro_batch: int) -> None:
        assert all(outstanding(linear.weight) > 0 for linear in self.linears)
        self.log.append(Action(self.stage, Kind.WEIGHT, micro_batch))


def make_batches(micro_batches: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(micro_batches)
    shape = (micro_batches, ROWS, WIDTH)
    return list(torch.randn(shape, generator=generator, dtype=torch.float64))


class Rank:
    """One rank's chunks under a plan, with the runtime that drives them."""

    def __init__(self, plan: Callable[[int], Schedule], state: ParallelState) -> None:
        self.log: list[Action] = []
        schedule = plan(1)
        self.last_stage = schedule.num_stages - 1
        self.stages = schedule.stages_of(state.pipeline.rank)
        bounds = [LAYERS * s // schedule.num_stages for s in range(schedule.num_stages + 1)]
        self.numbers = {s: range(bounds[s], bounds[s + 1]) for s in self.stages}
        self.chunks = [Layers(self.numbers[s], self.log, s) for s in self.stages]
        self.runtime = PipelineRuntime(self.chunks, plan, state, self.step, lambda stage: SPEC)

    def step(
        self, chunk: Layers, batch: torch.Tensor, micro_batch: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = chunk(batch, micro_batch)
        if chunk.stage < self.last_stage:
            return output, {}
        loss = output.square().sum() * (1 + micro_batch)
        return loss, {"loss": loss.detach(), "micro_batch": torch.tensor(micro_batch)}

    def check(
        self, losses: list[dict[str, torch.Tensor]], batches: list[torch.Tensor], scale: float = 1.0
    ) -> None:
        """Compare the losses and the gradients of one step with those of one process."""
        whole = Layers(range(LAYERS), [], 0)
        expected = []
        for i, batch in enumerate(batches):
            loss = whole(batch, i).square().sum() * (1 + i)
            (scale * loss).backward()
            expected.append({"loss": loss.detach(), "micro_batch": torch.tensor(i)})
        torch.testing.assert_close(
            losses, expected if self.last_stage in self.stages else [], rtol=0, atol=1e-12
        )
        for stage, chunk in zip(self.stages, self.chunks, strict=True):
            for number, linear in zip(self.numbers[stage], chunk.linears, strict=True):
                for ours, theirs in zip(
                    linear.parameters(), whole.linears[number].parameters(), strict=True
                ):
                    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def check_training(schedule: Schedule, state: ParallelState) -> None:
    rank = Rank(lambda _: schedule, state)
    table = schedule.ranks[state.pipeline.rank]
    batches = make_batches(schedule.num_micro_batches)
    announced: list[tuple[int, Action]] = []

    def on_last_backward(index: int) -> None:
        announced.append((index, table[len(rank.log)]))

    losses = rank.runtime.run(batches, on_last_backward=on_last_backward)
    rank.check(losses, batches)
    assert rank.log == list(table)
    last = {a.stage: a for a in table if a.kind is Kind.BACKWARD}
    assert sorted(announced) == [(i, last[stage]) for i, stage in enumerate(rank.stages)]

    rank.log.clear()
    evaluated = rank.runtime.run(batches, forward_only=True, on_last_backward=on_last_backward)
    torch.testing.assert_close(evaluated, losses)
    assert rank.log == [a for a in table if a.kind is Kind.FORWARD]
    assert len(announced) == len(rank.stages)

    for chunk in rank.chunks:
        chunk.zero_grad()
    losses = rank.runtime.run(batches, loss_scale=torch.tensor(1024.0))
    rank.check(losses, batches, scale=1024.0)
    rank.runtime.finish()


def every_schedule(ranks: int, micro_batches: int) -> list[Schedule]:
    slow_messages = Costs(1, 1.2, 0.7, 0.4, retained=0.5)
    return [
        make_schedule(name, ranks, micro_batches, virtual=virtual, costs=costs)
        for name in SCHEDULES
        for virtual in ((1, 2, 3) if name == "interleaved" else (1,))
        for costs in ((None, slow_messages) if name in ("interleaved", "zb-2p") else (None,))
    ]


@distributed(2)
def test_two_ranks_equal_one_process() -> None:
    state = ParallelState.create(Topology(2, pipeline=2))
    for micro_batches in (1, 2, 5):
        for schedule in every_schedule(2, micro_batches):
            check_training(schedule, state)


@distributed(4)
def test_four_ranks_equal_one_process() -> None:
    state = ParallelState.create(Topology(4, pipeline=4))
    for micro_batches in (1, 3, 4, 9):
        for schedule in every_schedule(4, micro_batches):
            check_training(schedule, state)


@distributed(4)
def test_two_pipelines_beside_each_other_equal_one_process() -> None:
    check_training(one_f_one_b(2, 3), ParallelState.create(Topology(4, pipeline=2)))


@distributed(2)
def test_any_placement_of_chunks_equals_one_process() -> None:
    state = ParallelState.create(Topology(2, pipeline=2))
    for schedule in (INTERLEAVED, V_SHAPED):
        check_training(schedule, state)


@distributed(4)
def test_steps_of_any_number_of_micro_batches_follow_one_another() -> None:
    state = ParallelState.create(Topology(4, pipeline=4))
    for plan in (
        partial(make_schedule, "zb-2p", 4),
        partial(make_schedule, "interleaved", 4, virtual=2),
    ):
        rank = Rank(plan, state)
        for micro_batches in (5, 1, 2, 9, 5):
            batches = make_batches(micro_batches)
            for chunk in rank.chunks:
                chunk.zero_grad()
            rank.runtime.run(batches[:1], forward_only=True)
            rank.log.clear()
            rank.check(rank.runtime.run(batches), batches)
            assert rank.log == list(plan(micro_batches).ranks[state.pipeline.rank])
        rank.runtime.finish()


@distributed(4)
def test_gradients_do_not_depend_on_the_schedule() -> None:
    state = ParallelState.create(Topology(4, pipeline=4))
    rank = Rank(partial(make_schedule, "gpipe", 4), state)
    found = []
    for name in ("gpipe", "1f1b", "zb-h1", "zb-2p"):
        rank.runtime.replan(partial(make_schedule, name, 4))
        rank.chunks[0].zero_grad()
        rank.runtime.run(make_batches(7))
        found.append([p.grad for p in rank.chunks[0].parameters()])
    rank.runtime.finish()
    for gradients in found[1:]:
        torch.testing.assert_close(gradients, found[0], rtol=0, atol=0)


class Grow(nn.Module):
    """Adds a row of its parameter to the rows that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.ones(1, WIDTH, dtype=torch.float64))
        self.input: torch.Tensor | None = None

    def set_input_tensor(self, input_tensor: torch.Tensor) -> None:
        self.input = input_tensor

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.cat([batch if self.input is None else self.input, self.row])


@distributed(4)
def test_stages_may_send_tensors_of_different_shapes() -> None:
    state = ParallelState.create(Topology(4, pipeline=4))

    def step(
        chunk: Grow, batch: torch.Tensor, micro_batch: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = chunk(batch)
        weights = torch.arange(1.0, len(output) + 1, dtype=torch.float64)
        return ((weights @ output).sum() if state.rank == 3 else output), {}

    def activation(stage: int) -> TensorSpec:
        return TensorSpec((ROWS + stage + 1, WIDTH), torch.float64)

    chunk = Grow()
    plan = partial(make_schedule, "zb-h1", 4)
    runtime = PipelineRuntime([chunk], plan, state, step, activation)
    runtime.run(make_batches(3))
    runtime.finish()
    assert chunk.row.grad is not None
    assert chunk.row.grad.tolist() == [[3.0 * (ROWS + state.rank + 1)] * WIDTH]


@distributed(2)
def test_a_rank_does_not_wait_for_what_it_has_sent_last() -> None:
    state = ParallelState.create(Topology(2, pipeline=2))
    rank = Rank(partial(one_f_one_b, 2), state)
    batches = make_batches(1)
    # The second rank opens no receive before the first has left its step.
    if state.rank == 0:
        rank.runtime.run(batches, forward_only=True)
    dist.barrier()
    if state.rank == 1:
        rank.runtime.run(batches, forward_only=True)
    rank.check(rank.runtime.run(batches), batches)
    rank.runtime.finish()


@pytest.mark.parametrize(
    ("name", "kinds"), [("1f1b", {"F", "B"}), ("zb-h1", {"F", "B", "W"}), ("zb-2p", set("FBW"))]
)
def test_durations_are_measured_where_asked_for(name: str, kinds: set[str]) -> None:
    rank = Rank(partial(make_schedule, name, 1), ParallelState.single())
    rank.runtime.run(make_batches(2))
    with rank.runtime.measure() as durations:
        assert durations.means() == {}
        rank.runtime.run(make_batches(3))
    rank.runtime.run(make_batches(2))
    means = durations.means()
    assert set(means) == kinds
    assert all(seconds > 0 for seconds in means.values())
    assert durations.means() == {}


@distributed(2)
def test_a_schedule_over_an_edge_without_communicator_is_refused() -> None:
    state = replace(ParallelState.create(Topology(2, pipeline=2)), backward_edges={})
    with pytest.raises(ValueError, match="the schedule sends gradients from rank 1 to rank 0, for"):
        Rank(partial(gpipe, 2), state)


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
    rank = Rank(partial(one_f_one_b, 1), ParallelState.single())
    rank.runtime.run(make_batches(2), forward_only=True)
    assert all(p.grad is None for p in rank.chunks[0].parameters())


@distributed(2)
def test_a_sent_activation_is_freed_before_its_backward_pass() -> None:
    state = ParallelState.create(Topology(2, pipeline=2))
    plan = partial(one_f_one_b, 2)
    rank = Rank(plan, state)
    stored: dict[int, StorageWeakRef] = {}
    alive: list[set[int]] = []

    def step(
        chunk: Layers, batch: torch.Tensor, micro_batch: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        alive.append({i for i, storage in stored.items() if not storage.expired()})
        output, parts = rank.step(chunk, batch, micro_batch)
        stored[micro_batch] = StorageWeakRef(output.untyped_storage())
        return output, parts

    runtime = PipelineRuntime(rank.chunks, plan, state, step, lambda stage: SPEC)
    runtime.run(make_batches(4))
    runtime.finish()
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
        runtime = PipelineRuntime([chunk], partial(one_f_one_b, 2), state, step, lambda _: spec)  # noqa: B023
        runtime.run(batches, loss_scale=8)
        runtime.finish()
        assert all(p.grad is not None and p.grad.dtype == dtype for p in chunk.parameters())


@distributed(2)
def test_a_frozen_first_stage_is_left_alone() -> None:
    state = ParallelState.create(Topology(2, pipeline=2))
    rank = Rank(partial(make_schedule, "zb-2p", 2), state)
    if state.rank == 0:
        rank.chunks[0].requires_grad_(False)
    rank.runtime.run(make_batches(2))
    rank.runtime.finish()
    trained = [p.grad is not None for p in rank.chunks[0].parameters()]
    assert all(trained) if state.rank else not any(trained)


@distributed(2)
def test_an_activation_that_was_not_announced_is_refused_before_it_is_sent() -> None:
    state = ParallelState.create(Topology(2, pipeline=2))
    rank = Rank(partial(gpipe, 2), state)
    if state.rank == 0:
        problem = (
            r"stage 0 made the activation of micro-batch 0 as torch.float64 \[1, 5\]; "
            r"the pipeline carries torch.float64 \[3, 5\]"
        )
        with pytest.raises(ValueError, match=problem):
            rank.runtime.run([torch.ones(1, WIDTH, dtype=torch.float64)])


@pytest.mark.parametrize(
    ("schedule", "problem"),
    [
        (gpipe(2, 1), "the schedule is for 2 ranks, the pipeline has 1"),
        (parse_schedule("0F0 1F0 1B0 0B0"), "1 chunks given for the 2 stages of pipeline rank 0"),
        (parse_schedule("0B0 0F0"), "the schedule deadlocks"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(schedule: Schedule, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        PipelineRuntime(
            [Layers([0], [], 0)],
            lambda _: schedule,
            ParallelState.single(),
            lambda *_: (torch.ones(()), {}),
            lambda stage: SPEC,
        )


def test_a_plan_that_does_not_keep_its_word_is_refused() -> None:
    rank = Rank(lambda _: gpipe(1, 2), ParallelState.single())
    with pytest.raises(ValueError, match="the plan for 3 micro-batches has 2"):
        rank.runtime.run(make_batches(3))
