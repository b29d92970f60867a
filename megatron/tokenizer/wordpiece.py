"""BERT's WordPiece: words cut into the longest known pieces, "##" before all but the first."""

from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from megatron.errors import DataError
from megatron.tokenizer.fast import FastTokenizer
from megatron.tokenizer.vocabulary import read_text, require_special

CONTINUATION = "##"
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
# What opens and ends the text of an encoder serves a decoder and documents as well.
MORE_ROLES = {"bos": SPECIAL["cls"], "eos": SPECIAL["sep"], "eod": SPECIAL["sep"]}


def load_wordpiece(vocab_file: Path, *, lower_case: bool) -> FastTokenizer:
    """The tokenizer of a `vocab.txt`, which holds one token a line, in the order of ids.

    Raises DataError where the file is missing, repeats a token or lacks a special one.
    """
    tokens = read_text(vocab_file).removesuffix("\n").split("\n")
    tokens = [token.removesuffix("\r") for token in tokens]
    ids: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if token in ids:
            raise DataError(
                f"{vocab_file}: line {index + 1} repeats the token {token!r} of line "
                f"{ids[token] + 1}"
            )
        ids[token] = index
    require_special(vocab_file, ids, SPECIAL.values())
    names = {f"{role}_token": text for role, text in SPECIAL.items()}
    return FastTokenizer(
        type="BertWordPieceLowerCase" if lower_case else "BertWordPieceCase",
        backend=wordpiece_backend(ids, lower_case=lower_case),
        special=SPECIAL | MORE_ROLES,
        starts_word=np.array([not token.startswith(CONTINUATION) for token in tokens]),
        files=(vocab_file,),
        settings={"tokenizer_class": "BertTokenizer", "do_lower_case": lower_case, **names},
    )


def wordpiece_backend(ids: dict[str, int], *, lower_case: bool) -> tokenizers.Tokenizer:
    """BERT's rules over a vocabulary: clean text, cut at spaces and punctuation, then pieces."""
    model = models.WordPiece(ids, unk_token=SPECIAL["unk"], continuing_subword_prefix=CONTINUATION)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix=CONTINUATION)
    return backend
