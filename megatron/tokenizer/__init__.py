"""Text to token ids and back, by the vocabularies that BERT and GPT models are trained with."""

from megatron.tokenizer.build import TOKENIZER_TYPES, build_tokenizer, load_tokenizer
from megatron.tokenizer.byte_level import load_byte_level
from megatron.tokenizer.tokenizer import Tokenizer
from megatron.tokenizer.wordpiece import load_wordpiece

__all__ = [
    "TOKENIZER_TYPES",
    "Tokenizer",
    "build_tokenizer",
    "load_byte_level",
    "load_tokenizer",
    "load_wordpiece",
]
