"""A micro-batch's forward and backward pass, recorded once and replayed (`--cuda-graphs`).

A GPU is done with a small network's operators sooner than the host can name them. A CUDA graph is
the list of all kernels of a stretch of work, with their addresses, which one call starts. For each
set of shapes that micro-batches come in:

1. The first few run as ever. Libraries are loaded and make their choices.
2. One is recorded: the host goes through the operators and the device only takes note.
3. From then on a micro-batch is copied to where the recorded one lay, and the graph is replayed.

What a kernel reads and writes has to stay in its place. Parameters and gradients lie in flat
buffers, and the rest is kept so: the denominators and the loss scale are written in place, random
numbers come from a seed that the graph finds in memory (PyTorch's generators do that by themselves,
`RandomStreams.static_keys` for the kernels). So a replayed step is that of a run without graphs.

No Python runs in a replay. The sums over data-parallel ranks, which otherwise begin during the last
backward pass, begin behind it. What needs the host in between is refused: other ranks of the model,
recomputation, documents by length (`megatron.validation.speed`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch

from megatron.monitor import annotated
from megatron.training.task import Batch, Parts

# The first run of a shape loads and compiles, and may find out which implementation is the fastest.
WARM_UPS = 2
# A graph holds on to the memory of its activations; so many sets of shapes are worth that.
MOST_GRAPHS = 8

Work = Callable[[Batch], Parts]
Shapes = tuple[tuple[str, torch.Size, torch.dtype], ...]


class Recording(NamedTuple):
    """Work that was recorded: what it makes, always in the same place, and how to do it again."""

    parts: Parts
    replay: Callable[[], None]


Recorder = Callable[[Callable[[], Parts]], Recording]


class _Graph(NamedTuple):
    batch: Batch
    recording: Recording

    def replay(self, batch: Batch) -> Parts:
        for name, field in batch.items():
            self.batch[name].copy_(field, non_blocking=True)
        self.recording.replay()
        # The next replay writes there again.
        return {name: value.clone() for name, value in self.recording.parts.items()}


class MicroBatchGraphs:
    """Runs micro-batches, from the graph of their shapes where there is one.

    Args:
        work: one micro-batch's forward and backward pass, whose gradients add up in place.
        start: seeds the random numbers of a micro-batch, of that number in the step.
        record: makes a graph of work.
    """

    def __init__(self, work: Work, start: Callable[[int], None], record: Recorder) -> None:
        self._work, self._start, self._record = work, start, record
        self._runs: Counter[Shapes] = Counter()
        self._graphs: dict[Shapes, _Graph] = {}

    def __call__(self, batch: Batch, micro_batch: int) -> Parts:
        """The micro-batch's parts of the loss; its gradients are added to those that are there."""
        shapes = tuple((name, field.shape, field.dtype) for name, field in batch.items())
        self._runs[shapes] += 1
        is_due = self._runs[shapes] > WARM_UPS and shapes not in self._graphs
        if is_due and len(self._graphs) < MOST_GRAPHS:
            self._start(micro_batch)
            self._graphs[shapes] = self._recorded(batch)
        self._start(micro_batch)
        graph = self._graphs.get(shapes)
        with annotated("micro-batch", micro_batch):
            return self._work(batch) if graph is None else graph.replay(batch)

    def _recorded(self, batch: Batch) -> _Graph:
        own = {name: field.clone() for name, field in batch.items()}
        return _Graph(own, self._record(lambda: self._work(own)))


def cuda_recorder(device: torch.device) -> Recorder:
    """Records on the current stream of a GPU, which must not be its default one.

    The graphs share memory, since what one leaves behind is taken away before the next runs.
    """
    pool = torch.cuda.graph_pool_handle()

    def record(work: Callable[[], Parts]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(device)
        # Threads that load data and watch over collectives go on beside it, and may call CUDA.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            parts = work()
        return Recording(parts, graph.replay)

    return record


def leave_default_stream(device: torch.device) -> None:
    """Go on on a stream of a GPU that can be recorded; the default one cannot.

    To be called before a model is made: autograd adds up gradients on the stream on which it first
    met their parameters.
    """
    default = torch.cuda.default_stream(device)
    if torch.cuda.current_stream(device) == default:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(default)
        torch.cuda.set_stream(stream)
