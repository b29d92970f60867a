"""The most that a rank holds in a step, from what each of its actions leaves and needs.

A recorded action says by how much memory has grown at its end, and how much more it took within.
Messages are counted apart, since the schedule decides how long they lie: a received activation from
when its receive is opened to the end of the backward pass, a received gradient to the end of its
own, and what is sent until the schedule knows it to have arrived.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron.pipeline.actions import Kind
from megatron.pipeline.messages import Edge, Message, Step
from megatron.planner.recording import RankRecord, Segment
from megatron.planner.timing import MIDDLE, place_of


def peak_activations(
    record: RankRecord, steps: Sequence[Step], stages: Sequence[int], micro_batches: int, ahead: int
) -> int:
    """Bytes beyond weights, gradients and optimizer state, at the peak of a step.

    Args:
        steps: of this rank in the whole schedule.
        stages: of this rank, in order.
        micro_batches: of a step.
        ahead: steps whose micro-batches are on the device at once.
    """
    held = _Held(record, _left_by_the_last_step(record, steps))
    held.add(record.rest + ahead * micro_batches * record.batch)
    held.run(record.before)
    left = _left_by_a_micro_batch(record)
    ends = Kind.WEIGHT if any(key[1] is Kind.WEIGHT for key in record.actions) else Kind.BACKWARD
    for step in steps:
        action, stage = step.action, stages.index(step.action.stage)
        at = place_of(action.micro_batch, micro_batches)
        held.take(step, record.actions[stage, action.kind, at])
        if at == MIDDLE and action.micro_batch > 1 and action.kind is ends:
            held.add(-left[stage])
    held.run(record.after)
    return held.peak


class _Held:
    """What a rank holds as its step goes on."""

    def __init__(self, record: RankRecord, left: Counter[Edge]) -> None:
        self._record = record
        self._left = left
        self._inputs: dict[tuple[int, int], int] = {}
        self._passed_on: set[Message] = set()
        self._live = self.peak = 0
        self.add(sum(left.values()))

    def add(self, size: int) -> None:
        """More is held from here on."""
        self._live += size
        self.peak = max(self.peak, self._live)

    def run(self, segment: Segment) -> None:
        """Go through a recorded part of the step."""
        self.peak = max(self.peak, self._live + segment.peak)
        self._live += segment.change

    def take(self, step: Step, segment: Segment) -> None:
        """Go through an action and the messages around it."""
        for message in step.post:
            self.add(message_bytes(self._record, message))
        arrived = (message for message in step.delivered if message not in self._passed_on)
        self._live -= sum(message_bytes(self._record, message) for message in arrived)
        self.run(segment)
        if step.sent is not None and not step.sent.is_local:
            self._live -= self._left.pop(step.sent.edge, 0)
            if segment.passes_on:
                self._passed_on.add(step.sent)  # its memory counts as the input's
            else:
                self.add(message_bytes(self._record, step.sent))
        self._let_go_of_input(step)

    def _let_go_of_input(self, step: Step) -> None:
        """What a forward pass has received is held until the backward pass has run."""
        action, received = step.action, 0
        if step.received is not None and not step.received.is_local:
            received = message_bytes(self._record, step.received)
        place = action.stage, action.micro_batch
        if action.kind is Kind.FORWARD:
            self._inputs[place] = received
        elif action.kind is Kind.BACKWARD:
            self._live -= received + self._inputs.pop(place)


def _left_by_a_micro_batch(record: RankRecord) -> Counter[int]:
    """By the place of the stage: bytes of buckets that one in the middle has begun to fill.

    The next one fills them on; they do not become more with every micro-batch.
    """
    left: Counter[int] = Counter()
    for (stage, _, at), segment in record.actions.items():
        if at == MIDDLE:
            left[stage] += segment.change
    return left


def _left_by_the_last_step(record: RankRecord, steps: Sequence[Step]) -> Counter[Edge]:
    """Bytes by edge that a step sends and never hears of: they lie until the next one sends."""
    left: Counter[Edge] = Counter()
    if record.settles:
        return left
    for step in steps:
        if step.sent is not None and not step.sent.is_local:
            left[step.sent.edge] += message_bytes(record, step.sent)
        for message in step.delivered:
            left[message.edge] -= message_bytes(record, message)
    return left


def message_bytes(record: RankRecord, message: Message) -> int:
    """Bytes of a message, which is as large as what the earlier of its stages sends on."""
    return record.messages[min(message.producer.stage, message.consumer.stage)]
