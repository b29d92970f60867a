"""--data-path as weights and prefixes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.blend import parse_blend
from megatron.errors import ConfigError


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(1e-9, 1e9), st.text(min_size=1)), min_size=1))
def test_pairs_come_back(pairs: list[tuple[float, str]]) -> None:
    words = [word for weight, prefix in pairs for word in (str(weight), prefix)]
    assert parse_blend(words) == tuple(pairs)


def test_one_prefix_weighs_one() -> None:
    assert parse_blend(["a"]) == ((1.0, "a"),)
    assert parse_blend([]) == ()


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (["1", "a", "b"], ["--data-path expects one prefix, or a weight in front of each; "
                           "found 3 values: 1 a b"]),
        (["a", "b"], ["--data-path expects a positive weight before b, found 'a'"]),
        (["0", "a", "1", "b"], ["--data-path expects a positive weight before a, found '0'"]),
        (["-1", "a", "inf", "b"], ["--data-path expects a positive weight before a, found '-1'",
                                   "--data-path expects a positive weight before b, found 'inf'"]),
        (["nan", "a"], ["--data-path expects a positive weight before a, found 'nan'"]),
    ],
)  # fmt: skip
def test_what_is_no_blend_is_named(words: list[str], problems: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_blend(words)
    assert list(caught.value.problems) == problems
