"""What `tools/make_corpus.py` takes for prose and what it leaves out."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "tools" / "make_corpus.py"
    spec = importlib.util.spec_from_file_location("make_corpus", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_corpus"] = module
    spec.loader.exec_module(module)
    return module


DOCSTRING = """\
Return the sum of all the numbers that the caller
has given to this :class:`~numbers.Number` function.

    >>> total(1, 2)
    3

Usually it is used like this::

    total(*range(10))

It can be slow, and ``math.fsum`` is better than this one in most cases.

Parameters
----------
values : list
    The values that are to be added up by this function.

Notes
-----
The algorithm is not the one that you would expect in such a place.

Args:
    start: The value that the sum is to begin with, as in the builtin.

Returns:
    The sum of all the values that were given.

- The first item of this list is a sentence of its own.
- The second item is one as well, and it is kept too.

====== ======
a      b
====== ======

See https://example.com for more about what this is all about.
"""


def test_prose_stays_and_the_rest_goes(tool: ModuleType) -> None:
    assert tool.paragraphs(DOCSTRING) == [
        "Return the sum of all the numbers that the caller has given to this numbers.Number "
        "function.",
        "It can be slow, and math.fsum is better than this one in most cases.",
        "The algorithm is not the one that you would expect in such a place.",
        "The first item of this list is a sentence of its own.",
        "The second item is one as well, and it is kept too.",
    ]


CODE = '''\
# A comment first.
"""The module."""

if True:
    def function(a, b) -> "x":
        r"""The \\function."""

class Thing:
    """The thing."""

    def method(
        self,
    ):
        """The
        method."""
        text = """not a docstring"""

async def other():  # with a comment
    \'\'\'The other.\'\'\'
'''


def test_classes_are_documents_of_their_own(tool: ModuleType) -> None:
    thing, rest = tool.docstrings(CODE)
    assert thing == "The thing.\n\nThe\nmethod."
    assert rest == "The module.\n\nThe \\function.\n\nThe other."


def test_paragraphs_that_differ_in_names_alone_are_kept_once(tool: ModuleType) -> None:
    seen: set[bytes] = set()
    text = "The model {} is here. It has {} layers. It is rather good at what it does."
    lines = [
        tool._line(tool.Document("source", [text.format(name, layers)]), seen)
        for name, layers in [("Bert", 12), ("GPT", 24)]
    ]
    assert "Bert" in lines[0]
    assert lines[1] == ""
