"""Converts a checkpoint to another system's format, with a measured certificate.

    python tools/convert_checkpoint.py --from native --to hf --load runs/bert --save exported

1. The source's own configuration says what model it holds; no tensor is read yet.
2. The model is written aside in the other format, one tensor in memory at a time.
3. What was written is read back and compared: the values bit by bit, and the outputs of both models
   for one fixed input. The largest difference, its reasons, the input and the versions go to
   parity.json beside the result. More than 1e-3 is a failure, unless --accept-difference.
4. The directory is moved to its place.

docs/conversion.md says what converts to what.
"""

import argparse
import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from megatron.conversion import hugging_face, megatron_lm
from megatron.conversion.certificate import Side, compare
from megatron.conversion.native import read_native, write_native
from megatron.conversion.stored_model import Counted, StoredModel, TokenizerFiles
from megatron.data.progress import Progress
from megatron.errors import ConfigError, run_command
from megatron.tokenizer.build import TOKENIZER_TYPES

CERTIFICATE = "parity.json"
FORMATS = ["native", "megatron", "hf"]
# Flags that say something about one side only: the side, and the formats that know what to do.
MEANT_FOR = {
    "target_tensor_parallel_size": ("target", ["megatron"]),
    "target_pipeline_parallel_size": ("target", ["megatron"]),
    "target_virtual_pipeline_size": ("target", ["megatron"]),
    "target_split_rank": ("target", ["megatron"]),
    "target_version": ("target", ["megatron"]),
    "release": ("target", ["megatron"]),
    "iteration": ("target", ["megatron", "native"]),
    "max_shard_gb": ("target", ["hf"]),
    "vocab_size": ("source", ["megatron"]),
    "heads": ("source", ["megatron"]),
}
TOKENIZER_FLAGS = ("vocab_file", "merge_file", "tokenizer_model")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags.

    Raises:
        ConfigError: one is wrong, or has no meaning for this direction.
    """
    parser = _Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--from", dest="source", choices=FORMATS, required=True)
    parser.add_argument("--to", dest="target", choices=FORMATS, required=True)
    parser.add_argument(
        "--load",
        type=Path,
        required=True,
        help="what to convert: a directory, of which the latest checkpoint is read, or a file",
    )
    parser.add_argument(
        "--save",
        type=Path,
        required=True,
        help="directory to make; an earlier conversion there is replaced",
    )
    parser.add_argument(
        "--dtype",
        choices=["as-stored", "float32", "float16", "bfloat16"],
        default="as-stored",
        help="number format to convert the values to",
    )
    parser.add_argument(
        "--accept-difference",
        action="store_true",
        help="write the result even where its outputs differ by more than 1e-3",
    )
    _add_megatron_target(parser.add_argument_group("--to megatron"))
    group = parser.add_argument_group("--to hf")
    group.add_argument(
        "--max-shard-gb", type=float, help="largest weight file, in 10^9 bytes; 5 if not given"
    )
    group = parser.add_argument_group("--from megatron")
    group.add_argument(
        "--vocab-size", type=_positive, help="tokens before padding, where it cannot be told"
    )
    group.add_argument(
        "--heads",
        "--num-attention-heads",
        type=_positive,
        help="attention heads, where the checkpoint does not say",
    )
    group = parser.add_argument_group("tokenizer to put beside the model")
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES)
    for name in TOKENIZER_FLAGS:
        group.add_argument(_flag(name), type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    _check_direction(arguments)
    return arguments


def _add_megatron_target(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--target-tensor-parallel-size", type=_positive, help="1 if not given")
    group.add_argument("--target-pipeline-parallel-size", type=_positive, help="1 if not given")
    group.add_argument(
        "--target-virtual-pipeline-size",
        type=_positive,
        help="chunks of layers on each pipeline stage; 1 if not given",
    )
    group.add_argument(
        "--target-split-rank", type=_positive, help="stage at which T5's decoder begins"
    )
    group.add_argument(
        "--target-version",
        type=int,
        choices=[0, 1, 2, 3],
        help="checkpoint version; 3 if not given",
    )
    where = group.add_mutually_exclusive_group()
    where.add_argument("--release", action="store_true", default=None, help="name it `release`")
    where.add_argument(
        "--iteration", type=_count, help="name it after this iteration (also --to native)"
    )


def _check_direction(arguments: argparse.Namespace) -> None:
    problems = []
    for name, (side, formats) in MEANT_FOR.items():
        chosen = getattr(arguments, side)
        if getattr(arguments, name) is not None and chosen not in formats:
            option = "--to" if side == "target" else "--from"
            problems.append(f"{_flag(name)} has no meaning with {option} {chosen}")
    if arguments.max_shard_gb is not None and not 0 < arguments.max_shard_gb < math.inf:
        problems.append(f"--max-shard-gb: found {arguments.max_shard_gb}, expected more than 0")
    given = [name for name in TOKENIZER_FLAGS if getattr(arguments, name) is not None]
    if given and arguments.tokenizer_type is None:
        problems.append(f"{_flag(given[0])} needs --tokenizer-type")
    if arguments.tokenizer_type is not None and not given:
        problems.append("--tokenizer-type needs --vocab-file or --tokenizer-model")
    problems += [
        f"{_flag(name)} {file}: there is no such file"
        for name in given
        if not (file := getattr(arguments, name)).is_file()
    ]
    uses_hf = "hf" in (arguments.source, arguments.target)
    if uses_hf and importlib.util.find_spec("transformers") is None:
        option = "--to" if arguments.target == "hf" else "--from"
        problems.append(f"{option} hf needs the package transformers: pip install transformers")
    if problems:
        raise ConfigError(problems)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _positive(text: str) -> int:
    number = _count(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected at least 1")
    return number


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number")
    return int(text)


def main() -> None:
    arguments = parse_arguments()
    save: Path = arguments.save.resolve()  # a link stays, what it leads to is written
    take_back(save)
    check_free(save, arguments.load)
    stored = read(arguments)
    aside = save.parent / f".{save.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        written = write(stored, aside, arguments)
        certificate = certify(stored, written, aside, arguments)
        move_into_place(aside, save)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for line in (*certificate["notes"], *certificate["differences"]):
        print(f"note: {line}")
    print(
        f"{stored.path} -> {arguments.save}: largest difference between {certificate['compared']} "
        f"{certificate['max_abs_logit_diff']:.2e}"
    )


def take_back(save: Path) -> None:
    """Undo the first half of `move_into_place` where it was all that a killed run came to."""
    earlier = _earlier(save)
    if earlier.exists() and not save.exists():
        earlier.rename(save)


def check_free(save: Path, load: Path) -> None:
    """Raise ConfigError where `save` holds `load`, or anything but an earlier conversion."""
    if not save.exists():
        return
    if load.resolve().is_relative_to(save.resolve()):
        raise ConfigError(f"--save {save} holds what --load names; name another")
    certificate = save / CERTIFICATE
    if not certificate.is_file():
        raise ConfigError(f"--save {save} exists and is no earlier conversion; name another")
    try:
        written = json.loads(certificate.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return
    others = sorted({path.name for path in save.iterdir()} - {*written, CERTIFICATE})
    if others:
        raise ConfigError(
            f"--save {save} holds {others[0]}, which no conversion wrote there; name another"
        )


def read(arguments: argparse.Namespace) -> StoredModel:
    """The model to convert, with what the flags say of it."""
    load: Path = arguments.load
    if arguments.source == "native":
        stored = read_native(load)
    elif arguments.source == "megatron":
        stored = megatron_lm.read_megatron(
            load, heads=arguments.heads, vocab_size=arguments.vocab_size
        )
    else:
        stored = hugging_face.read_hugging_face(load)
    if arguments.tokenizer_type is not None:
        files = {name: getattr(arguments, name) for name in TOKENIZER_FLAGS}
        stored = stored.with_tokenizer(TokenizerFiles(type=arguments.tokenizer_type, **files))
    if arguments.dtype != "as-stored":
        stored = stored.with_dtype(getattr(torch, arguments.dtype))
    return stored


def write(stored: StoredModel, directory: Path, arguments: argparse.Namespace) -> StoredModel:
    """Write the model in the target's format, with progress on stderr, and open the result."""
    progress = Progress("wrote", "MB", total=stored.num_bytes // 10**6)

    def on_bytes(count: int) -> None:
        progress.advance(count // 10**6)

    written = _write(stored, directory, arguments, on_bytes)
    progress.close()
    return written


def _write(
    stored: StoredModel,
    directory: Path,
    arguments: argparse.Namespace,
    on_bytes: Callable[[int], None],
) -> StoredModel:
    if arguments.target == "hf":
        max_bytes = int((arguments.max_shard_gb or 5.0) * 1e9)
        return hugging_face.write_hugging_face_model(
            directory, stored, max_bytes=max_bytes, on_bytes=on_bytes
        )
    iteration = stored.iteration if arguments.iteration is None else arguments.iteration
    if arguments.target == "native":
        write_native(directory, stored, Counted(stored.source, on_bytes), iteration=iteration or 0)
        return read_native(directory)
    split = megatron_lm.Split(
        tensor=arguments.target_tensor_parallel_size or 1,
        pipeline=arguments.target_pipeline_parallel_size or 1,
        virtual=arguments.target_virtual_pipeline_size or 1,
        decoder_from=arguments.target_split_rank,
    )
    version = 3 if arguments.target_version is None else arguments.target_version
    return megatron_lm.write_megatron_model(
        directory,
        stored,
        split,
        version=version,
        iteration=None if arguments.release else iteration,
        on_bytes=on_bytes,
    )


def certify(
    stored: StoredModel, written: StoredModel, directory: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Compare both sides and put the certificate into `directory`; returns it."""
    source = Side(stored, str(stored.path), stock=hugging_face.runs_stock(stored))
    target = Side(written, str(arguments.save), stock=hugging_face.runs_stock(written))
    certificate = compare(source, target, accept_difference=arguments.accept_difference)
    certificate["files"] = sorted(path.name for path in directory.iterdir())
    (directory / CERTIFICATE).write_text(json.dumps(certificate) + "\n", encoding="utf-8")
    return certificate


def move_into_place(aside: Path, save: Path) -> None:
    """Give the complete directory its name, and only then delete an earlier conversion."""
    earlier = _earlier(save)
    shutil.rmtree(earlier, ignore_errors=True)
    if save.exists():
        save.rename(earlier)
    aside.rename(save)
    shutil.rmtree(earlier, ignore_errors=True)


def _earlier(save: Path) -> Path:
    """Where an earlier conversion waits while a new one takes its place."""
    return save.parent / f".{save.name}.old"


if __name__ == "__main__":
    run_command(main)
