"""The tokenizer that the flags ask for."""

from pathlib import Path

from megatron.config import DataConfig
from megatron.errors import ConfigError
from megatron.tokenizer import sentence_piece
from megatron.tokenizer.byte_level import load_byte_level
from megatron.tokenizer.tokenizer import Tokenizer
from megatron.tokenizer.wordpiece import load_wordpiece

TOKENIZER_TYPES = (
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
    "GPT2BPETokenizer",
    sentence_piece.TYPE,
)


def build_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer of --tokenizer-type and its files, with --vocab-extra-ids sentinels.

    Raises ConfigError where a flag is missing, DataError where a file is missing or damaged.
    """
    tokenizer = load_tokenizer(
        data.tokenizer_type, data.vocab_file, data.merge_file, data.tokenizer_model
    )
    return tokenizer.with_sentinels(data.vocab_extra_ids)


def load_tokenizer(
    tokenizer_type: str | None,
    vocab_file: str | None,
    merge_file: str | None,
    tokenizer_model: str | None = None,
) -> Tokenizer:
    """As `build_tokenizer`, from the values of the flags, without sentinels."""
    if tokenizer_type not in TOKENIZER_TYPES:
        found = "is not given" if tokenizer_type is None else f"{tokenizer_type} is not known"
        raise ConfigError(f"--tokenizer-type {found}; expected {', '.join(TOKENIZER_TYPES)}")

    def file(flag: str, value: str | None) -> Path:
        if value is None:
            raise ConfigError(f"--tokenizer-type {tokenizer_type} needs {flag}")
        return Path(value)

    if tokenizer_type == sentence_piece.TYPE:
        return sentence_piece.load_sentence_piece(file("--tokenizer-model", tokenizer_model))
    vocabulary = file("--vocab-file", vocab_file)
    if tokenizer_type == "GPT2BPETokenizer":
        return load_byte_level(vocabulary, file("--merge-file", merge_file))
    return load_wordpiece(vocabulary, lower_case=tokenizer_type == "BertWordPieceLowerCase")
