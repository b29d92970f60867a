"""Several ranks load and save what one process does, each reading only what it holds."""

from pathlib import Path

import pytest
import torch

from megatron.checkpoint.hugging_face.files import HuggingFaceFiles
from megatron.mpu import ParallelState
from tests.distributed import run_distributed
from tests.hf.tiny import FAMILIES, assert_same, class_of, model_of


def load_save_and_look(directory: str, family: str) -> tuple[set[str], set[str]]:
    """On four ranks: everything that is whole again equals what one process has."""
    path, read = Path(directory), set[str]()
    stock_read = HuggingFaceFiles.read

    def counted(self: HuggingFaceFiles, name: str) -> torch.Tensor:
        read.add(name)
        return stock_read(self, name)

    HuggingFaceFiles.read = counted  # type: ignore[method-assign]
    try:
        model = class_of(family, "ForPreTraining").from_pretrained(
            path, tensor_model_parallel_size=2, pipeline_model_parallel_size=2
        )
    finally:
        HuggingFaceFiles.read = stock_read  # type: ignore[method-assign]
    alone = type(model).from_pretrained(path, parallel_state=ParallelState.single())
    assert_same(model.full_state_dict(), dict(alone.state_dict()))
    assert model.num_parameters() == alone.num_parameters()
    model.save_pretrained(path / "again", max_shard_size=5000)
    model.save_pretrained(path / "old", safe_serialization=False)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(own)
    assert_same(model.full_state_dict(), dict(alone.state_dict()))
    return read, set(own)


@pytest.mark.parametrize("family", FAMILIES)
def test_four_ranks_load_and_save_what_one_does(family: str, tmp_path: Path) -> None:
    model = model_of(family, "ForPreTraining")
    model.save_pretrained(tmp_path)
    results = run_distributed(4, load_save_and_look, str(tmp_path), family)
    for again in ("again", "old"):
        loaded = type(model).from_pretrained(tmp_path / again)
        assert_same(loaded.state_dict(), model.state_dict())
    names = set(model.state_dict())
    (first_read, first_own), (last_read, last_own) = results[0], results[2]
    assert first_own | last_own == names and first_own.isdisjoint(last_own)
    # A stage reads what it holds; the last one's copy of the word embedding is read, too.
    assert first_read == first_own
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert last_read == last_own - tied | {"bert.embeddings.word_embeddings.weight"}


def missing_on_two_ranks(directory: str) -> list[str]:
    torch.manual_seed(torch.distributed.get_rank())
    model, info = class_of("bert", "ForSequenceClassification").from_pretrained(
        Path(directory), pipeline_model_parallel_size=2, output_loading_info=True
    )
    weight = model.full_state_dict()["classifier.weight"]
    assert weight.any()
    return info["missing_keys"]


def test_what_is_missing_is_said_alike_on_all_ranks(tmp_path: Path) -> None:
    model_of("bert", "Model").save_pretrained(tmp_path)
    results = run_distributed(2, missing_on_two_ranks, str(tmp_path))
    assert results == [["classifier.weight", "classifier.bias"]] * 2
