"""Interleaved 1F1B (arXiv 2104.04473 section 2.3): each rank holds several chunks of the model.

With `p` ranks and `v` chunks per rank, stage `s` is on rank `s % p`: a micro-batch goes round the
ring of ranks `v` times. Micro-batches travel in groups of `p`, which all pass a rank's chunk before
the next chunk's turn comes, so that a micro-batch comes round just when its turn does. The pipeline
then fills in `p - 1` passes of a chunk, each `1 / v` of a stage's, and the bubble shrinks by `v`.

Rank `r` runs `2 (p - r - 1) + (v - 1) p` forward passes and then forward and backward in turn. It
holds one more than that, `p v + p - 1` on the first rank, counted in passes of a chunk.

**Any number of micro-batches.** A table for the next multiple of `p` serves for fewer: the passes
of the micro-batches that do not exist are taken out. What is left keeps its order, so it deadlocks
as little and holds no more. It is not the fastest, since ranks then wait for the small last group.
Somewhat larger groups, which share the surplus, mostly leave no more than the bubble of full ones.

**Messages that take time** make a group come round late: `p` passes take `p F / v`, the way round
`p (F / v + communication)`. In the steady state that does not matter, but while the pipeline fills
and drains ranks wait. A first and a last group that are larger by as many micro-batches as close
the gap avoid it.

Tables with other groups are played out (`megatron.pipeline.list_scheduler`) and the fastest is
taken. All ranks may then hold the `p v + p - 1` that the first rank holds anyway.

This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, product
from math import ceil

from megatron.pipeline.actions import Action, Kind, Schedule
from megatron.pipeline.list_scheduler import Order, Orders, play
from megatron.pipeline.simulator import Costs, PerStage, simulate


def interleaved(
    ranks: int, micro_batches: int, virtual: int = 1, costs: Costs | None = None
) -> Schedule:
    """Interleaved 1F1B with `virtual` chunks on each of `ranks` ranks.

    Args:
        ranks: length of the pipeline.
        micro_batches: of a step, any number.
        virtual: chunks per rank.
        costs: of one chunk, to choose the groups by; 1, 1, 1 and free messages by default.

    Raises:
        ValueError: there is no rank, chunk or micro-batch, or the costs do not fit the stages.
    """
    costs = costs or Costs(1, 1, 1)
    per_stage = costs.per_stage(ranks * virtual)
    best = _in_turns(ranks, micro_batches, virtual)
    others = _other_groups(ranks, micro_batches, per_stage)
    if not others:
        return best
    least = simulate(best, costs).cost
    limits = [ranks * virtual + ranks - 1] * ranks
    for sizes in others:
        orders = Orders(
            best.placement,
            tuple(_order(rank, ranks, range(virtual), sizes) for rank in range(ranks)),
            tuple(_order(rank, ranks, range(virtual)[::-1], sizes) for rank in range(ranks)),
            split=False,
        )
        played = play(orders, per_stage, limits)
        if played is not None and played.cost < least:
            best, least = played.schedule, played.cost
    return best


def _in_turns(ranks: int, micro_batches: int, virtual: int) -> Schedule:
    """The table of full groups without the micro-batches that do not exist."""
    sizes = [ranks] * ceil(micro_batches / ranks)
    tables = []
    for rank in range(ranks):
        forward, backward = (
            [Action(stage, kind, i) for stage, i in _order(rank, ranks, chunks, sizes)]
            for kind, chunks in (
                (Kind.FORWARD, range(virtual)),
                (Kind.BACKWARD, range(virtual)[::-1]),
            )
        )
        ahead = min(2 * (ranks - rank - 1) + (virtual - 1) * ranks, len(forward) - 1)
        turns = chain.from_iterable(zip(forward[ahead:], backward, strict=False))
        table = (*forward[:ahead], *turns, *backward[len(forward) - ahead :])
        tables.append(tuple(a for a in table if a.micro_batch < micro_batches))
    return Schedule(tuple(tables), placement=tuple(range(ranks)) * virtual)


def _order(rank: int, ranks: int, chunks: Sequence[int], sizes: Sequence[int]) -> Order:
    """A rank's passes in one direction: group by group, in each chunk by chunk."""
    order: list[tuple[int, int]] = []
    first = 0
    for size in sizes:
        group = range(first, first + size)
        order += [(chunk * ranks + rank, i) for chunk, i in product(chunks, group)]
        first += size
    return order


def _other_groups(ranks: int, micro_batches: int, costs: PerStage) -> list[list[int]]:
    """Sizes of groups that may do better than full ones."""
    count, rest = divmod(micro_batches, ranks)
    if ranks == 1 or count == 0:
        return []
    found = []
    if rest:
        more, larger = divmod(rest, count)
        found.append([ranks + more + (i < larger) for i in range(count)])
        found.append([rest] + [ranks] * count)
    for first, last in _surplus(ranks, costs):
        between = micro_batches - 2 * ranks - first - last
        if first <= ranks and last <= ranks and between >= 0:
            full, left = divmod(between, ranks)
            # What is left over comes early: a small group further on would come round too soon.
            middle = [left] * (left > 0) + [ranks] * full
            found.append([ranks + first, *middle, ranks + last])
    return found


def _surplus(ranks: int, costs: PerStage) -> list[tuple[int, int]]:
    """By how much larger a first and a last group may close the gap that messages leave."""
    if not any(costs.communication):
        return []
    way = ranks * max(costs.communication)
    forward = min(costs.forward)
    backward = min(b + w for b, w in zip(costs.backward, costs.weight, strict=True))
    first = ceil(way / forward) if forward else 0
    last = ceil(way / backward) if backward else 0
    return list(dict.fromkeys(((first, last), (first, 0), (0, first), (1, 1), (1, 0), (0, 1))))
