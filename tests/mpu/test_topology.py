"""The rank grid: groups partition the world, and coordinates are the inverse of ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.mpu.stage import stages
from megatron.mpu.topology import Topology

topologies = st.builds(
    lambda t, p, d: Topology(t * p * d, tensor=t, pipeline=p),
    *(st.integers(1, 6) for _ in range(3)),
)


def test_worked_example_of_the_module() -> None:
    grid = Topology(8, tensor=2, pipeline=2)
    assert grid.tensor_groups() == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert grid.data_groups() == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert grid.pipeline_groups() == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert grid.model_groups() == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert grid.embedding_groups() == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert grid.position_embedding_groups() == ((0,), (1,), (2,), (3,))


@given(topologies)
def test_coordinates_and_ranks_are_inverse(grid: Topology) -> None:
    for rank in range(grid.world_size):
        place = grid.coordinates(rank)
        back = grid.rank(pipeline=place.pipeline, data=place.data, tensor=place.tensor)
        assert back == rank


@given(topologies)
def test_every_kind_of_group_partitions_the_world(grid: Topology) -> None:
    kinds = {
        grid.tensor: grid.tensor_groups(),
        grid.data: grid.data_groups(),
        grid.pipeline: grid.pipeline_groups(),
        grid.tensor * grid.pipeline: grid.model_groups(),
    }
    for size, groups in kinds.items():
        assert sorted(rank for group in groups for rank in group) == list(range(grid.world_size))
        assert {len(group) for group in groups} == {size}


@given(topologies)
def test_a_group_varies_along_its_axis_alone(grid: Topology) -> None:
    for name in ("tensor", "data", "pipeline"):
        for group in getattr(grid, f"{name}_groups")():
            places = [grid.coordinates(rank) for rank in group]
            for axis in ("tensor", "data", "pipeline"):
                values = [getattr(place, axis) for place in places]
                expected = list(range(len(group))) if axis == name else [values[0]] * len(group)
                assert values == expected


@given(topologies)
def test_embedding_groups_are_the_ends_of_the_pipelines(grid: Topology) -> None:
    for pipeline, ends in zip(grid.pipeline_groups(), grid.embedding_groups(), strict=True):
        assert ends == tuple(dict.fromkeys((pipeline[0], pipeline[-1])))


@pytest.mark.parametrize(
    ("world", "tensor", "pipeline", "message"),
    [
        (6, 4, 1, "world size 6 is not divisible by tensor 4 x pipeline 1"),
        (4, 0, 1, "tensor must be at least 1, found 0"),
        (4, 1, -1, "pipeline must be at least 1, found -1"),
    ],
)
def test_impossible_grids_are_refused(world: int, tensor: int, pipeline: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Topology(world, tensor, pipeline)


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 4 is outside a world of 4"):
        Topology(4).coordinates(4)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_stages_hold_all_layers_in_order(layers: list[int]) -> None:
    pipeline = stages(layers)
    assert [layer for stage in pipeline for layer in stage.layers] == list(range(sum(layers)))
    assert [stage.num_layers for stage in pipeline] == layers
    assert [stage.is_first for stage in pipeline] == [i == 0 for i in range(len(layers))]
    assert [stage.is_last for stage in pipeline] == [
        i == len(layers) - 1 for i in range(len(layers))
    ]
