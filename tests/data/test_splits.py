"""Properties of the split of the documents."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.data import split_documents
from megatron.errors import ConfigError
from tests.data.support import EXAMPLES

weights = st.lists(st.integers(0, 1000), min_size=1, max_size=3).filter(any)


@given(
    weights=weights, documents=st.integers(0, 10**6), separator=st.sampled_from([",", ", ", "/"])
)
@EXAMPLES
def test_splits_share_all_documents(weights: list[int], documents: int, separator: str) -> None:
    ranges = split_documents(separator.join(map(str, weights)), documents)
    assert ranges[0].start == 0
    assert ranges[2].stop == documents
    assert all(a.stop == b.start for a, b in pairwise(ranges))
    for weight, part in zip(weights, ranges, strict=False):
        assert abs(len(part) - weight / sum(weights) * documents) <= 1
        assert weight or not part


def test_the_default_split() -> None:
    assert split_documents("969, 30, 1", 1000) == (range(969), range(969, 999), range(999, 1000))


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "0,0,0", "-1,2", "nan", "inf,1", "1 2"])
def test_refuses_what_is_no_split(split: str) -> None:
    with pytest.raises(ConfigError, match="--split"):
        split_documents(split, 10)
