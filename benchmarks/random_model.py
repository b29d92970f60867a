"""Writes a model of random values in one of the formats that tools/convert_checkpoint.py reads.

    python benchmarks/random_model.py --format native --save DIR [--num-layers 24 ...]

No model is ever in memory: each tensor is drawn when it is written. The last line on standard
output is the model's size in bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron.conversion import hugging_face, megatron_lm
from megatron.conversion.native import write_native
from megatron.conversion.stored_model import StoredModel
from megatron.errors import run_command
from megatron.model import build_bert, build_gpt
from megatron.mpu import ParallelState
from megatron.mpu.random import stream_seed
from megatron.mpu.stage import stages

BUILDERS = {"bert": build_bert, "gpt": build_gpt}
STD = 0.02


class RandomTensors:
    """Tensors whose values are a function of their names."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.shapes = shapes
        self.dtypes = dict.fromkeys(shapes, dtype)

    def read(self, name: str, /) -> torch.Tensor:
        """N(0, 0.02^2), around 1 where a norm scales by it."""
        generator = torch.Generator().manual_seed(stream_seed(name))
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        tensor.normal_(std=STD, generator=generator)
        return tensor.add_(1.0) if "layernorm.weight" in name else tensor


def random_model(model: ModelConfig, dtype: torch.dtype) -> StoredModel:
    """The model with a source of random values."""
    config = Config(
        model=model,
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=1.0),
        data=DataConfig(seq_length=model.max_position_embeddings),
        train=TrainConfig(micro_batch_size=1),
    )
    (whole,) = stages([model.num_layers])
    network = BUILDERS[model.model_type](config, ParallelState.single("meta"), whole)
    specs = [p.shard_spec for p in network.parameters()]  # type: ignore[attr-defined]
    source = RandomTensors({spec.key: spec.shape for spec in specs}, dtype)
    return StoredModel("random", Path(), model, source)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--format", choices=["native", "megatron", "hf"], required=True)
    parser.add_argument("--save", type=Path, required=True, help="directory to write into")
    parser.add_argument("--model", choices=BUILDERS, default="gpt")
    parser.add_argument("--num-layers", type=int, default=24)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--num-attention-heads", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--max-position-embeddings", type=int, default=2048)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args()
    model = ModelConfig(
        model_type=args.model,
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        vocab_size=args.vocab_size,
        max_position_embeddings=args.max_position_embeddings,
        activation="gelu_tanh",  # which GPT-2's and Megatron-LM's class compute
        head_activation="gelu_tanh" if args.model == "bert" else None,
    )
    stored = random_model(model, getattr(torch, args.dtype))
    args.save.mkdir(parents=True)
    if args.format == "native":
        write_native(args.save, stored, stored.source, iteration=0)
    elif args.format == "hf":
        hugging_face.write_hugging_face_model(args.save, stored, max_bytes=5 * 10**9)
    else:
        megatron_lm.write_megatron_model(args.save, stored, megatron_lm.Split())
    print(stored.num_bytes)


if __name__ == "__main__":
    run_command(main)
