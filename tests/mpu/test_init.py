"""Initial values depend on seed, name and place alone, and have the distribution they claim."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.mpu import Axis, ShardSpec
from megatron.mpu.init import InitMethod, create_parameter, normal, ones, xavier_uniform, zeros

CPU = torch.device("cpu")


def _create(spec: ShardSpec, rank: int, size: int, method: InitMethod) -> torch.Tensor:
    axis = Axis(tuple(range(size)), rank)
    return create_parameter(spec, axis, method, dtype=torch.float64, device=CPU)


@pytest.mark.parametrize("method", [normal(0.5, 7), xavier_uniform(7)])
@pytest.mark.parametrize(
    "spec",
    [
        ShardSpec("column", (24, 5), dim=0),
        ShardSpec("row", (5, 24), dim=1),
        ShardSpec("gated", (48, 3), dim=0, blocks=(24, 24)),
        ShardSpec("padded", (21, 3), dim=0, padded=24),
        ShardSpec("whole", (7, 3)),
    ],
    ids=lambda spec: spec.name,
)
def test_pieces_are_pieces_of_the_whole(spec: ShardSpec, method: InitMethod) -> None:
    whole = _create(ShardSpec(spec.name, spec.shape), 0, 1, method)
    for size in (1, 2, 4, 8):
        for rank in range(size):
            local = _create(spec, rank, size, method)
            expected = torch.zeros_like(local)
            for box in spec.rectangles(rank, size):
                expected[box.local_slices] = whole[box.global_slices]
            assert torch.equal(local, expected)


def test_large_tensors_are_filled_in_blocks_without_a_seam() -> None:
    spec = ShardSpec("large", (300, 2000))
    whole = _create(spec, 0, 1, normal(1.0, 1))
    row = _create(ShardSpec("large", (300, 2000), dim=0), 299, 300, normal(1.0, 1))
    assert torch.equal(whole[299:], row)


def test_seed_and_name_matter() -> None:
    spec = ShardSpec("a", (50,))
    first = _create(spec, 0, 1, normal(1.0, 1))
    assert torch.equal(first, _create(spec, 0, 1, normal(1.0, 1)))
    assert not torch.isclose(first, _create(spec, 0, 1, normal(1.0, 2))).any()
    assert not torch.isclose(first, _create(ShardSpec("b", (50,)), 0, 1, normal(1.0, 1))).any()


def test_a_copy_has_its_owners_values() -> None:
    owner = _create(ShardSpec("owner", (9,)), 0, 1, normal(1.0, 1))
    copy = _create(ShardSpec("copy", (9,), tied_to="owner"), 0, 1, normal(1.0, 1))
    assert torch.equal(owner, copy)


def test_normal_values_are_normal() -> None:
    values = _create(ShardSpec("n", (1000, 1000)), 0, 1, normal(2.0, 3)).flatten() / 2.0
    count = values.numel()
    # Each moment within five standard errors of its value for a normal distribution.
    assert abs(values.mean()) < 5 / math.sqrt(count)
    assert abs(values.square().mean() - 1) < 5 * math.sqrt(2 / count)
    assert abs(values.pow(3).mean()) < 5 * math.sqrt(15 / count)
    assert abs(values.pow(4).mean() - 3) < 5 * math.sqrt(96 / count)
    quantiles = torch.tensor([0.001, 0.01, 0.25, 0.5, 0.75, 0.99, 0.999], dtype=torch.float64)
    expected = torch.special.ndtri(quantiles)
    shares = torch.stack([(values < bound).double().mean() for bound in expected])
    errors = (quantiles * (1 - quantiles) / count).sqrt()
    assert ((shares - quantiles).abs() < 5 * errors).all()
    grid = values.view(1000, 1000)
    for neighbour in ((grid[1:] * grid[:-1]), (grid[:, 1:] * grid[:, :-1])):
        assert abs(neighbour.mean()) < 5 / math.sqrt(neighbour.numel())


def test_xavier_values_are_uniform_within_the_bound() -> None:
    values = _create(ShardSpec("u", (300, 500)), 0, 1, xavier_uniform(3))
    bound = math.sqrt(6 / 800)
    assert values.abs().max() <= bound
    assert abs(values.mean()) < 5 * bound / math.sqrt(3 * values.numel())
    assert abs(values.square().mean() - bound**2 / 3) < 0.01 * bound**2


def test_constants_and_the_meta_device() -> None:
    spec = ShardSpec("c", (4, 2))
    assert torch.equal(_create(spec, 0, 1, ones), torch.ones(4, 2, dtype=torch.float64))
    assert not _create(spec, 0, 1, zeros).any()
    meta = create_parameter(
        spec, Axis((0,), 0), normal(1, 1), dtype=torch.float32, device=torch.device("meta")
    )
    assert meta.is_meta and meta.shard_spec is spec


def test_half_precision_values_are_rounded_from_the_same_numbers() -> None:
    spec = ShardSpec("h", (100,))
    exact = _create(spec, 0, 1, normal(1.0, 1))
    half = create_parameter(spec, Axis((0,), 0), normal(1.0, 1), dtype=torch.bfloat16, device=CPU)
    assert torch.equal(half, exact.bfloat16())
