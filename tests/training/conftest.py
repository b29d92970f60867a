"""The corpus that all tests of the pretraining programs train on."""

import pytest

from tests.training.corpus import Corpus, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))
