"""Every class returns what transformers 4.34.0 returned, and has its gradients.

The answers were written once (`tests/hf/old/make_fixture.py`); `make parity-hf` draws new ones.
"""

from __future__ import annotations

import pytest

from tests.hf.old.cases import CLASSES
from tests.hf.old.compare import check, disagreements
from tests.hf.old.fixture import case_directory, case_names

pytest.importorskip("safetensors")


def test_every_class_is_in_the_fixture() -> None:
    assert {name.split("-")[1] for name in case_names()} == set(CLASSES)


@pytest.mark.filterwarnings("ignore:next_sentence_label")
@pytest.mark.parametrize("name", case_names())
def test_outputs_and_gradients(name: str) -> None:
    wrong = disagreements(check(case_directory(name)))
    assert not wrong, "\n".join(wrong)
