"""The usual update of a plain PyTorch loop: clipping, and the fused AdamW.

Split parameters (DTensor) and plain ones are kept apart, since PyTorch's operators on lists of
tensors take no mixtures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from benchmarks.peers.sizes import CLIP, LEARNING_RATE, WEIGHT_DECAY


class Update:
    """AdamW over `parameters`; norms and biases are not decayed.

    Args:
        group: the ranks that each hold a part of the model, over which the norm is taken.
        counted: whether a parameter counts here, and not on another of these ranks.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        group: dist.ProcessGroup | None = None,
        counted: Callable[[nn.Parameter], bool] = lambda _: True,
    ) -> None:
        self._group, self._counted = group, counted
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            groups[parameter.dim() > 1, isinstance(parameter, DTensor)].append(parameter)
        self._groups = list(groups.values())
        self._adam = torch.optim.AdamW(
            [
                {"params": members, "weight_decay": WEIGHT_DECAY if decayed else 0.0}
                for (decayed, _), members in groups.items()
            ],
            lr=LEARNING_RATE,
            fused=True,
        )

    def __call__(self) -> None:
        """Clip, step, and let the gradients go."""
        norm = self._norm()
        for members in self._groups:
            clip_grads_with_norm_(members, CLIP, norm)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def _norm(self) -> Tensor:
        norms = []
        for members in self._groups:
            gradients = [p.grad for p in members if p.grad is not None and self._counted(p)]
            norm = get_total_norm(gradients)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        total = torch.linalg.vector_norm(torch.stack(norms))
        if self._group is None:
            return total
        squares = total.square()
        dist.all_reduce(squares, group=self._group)
        return squares.sqrt()
