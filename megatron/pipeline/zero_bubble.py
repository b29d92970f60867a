"""Zero-bubble schedules (arXiv 2401.10241): weight gradients fill the time that ranks would idle.

A backward pass is split. The rank before waits for the gradient of the input (B), nobody waits for
the gradient of the weights (W), so W is kept for a time in which nothing else has arrived. The
price is memory: until W has run, the inputs of the products and the gradients of their outputs
stay. `Costs.retained` says how much that is, as a share of what a forward pass leaves.

`p` ranks, one stage each:

    zb-h1   no rank ever holds more than p forward passes, what the first rank of 1F1B holds
    zb-2p   no rank holds more than 2p; with costs as in the paper hardly any bubble is left

Both are searched for (`megatron.pipeline.list_scheduler`) where costs are given. Without costs
ZB-H1 is the table of the paper's figure 2.

How small a bubble 2p allows follows from the ends of the pipeline. The last rank runs its last B
`(p - 1) (B + communication)` before the first rank does, and began `(p - 1) (F + communication)`
after it. To be idle no longer than the first rank, it must fill both with weight gradients that it
kept: about `(p - 1) (F + B + 2 communication) / W` of them. For the 1.5B model of the paper's Table
9 these are 29, and fit into 2p = 16 only where `retained` is about a half or less, as it is without
fused attention.

This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product

from megatron.pipeline.actions import Action, Kind, Schedule
from megatron.pipeline.list_scheduler import Orders, Played, Policy, play
from megatron.pipeline.simulator import Costs, simulate

# Actions that the search may play out. It bounds the search's time without making the table depend
# on the machine: half a million take about a second.
ACTIONS_TRIED = 500_000
FEWEST_TRIES = 4


def zb_h1(ranks: int, micro_batches: int, costs: Costs | None = None) -> Schedule:
    """Zero-bubble with the memory of 1F1B: at most `ranks` forward passes held on any rank.

    Raises:
        ValueError: there is no rank or no micro-batch, or the costs do not fit.
    """
    table = _handmade(ranks, micro_batches)
    return table if costs is None else _search(table, costs, limit=ranks)


def zb_2p(ranks: int, micro_batches: int, costs: Costs | None = None) -> Schedule:
    """The best zero-bubble schedule found that holds at most 2 `ranks` forward passes on any rank.

    Args:
        ranks: stages of the pipeline.
        micro_batches: of a step.
        costs: what to optimise for; 1, 1, 1 and free messages by default.

    Raises:
        ValueError: there is no rank or no micro-batch, or the costs do not fit.
    """
    return _search(_handmade(ranks, micro_batches), costs or Costs(1, 1, 1), limit=2 * ranks)


def _handmade(ranks: int, micro_batches: int) -> Schedule:
    """ZB-H1: 1F1B in which rank s does W only after s further backward passes."""
    tables = []
    for stage in range(ranks):
        forward, backward, weight = (
            [Action(stage, kind, i) for i in range(micro_batches)]
            for kind in (Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT)
        )
        ahead = min(ranks - stage, micro_batches) - 1
        table, done = forward[:ahead], 0
        for i in range(micro_batches):
            table += forward[ahead + i : ahead + i + 1]
            table.append(backward[i])
            # Once there are no more forward passes, weight gradients fill their places.
            if i >= stage or ahead + i >= micro_batches:
                table.append(weight[done])
                done += 1
        tables.append((*table, *weight[done:]))
    return Schedule(tuple(tables), placement=tuple(range(ranks)))


def _search(fallback: Schedule, costs: Costs, limit: int) -> Schedule:
    """The cheapest of all tables tried within the limit, `fallback` being one of them."""
    ranks, micro_batches = fallback.num_ranks, fallback.num_micro_batches
    per_stage = costs.per_stage(ranks)
    passes = tuple([(stage, i) for i in range(micro_batches)] for stage in range(ranks))
    orders = Orders(fallback.placement, passes, passes, split=True)

    def attempt(policy: Policy) -> Played:
        played = play(orders, per_stage, [limit] * ranks, costs.retained, policy)
        assert played is not None  # one forward pass always fits: no rank waits for room for ever
        return played

    tries = max(FEWEST_TRIES, ACTIONS_TRIED // (3 * ranks * micro_batches))
    policies = islice(_policies(ranks, unit=max(per_stage.forward)), tries)
    found = [(attempt(policy), policy) for policy in policies]
    best, policy = min(found, key=lambda pair: pair[0].cost)
    # Where the rank that is idle longest loses its time before its first gradient, one more forward
    # pass there may help: the ranks before it, which then wait longer, are tried next.
    for _ in range(min(2 * ranks, tries)):
        worst = best.idle.index(max(best.idle))
        policy = replace(policy, eager=policy.eager | {worst})
        better = attempt(policy)
        if better.cost >= best.cost:
            break
        best = better
    return fallback if simulate(fallback, costs).cost <= best.cost else best.schedule


def _policies(ranks: int, unit: float) -> Iterator[Policy]:
    """What to try, in order of merit; `unit` is the time of a forward pass."""
    for backward_first, slack in product((False, True), (0.0, 0.5, 1.5, 0.25, 3.0)):
        for patience in dict.fromkeys((0, 1, 2, ranks // 2, ranks, 3, 4)):
            for eager in (frozenset[int](), frozenset(range(ranks))):
                yield Policy(slack * unit, patience, backward_first, eager)
