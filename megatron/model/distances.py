"""Learned vectors for distances, which queries and keys are compared with.

Letters: s sequence, z sequence of the keys, b micro-batch, n heads, d head size, t tensor size,
p longest sequence.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron.config import Config
from megatron.model.initial import init_methods
from megatron.model.module import new_parameter
from megatron.mpu import ParallelState, ShardSpec
from megatron.mpu.layers import embedding_lookup


class Distances(nn.Module):
    """A vector for each distance from key to query, which all heads of a layer share.

    A query's product with it is added to the score of the key (arXiv 1803.02155, equation 4 without
    the values'), and with `relative_key_query` the key's product, too (arXiv 2009.13658, method 4).
    Every tensor rank holds the whole table and has a term of its gradient, that of its own heads.
    """

    def __init__(self, config: Config, state: ParallelState, name: str) -> None:
        super().__init__()
        model = config.model
        self.longest = model.max_position_embeddings
        self.with_keys = model.position_embedding_type == "relative_key_query"
        shape = (2 * self.longest - 1, model.head_size)
        spec = ShardSpec(f"{name}.weight", shape, partial=state.tensor.size > 1)
        self.weight = new_parameter(config, state, spec, init_methods(config)[0])

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, *, from_last: bool = False
    ) -> torch.Tensor:
        """What is added to the scores before they are scaled.

        [s, b, n / t, d], [z, b, n / t, d] -> [b, n / t, s, z]

        Args:
            from_last: whether all queries count as standing where the last key does, and not from
                the first key on.
        """
        s, z = query.size(0), key.size(0)
        keys = torch.arange(z, device=query.device)
        queries = keys[-1:].expand(s) if from_last else torch.arange(s, device=query.device)
        ids = queries[:, None] - keys + self.longest - 1
        vectors = embedding_lookup(ids, self.weight).to(query.dtype)  # [s, z, d]
        scores = torch.einsum("sbnd,szd->bnsz", query, vectors)
        if self.with_keys:
            scores = scores + torch.einsum("zbnd,szd->bnsz", key, vectors)
        return scores
