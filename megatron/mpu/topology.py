"""The grid of ranks, as arithmetic.

Ranks are ``arange(world).reshape(pipeline, data, tensor)``: the tensor axis runs fastest, so that
the ranks that talk most sit side by side on one machine; the pipeline axis runs slowest, because
its messages are the smallest. Every group of ranks is a slice of that grid.

A worked example, 8 ranks with tensor 2 and pipeline 2 (hence data 2)::

                 stage 0                stage 1
                 tensor 0  tensor 1     tensor 0  tensor 1
    data 0          0         1            4         5
    data 1          2         3            6         7

    tensor groups      (0 1) (2 3) (4 5) (6 7)      a row within a stage
    data groups        (0 2) (1 3) (4 6) (5 7)      a column within a stage
    pipeline groups    (0 4) (1 5) (2 6) (3 7)      the same place in every stage
    model groups       (0 1 4 5) (2 3 6 7)          one whole copy of the model
    embedding groups   (0 4) (1 5) (2 6) (3 7)      first and last stage of each pipeline

This file imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Coordinates:
    """A rank's place on the grid."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Topology:
    """The rank grid of ``world_size`` processes.

    ``split`` is the first pipeline rank of an encoder-decoder's decoder, None for other models.

    Raises:
        ValueError: a size is not positive, the world does not divide into whole models, or the
            split leaves the encoder or the decoder without a rank of its own.
    """

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    split: int | None = None

    def __post_init__(self) -> None:
        for name in ("world_size", "tensor", "pipeline"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.world_size % (self.tensor * self.pipeline):
            raise ValueError(
                f"world size {self.world_size} is not divisible by "
                f"tensor {self.tensor} x pipeline {self.pipeline}"
            )
        if self.split is not None and not 0 < self.split < self.pipeline:
            raise ValueError(
                f"split {self.split} is not between 1 and {self.pipeline - 1}, "
                f"the last of {self.pipeline} pipeline ranks"
            )

    @property
    def data(self) -> int:
        """Number of whole copies of the model."""
        return self.world_size // (self.tensor * self.pipeline)

    def rank(self, *, pipeline: int, data: int, tensor: int) -> int:
        """The rank at these coordinates."""
        return (pipeline * self.data + data) * self.tensor + tensor

    def coordinates(self, rank: int) -> Coordinates:
        """The coordinates of ``rank``; raises ValueError outside the world."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a world of {self.world_size}")
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(pipeline=pipeline, data=data, tensor=tensor)

    def tensor_groups(self) -> Groups:
        """Ranks that hold the pieces of the same layers of the same copy."""
        return tuple(
            tuple(self.rank(pipeline=p, data=d, tensor=t) for t in range(self.tensor))
            for p in range(self.pipeline)
            for d in range(self.data)
        )

    def data_groups(self) -> Groups:
        """Ranks that hold the same parameters and see different samples."""
        return tuple(
            tuple(self.rank(pipeline=p, data=d, tensor=t) for d in range(self.data))
            for p in range(self.pipeline)
            for t in range(self.tensor)
        )

    def pipeline_groups(self) -> Groups:
        """Ranks through which one activation passes, in the order of the stages."""
        return tuple(
            tuple(self.rank(pipeline=p, data=d, tensor=t) for p in range(self.pipeline))
            for d in range(self.data)
            for t in range(self.tensor)
        )

    def model_groups(self) -> Groups:
        """Ranks that together hold one whole copy of the model."""
        return tuple(
            tuple(
                self.rank(pipeline=p, data=d, tensor=t)
                for p in range(self.pipeline)
                for t in range(self.tensor)
            )
            for d in range(self.data)
        )

    def embedding_groups(self) -> Groups:
        """Ranks that hold the word embedding: first, first of the decoder and last stage."""
        return self._at_stages(0, self.split, self.pipeline - 1)

    def position_embedding_groups(self) -> Groups:
        """Ranks that hold the position embedding: first stage and first of the decoder."""
        return self._at_stages(0, self.split)

    def _at_stages(self, *stages: int | None) -> Groups:
        """The ranks of each pipeline at these stages, each once."""
        places = sorted({stage for stage in stages if stage is not None})
        return tuple(tuple(group[p] for p in places) for group in self.pipeline_groups())
