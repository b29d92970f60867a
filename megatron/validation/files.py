"""Files and directories that the flags name, and what they are to hold."""

import re
from pathlib import Path

from megatron.blend import parse_blend
from megatron.errors import ConfigError
from megatron.validation.checks import Checks

checks = Checks()


@checks.add
def datasets_exist(data_path: tuple[str, ...]) -> None:
    problems: list[str] = []
    for _, prefix in parse_blend(data_path):
        if prefix.endswith((".idx", ".bin")):
            problems.append(f"--data-path {prefix} is a file: give its path without {prefix[-4:]}")
            continue
        problems += (
            f"--data-path {prefix}: {prefix}{suffix} does not exist"
            for suffix in (".idx", ".bin")
            if not Path(prefix + suffix).is_file()
        )
    if problems:
        raise ConfigError(problems)


@checks.add
def vocabulary_exists(vocab_file: str | None) -> None:
    _must_be_a_file("--vocab-file", vocab_file)


@checks.add
def merge_rules_exist(merge_file: str | None) -> None:
    _must_be_a_file("--merge-file", merge_file)


@checks.add
def sentence_piece_model_exists(tokenizer_model: str | None) -> None:
    _must_be_a_file("--tokenizer-model", tokenizer_model)


def _must_be_a_file(option: str, path: str | None) -> None:
    if path is not None and not Path(path).is_file():
        state = "is no file" if Path(path).exists() else "does not exist"
        raise ConfigError(f"{option} {path} {state}")


@checks.add
def tokenizer_has_its_files(
    tokenizer_type: str | None,
    vocab_file: str | None,
    merge_file: str | None,
    tokenizer_model: str | None,
) -> None:
    found = {
        "--vocab-file": vocab_file,
        "--merge-file": merge_file,
        "--tokenizer-model": tokenizer_model,
    }
    missing = [
        f"--tokenizer-type {tokenizer_type} needs {option}"
        for option in _files_of(tokenizer_type)
        if found[option] is None
    ]
    if missing:
        raise ConfigError(missing)


def _files_of(tokenizer_type: str | None) -> tuple[str, ...]:
    match tokenizer_type:
        case None:
            return ()
        case "SentencePieceTokenizer":
            return ("--tokenizer-model",)
        case "GPT2BPETokenizer":
            return ("--vocab-file", "--merge-file")
        case _:
            return ("--vocab-file",)


@checks.add
def split_has_weights(split: str) -> None:
    weights = [part.strip() for part in re.split("[,/]", split)]
    if (
        len(weights) > 3
        or not all(re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight) for weight in weights)
        or sum(map(float, weights)) == 0
    ):
        raise ConfigError(
            f"--split {split!r}: expected up to three weights, for training, validation and test, "
            'such as "969, 30, 1"'
        )


@checks.add
def checkpoint_directories_are_usable(save: str | None, load: str | None) -> None:
    problems = [
        f"{option} {path} is a file, not a directory"
        for option, path in (("--save", save), ("--load", load))
        if path is not None and Path(path).is_file()
    ]
    # The first start of a run that saves and loads in one place finds nothing there yet.
    if load is not None and load != save and not Path(load).exists():
        problems.append(f"--load {load} does not exist")
    if problems:
        raise ConfigError(problems)


@checks.add
def saving_has_a_place(save: str | None, save_interval: int | None) -> None:
    if save_interval is not None and save is None:
        raise ConfigError("--save-interval needs --save")


@checks.add
def finetuning_has_a_start(finetune: bool, load: str | None) -> None:
    if finetune and load is None:
        raise ConfigError("--finetune needs --load")
