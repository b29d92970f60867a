"""Text to token ids and back, by the vocabularies that BERT, GPT and T5 models are trained with."""

from megatron.tokenizer.build import TOKENIZER_TYPES, build_tokenizer, load_tokenizer
from megatron.tokenizer.byte_level import load_byte_level
from megatron.tokenizer.fast import FastTokenizer
from megatron.tokenizer.sentence_piece import SentencePieceTokenizer, load_sentence_piece
from megatron.tokenizer.tokenizer import Tokenizer
from megatron.tokenizer.wordpiece import load_wordpiece

__all__ = [
    "TOKENIZER_TYPES",
    "FastTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "load_byte_level",
    "load_sentence_piece",
    "load_tokenizer",
    "load_wordpiece",
]
