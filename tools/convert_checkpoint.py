"""Converts a checkpoint to another system's format, with a measured certificate.

    python tools/convert_checkpoint.py --from native --to hf --load runs/bert --save exported

1. The latest checkpoint is opened; its own configuration says what model it holds.
2. The model is written aside in the other format, one tensor in memory at a time.
3. Both models compute the logits of one fixed input: ours from the checkpoint, the other by stock
   `transformers` from the files just written. The largest difference, the input and the versions
   go to parity.json beside the weights. More than 1e-3 is a failure.
4. The directory is moved to its place.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import megatron
from megatron.checkpoint.hf_export import export_bert
from megatron.checkpoint.hf_megatron_bert import architecture
from megatron.checkpoint.reader import Checkpoint
from megatron.checkpoint.sharded import GlobalTensor
from megatron.data.progress import Progress
from megatron.errors import CheckpointError, ConfigError, run_command
from megatron.model import build_bert
from megatron.mpu import ParallelState, Stage

LARGEST_DIFFERENCE = 1e-3
CERTIFICATE = "parity.json"
SEQUENCE_LENGTH = 32
SEED = 1234


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="source", choices=["native"], required=True)
    parser.add_argument("--to", dest="target", choices=["hf"], required=True)
    parser.add_argument(
        "--load", type=Path, required=True, help="directory of the checkpoints; the latest is read"
    )
    parser.add_argument(
        "--save",
        type=Path,
        required=True,
        help="directory to make; an earlier conversion there is replaced",
    )
    parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="largest weight file, in 10^9 bytes"
    )
    arguments = parser.parse_args(argv)
    if arguments.max_shard_gb <= 0:
        parser.error(f"--max-shard-gb: found {arguments.max_shard_gb}, expected more than 0")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("--to hf needs the package transformers: pip install transformers")
    save: Path = arguments.save
    check_free(save)
    checkpoint = Checkpoint.open(arguments.load)
    aside = save.parent / f".{save.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write(checkpoint, aside, int(arguments.max_shard_gb * 1e9))
        difference = certify(checkpoint, aside)
        move_into_place(aside, save)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{checkpoint.path} -> {save}: largest difference between logits {difference:.2e}")


def check_free(save: Path) -> None:
    """Raise ConfigError where `save` holds anything but an earlier conversion."""
    if save.exists() and not (save / CERTIFICATE).is_file():
        raise ConfigError(f"--save {save} exists and is no earlier conversion; name another")


def write(checkpoint: Checkpoint, directory: Path, max_bytes: int) -> None:
    """Write the checkpoint in Hugging Face's format, telling of progress on stderr."""
    weights = sum(
        math.prod(shape) * checkpoint.stored.dtypes[key].itemsize
        for key, shape in checkpoint.weights.items()
    )
    progress = Progress("wrote", "MB", total=weights // 10**6)
    export_bert(
        checkpoint,
        directory,
        max_bytes=max_bytes,
        on_bytes=lambda count: progress.advance(count // 10**6),
    )
    progress.close()
    if checkpoint.config.model.bert_no_binary_head:
        print("the checkpoint has no binary head: exported as MegatronBertForMaskedLM")
    if not (directory / "tokenizer.json").exists():
        print("no vocabulary came with the checkpoint: exported without a tokenizer")


def certify(checkpoint: Checkpoint, directory: Path) -> float:
    """Compare the logits of both models, write the certificate, and return the difference.

    Raises:
        CheckpointError: `transformers` finds names missing or unexpected, or logits differ.
    """
    inputs = fixed_input(checkpoint)
    ours, theirs = native_logits(checkpoint, inputs), exported_logits(directory, checkpoint, inputs)
    differences = {name: (ours[name] - theirs[name]).abs().max().item() for name in ours}
    worst = max(differences.values())
    certificate = {
        "max_abs_logit_diff": worst,
        "max_abs_logit_diff_of": differences,
        "max_abs_logit": max(logits.abs().max().item() for logits in ours.values()),
        "dtype": "float32",
        "input": {name: tensor.tolist() for name, tensor in inputs.items()},
        "checkpoint": str(checkpoint.path),
        "iteration": checkpoint.iteration,
        "architecture": architecture(checkpoint.config.model),
        "versions": versions(),
    }
    (directory / CERTIFICATE).write_text(json.dumps(certificate) + "\n", encoding="utf-8")
    # Written so that NaN fails too.
    if not worst <= LARGEST_DIFFERENCE:
        raise CheckpointError(
            f"the logits of {checkpoint.path} and of the exported model differ by {worst:.2e}, "
            f"more than {LARGEST_DIFFERENCE}: nothing was written"
        )
    return worst


def fixed_input(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Two samples of two sentences, the second sample with padding at its end; i64[b, s] each."""
    model = checkpoint.config.model
    length = min(SEQUENCE_LENGTH, model.max_position_embeddings)
    generator = torch.Generator().manual_seed(SEED)
    assert model.vocab_size is not None
    ids = torch.randint(model.vocab_size, (2, length), generator=generator)
    positions = torch.arange(length).expand(2, length)
    real = positions < torch.tensor([[length], [length - length // 3]])
    return {
        "input_ids": ids,
        "attention_mask": real.long(),
        "token_type_ids": (positions >= length // 2).long(),
    }


@torch.no_grad()
def native_logits(
    checkpoint: Checkpoint, inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The logits of our model, run in this process in float32."""
    model_config = dataclasses.replace(checkpoint.config.model, fp16=False, bf16=False, fp64=False)
    config = dataclasses.replace(checkpoint.config, model=model_config)
    stage = Stage(0, 1, 0, model_config.num_layers)
    model = build_bert(config, ParallelState.single(), stage).eval()
    specs = {p.shard_spec: p for p in model.parameters()}  # type: ignore[attr-defined]
    checkpoint.stored.load(
        {spec.key: GlobalTensor.of(p, spec, rank=0, size=1) for spec, p in specs.items()}
    )
    masked_lm, next_sentence = model(
        inputs["input_ids"], inputs["attention_mask"].bool(), inputs["token_type_ids"]
    )
    logits = {"masked_lm": masked_lm[..., : model_config.vocab_size]}
    if next_sentence is not None:
        logits["next_sentence"] = next_sentence
    return logits


@torch.no_grad()
def exported_logits(
    directory: Path, checkpoint: Checkpoint, inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The logits of the exported model, run by stock `transformers` in float32."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model_class = getattr(transformers, architecture(checkpoint.config.model))
    model, report = model_class.from_pretrained(directory, output_loading_info=True)
    unknown = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys")}
    if any(unknown.values()):
        raise CheckpointError(f"transformers {transformers.__version__} finds {unknown}")
    outputs: Any = model.float().eval()(**inputs)
    if checkpoint.config.model.bert_no_binary_head:
        return {"masked_lm": outputs.logits}
    return {
        "masked_lm": outputs.prediction_logits,
        "next_sentence": outputs.seq_relationship_logits,
    }


def versions() -> dict[str, str]:
    """Versions of everything that took part in the comparison."""
    import transformers

    return {
        "megatron": megatron.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def move_into_place(aside: Path, save: Path) -> None:
    """Give the complete directory its name, and only then delete an earlier conversion."""
    earlier = save.parent / f".{save.name}.old"
    shutil.rmtree(earlier, ignore_errors=True)
    if save.exists():
        save.rename(earlier)
    aside.rename(save)
    shutil.rmtree(earlier, ignore_errors=True)


if __name__ == "__main__":
    run_command(main)
