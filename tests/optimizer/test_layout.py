from hypothesis import given
from hypothesis import strategies as st

from megatron.optimizer.layout import ALIGNMENT, BUCKET_MULTIPLE, Bucket, lay_out

sizes_of_parameters = st.lists(st.integers(1, 5000), min_size=1, max_size=40)


def test_worked_example() -> None:
    layout = lay_out([100, 30, 70], 120, bucket_multiple=256)
    assert layout.starts == (0, 128, 256)
    assert layout.buckets == (Bucket(0, 256, 0, 2), Bucket(256, 512, 2, 3))
    assert layout.size == 512


@given(sizes_of_parameters, st.integers(1, 20_000))
def test_parameters_lie_in_order_and_apart(sizes: list[int], bucket_size: int) -> None:
    layout = lay_out(sizes, bucket_size)
    stops = [start + size for start, size in zip(layout.starts, sizes, strict=True)]
    assert all(stop <= start for stop, start in zip(stops, layout.starts[1:], strict=False))
    assert all(start % ALIGNMENT == 0 for start in layout.starts)
    assert stops[-1] <= layout.size


@given(sizes_of_parameters, st.integers(1, 20_000))
def test_buckets_cover_the_buffer(sizes: list[int], bucket_size: int) -> None:
    layout = lay_out(sizes, bucket_size)
    parameter = offset = 0
    for bucket in layout.buckets:
        assert (bucket.start, bucket.first) == (offset, parameter)
        assert bucket.start == layout.starts[bucket.first]
        assert layout.starts[bucket.last - 1] + sizes[bucket.last - 1] <= bucket.stop
        assert (bucket.stop - bucket.start) % BUCKET_MULTIPLE == 0
        offset, parameter = bucket.stop, bucket.last
    assert (offset, parameter) == (layout.size, len(sizes))


@given(sizes_of_parameters, st.integers(1, 20_000))
def test_only_the_last_parameter_overfills_a_bucket(sizes: list[int], bucket_size: int) -> None:
    layout = lay_out(sizes, bucket_size)
    for bucket in layout.buckets:
        last = bucket.last - 1
        assert layout.starts[last] - bucket.start < bucket_size + ALIGNMENT
        if bucket is not layout.buckets[-1]:
            assert layout.starts[last] + sizes[last] - bucket.start >= bucket_size
