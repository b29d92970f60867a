"""Learns a vocabulary from text.

    python tools/train_tokenizer.py --type wordpiece --input corpus.jsonl --vocab-size 8192 \
        --output tokenizer

`--type wordpiece` writes vocab.txt for BERT, `--type bpe` writes vocab.json and merges.txt for GPT;
both write tokenizer.json and tokenizer_config.json, so that stock transformers loads the directory.
The same text gives the same vocabulary.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tokenizers
from tokenizers import trainers
from tokenizers.pre_tokenizers import ByteLevel

from megatron.data.jsonl import parse_line, read_lines
from megatron.errors import DataError, run_command
from megatron.tokenizer import FastTokenizer, byte_level, load_byte_level, load_wordpiece, wordpiece

MAX_ALPHABET = 1000
MIN_FREQUENCY = 2


def main() -> None:
    """Read the command line, train and save."""
    parser = argparse.ArgumentParser(prog="train_tokenizer.py", description=__doc__.split("\n")[0])
    parser.add_argument("--type", required=True, choices=("wordpiece", "bpe"))
    parser.add_argument("--input", required=True, nargs="+", type=Path, help="JSONL files")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys of the texts")
    parser.add_argument("--vocab-size", required=True, type=int, help="tokens to learn")
    parser.add_argument("--output", required=True, type=Path, help="directory to write")
    parser.add_argument("--cased", action="store_true", help="wordpiece: keep upper case")
    options = parser.parse_args()
    if options.cased and options.type == "bpe":
        parser.error("argument --cased: byte-pair encoding always keeps upper case")
    if options.vocab_size < 1:
        parser.error(f"argument --vocab-size: {options.vocab_size} is not above 0")

    texts = list(read_texts(options.input, options.json_keys))
    with tempfile.TemporaryDirectory() as scratch:
        if options.type == "wordpiece":
            trained = train_wordpiece(texts, options.vocab_size, options.cased, Path(scratch))
        else:
            trained = train_byte_level(texts, options.vocab_size, Path(scratch))
        trained.save(options.output)
    print(f"{options.output}: {trained.vocab_size:,} tokens, {trained.type}")


def read_texts(paths: Sequence[Path], keys: Sequence[str]) -> Iterator[str]:
    """The texts of JSONL files."""
    for path, number, line in read_lines(paths):
        yield from parse_line(path, number, line, keys)


def train_wordpiece(
    texts: Iterable[str], vocab_size: int, cased: bool, directory: Path
) -> FastTokenizer:
    """A WordPiece tokenizer of at most `vocab_size` tokens, its vocabulary in `directory`."""
    special = list(wordpiece.SPECIAL.values())
    backend = wordpiece.wordpiece_backend(
        {token: i for i, token in enumerate(special)}, lower_case=not cased
    )
    letters = _alphabet(texts, backend)
    # The trainer numbers "##" letters in the order of a hash table with a random seed, and breaks
    # ties by number. Given as special tokens they have their numbers beforehand.
    first = special + letters + [wordpiece.CONTINUATION + letter for letter in letters]
    _check_size(vocab_size, len(first))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=first,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        continuing_subword_prefix=wordpiece.CONTINUATION,
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(texts, trainer)
    backend.model.save(str(directory))
    return load_wordpiece(directory / "vocab.txt", lower_case=not cased)


def train_byte_level(texts: Iterable[str], vocab_size: int, directory: Path) -> FastTokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, its vocabulary in `directory`."""
    special = list(byte_level.SPECIAL.values())
    backend = byte_level.byte_level_backend({}, [])
    letters = ByteLevel.alphabet()
    _check_size(vocab_size, len(special) + len(letters))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=special,
        initial_alphabet=letters,
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(texts, trainer)
    backend.model.save(str(directory))
    return load_byte_level(directory / "vocab.json", directory / "merges.txt")


def _alphabet(texts: Iterable[str], backend: tokenizers.Tokenizer) -> list[str]:
    """The commonest letters after normalisation, in the order of their code points."""
    assert backend.normalizer is not None
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(backend.normalizer.normalize_str(text))
    for space in [letter for letter in counts if letter.isspace()]:
        del counts[space]
    by_count = sorted(counts, key=lambda letter: (-counts[letter], letter))
    return sorted(by_count[:MAX_ALPHABET])


def _check_size(vocab_size: int, least: int) -> None:
    if vocab_size < least:
        raise DataError(
            f"--vocab-size {vocab_size} is too small: special tokens and letters take {least}"
        )


if __name__ == "__main__":
    run_command(main)
