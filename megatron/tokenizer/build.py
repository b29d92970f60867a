"""The tokenizer that the flags ask for."""

from pathlib import Path

from megatron.config import DataConfig
from megatron.errors import ConfigError
from megatron.tokenizer.byte_level import load_byte_level
from megatron.tokenizer.tokenizer import Tokenizer
from megatron.tokenizer.wordpiece import load_wordpiece

TOKENIZER_TYPES = ("BertWordPieceLowerCase", "BertWordPieceCase", "GPT2BPETokenizer")


def build_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer of --tokenizer-type, --vocab-file and --merge-file.

    Raises ConfigError where a flag is missing, DataError where a file is missing or damaged.
    """
    return load_tokenizer(data.tokenizer_type, data.vocab_file, data.merge_file)


def load_tokenizer(
    tokenizer_type: str | None, vocab_file: str | None, merge_file: str | None
) -> Tokenizer:
    """As `build_tokenizer`, from the values of the three flags."""
    if tokenizer_type not in TOKENIZER_TYPES:
        found = "is not given" if tokenizer_type is None else f"{tokenizer_type} is not known"
        raise ConfigError(f"--tokenizer-type {found}; expected {', '.join(TOKENIZER_TYPES)}")
    if vocab_file is None:
        raise ConfigError(f"--tokenizer-type {tokenizer_type} needs --vocab-file")
    if tokenizer_type != "GPT2BPETokenizer":
        lower_case = tokenizer_type == "BertWordPieceLowerCase"
        return load_wordpiece(Path(vocab_file), lower_case=lower_case)
    if merge_file is None:
        raise ConfigError(f"--tokenizer-type {tokenizer_type} needs --merge-file")
    return load_byte_level(Path(vocab_file), Path(merge_file))
