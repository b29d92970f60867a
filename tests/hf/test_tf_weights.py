"""The original programs' checkpoints, without TensorFlow: a reader that stands for its own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.errors import CheckpointError
from megatron.hf import bert
from megatron.hf.tf_weights import TensorFlowCheckpoint, hugging_face_name
from tests.hf.tiny import assert_same, config_of, model_of

VARIABLES = {
    "bert/embeddings/word_embeddings": "bert.embeddings.word_embeddings.weight",
    "bert/embeddings/token_type_embeddings": "bert.embeddings.token_type_embeddings.weight",
    "bert/embeddings/LayerNorm/gamma": "bert.embeddings.LayerNorm.weight",
    "bert/encoder/layer_11/attention/self/query/kernel": (
        "bert.encoder.layer.11.attention.self.query.weight"
    ),
    "bert/encoder/layer_0/output/LayerNorm/beta": "bert.encoder.layer.0.output.LayerNorm.bias",
    "bert/pooler/dense/bias": "bert.pooler.dense.bias",
    "cls/predictions/transform/dense/kernel": "cls.predictions.transform.dense.weight",
    "cls/predictions/output_bias": "cls.predictions.bias",
    "cls/seq_relationship/output_weights": "cls.seq_relationship.weight",
    "output_weights": "classifier.weight",
    "cls/squad/output_bias": "qa_outputs.bias",
    "bert/pooler/dense/kernel/adam_m": None,
    "bert/pooler/dense/kernel/AdamWeightDecayOptimizer_1": None,
    "global_step": None,
}


@pytest.mark.parametrize("variable", VARIABLES)
def test_names_of_variables(variable: str) -> None:
    assert hugging_face_name(variable) == VARIABLES[variable]


class Variables:
    """What stands for TensorFlow's reader: a model's tensors as those programs stored them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.values: dict[str, np.ndarray[Any, Any]] = {"global_step": np.array(3)}
        for name, tensor in tensors.items():
            if "decoder" in name:
                continue
            if name == "cls.predictions.bias":
                variable = "cls/predictions/output_bias"
            elif name.startswith("cls.seq_relationship"):
                last = "output_weights" if "weight" in name else "output_bias"
                variable = f"cls/seq_relationship/{last}"
            else:
                variable = name.replace(".layer.", ".layer_").replace(".", "/")
                if "LayerNorm" in name:
                    variable = variable.replace("weight", "gamma").replace("bias", "beta")
                elif "_embeddings" in name:
                    variable = variable.removesuffix("/weight")
                elif name.endswith("weight"):
                    variable, tensor = variable.replace("weight", "kernel"), tensor.t()
            self.values[variable] = tensor.numpy()

    def get_variable_to_shape_map(self) -> dict[str, list[int]]:
        return {name: list(value.shape) for name, value in self.values.items()}

    def get_tensor(self, name: str) -> np.ndarray[Any, Any]:
        return self.values[name]


def test_a_checkpoint_of_the_original_programs() -> None:
    model, other = (model_of("bert", "ForPreTraining", seed) for seed in (0, 1))
    info = other.load_tensors(TensorFlowCheckpoint(Variables(model.state_dict())))
    assert not any(info.values())
    assert_same(other.state_dict(), model.state_dict())


def test_a_checkpoint_of_something_else_is_refused() -> None:
    with pytest.raises(CheckpointError, match="word_embeddings"):
        TensorFlowCheckpoint(Variables({}))


def test_tensorflow_is_asked_for_when_it_is_used(tmp_path: Path) -> None:
    config = config_of("bert")
    with pytest.raises(ImportError, match="BertForMaskedLM needs tensorflow"):
        bert.BertForMaskedLM.from_pretrained(tmp_path, config=config, from_tf=True)
    model = model_of("bert", "ForMaskedLM")
    with pytest.raises(ImportError, match="BertForMaskedLM needs tensorflow"):
        model.load_tf_weights(model.config, tmp_path)
