"""Turns JSONL into indexed datasets of token ids.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \
        --tokenizer-type BertWordPieceLowerCase --vocab-file tokenizer/vocab.txt --split-sentences

1. Lines are read in blocks and handed to worker processes, never more than a few ahead.
2. A worker parses the lines, cuts the texts into sentences if asked to, and makes token ids.
3. The main process appends the results in the order of the input, so that the number of workers
   changes nothing in the output.

For each key the result is PREFIX_KEY_document or PREFIX_KEY_sentence, with .bin and .idx. Both
appear when everything has succeeded; an error leaves nothing behind.
"""

import argparse
import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import numpy.typing as npt

from megatron.data.indexed_dataset import build_indexed_dataset, token_dtype
from megatron.data.jsonl import parse_line, read_lines
from megatron.data.progress import Progress
from megatron.data.sentences import split_sentences
from megatron.errors import ConfigError, DataError, run_command
from megatron.tokenizer import TOKENIZER_TYPES, Tokenizer, load_tokenizer

BLOCK_BYTES = 1 << 18

Lines = list[tuple[Path, int, bytes]]


@dataclass(frozen=True)
class Encoded:
    """The documents of a block of lines for one key."""

    tokens: npt.NDArray[Any]
    sizes: npt.NDArray[np.int32]  # tokens of each sequence
    sequences: npt.NDArray[np.int64]  # sequences of each document
    skipped: int  # documents without any token


@dataclass(frozen=True)
class Encoder:
    """What a worker does with a block of lines."""

    tokenizer_type: str
    vocab_file: str | None
    merge_file: str | None
    tokenizer_model: str | None
    keys: tuple[str, ...]
    split_sentences: bool
    keep_newlines: bool
    append_eod: bool

    def load(self) -> Tokenizer:
        """The tokenizer; raises ConfigError where it lacks an end-of-document token to append."""
        tokenizer = load_tokenizer(
            self.tokenizer_type, self.vocab_file, self.merge_file, self.tokenizer_model
        )
        if self.append_eod and tokenizer.eod is None:
            raise ConfigError(f"--append-eod: {tokenizer.files[0]} has no token that ends a text")
        return tokenizer

    def encode(self, tokenizer: Tokenizer, lines: Lines) -> list[Encoded]:
        """The documents of all lines, for each key."""
        texts = [parse_line(*line, self.keys) for line in lines]
        return [self._encode_texts(tokenizer, column) for column in zip(*texts, strict=True)]

    def _encode_texts(self, tokenizer: Tokenizer, texts: Sequence[str]) -> Encoded:
        pieces = [self._sequences(text) for text in texts]
        ids = iter(tokenizer.tokenize_batch([piece for document in pieces for piece in document]))
        eod = tokenizer.eod if self.append_eod else None
        sequences: list[list[int]] = []
        counts: list[int] = []
        for document in pieces:
            encoded = [tokens for tokens in (next(ids) for _ in document) if tokens]
            if encoded:
                if eod is not None:
                    encoded[-1].append(eod)
                counts.append(len(encoded))
                sequences += encoded
        flat = [token for sequence in sequences for token in sequence]
        return Encoded(
            np.array(flat, token_dtype(tokenizer.vocab_size)),
            np.array([len(sequence) for sequence in sequences], np.int32),
            np.array(counts, np.int64),
            len(texts) - len(counts),
        )

    def _sequences(self, text: str) -> list[str]:
        if not self.split_sentences:
            return [text]
        return split_sentences(text, keep_newlines=self.keep_newlines)


def main() -> None:
    """Read the command line and write the datasets."""
    options = parse_options()
    encoder = Encoder(
        options.tokenizer_type,
        options.vocab_file,
        options.merge_file,
        options.tokenizer_model,
        tuple(options.json_keys),
        options.split_sentences,
        options.keep_newlines,
        options.append_eod,
    )
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # --workers says how many cores to use
    tokenizer = encoder.load()
    level = "sentence" if options.split_sentences else "document"
    prefixes = [f"{options.output_prefix}_{key}_{level}" for key in options.json_keys]
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        dtype = token_dtype(tokenizer.vocab_size)
        builders = [stack.enter_context(build_indexed_dataset(p, dtype)) for p in prefixes]
        documents = skipped = 0
        progress = Progress("processed", "documents", every=options.log_interval)
        for count, size, encoded in run(encoder, tokenizer, options.input, options.workers):
            for builder, part in zip(builders, encoded, strict=True):
                builder.add(part.tokens, part.sizes, part.sequences)
                skipped += part.skipped
            documents += count
            rate = size / 1e6 / max(time.monotonic() - started, 1e-9)
            progress.advance(documents, note=f"{rate:.2f} MB/s")
        progress.close()
        totals = [(builder.documents, builder.sequences, builder.tokens) for builder in builders]
        for prefix, total in zip(prefixes, totals, strict=True):
            if not total[0]:
                raise DataError(f"{prefix}: the corpus holds no text, nothing to write")
    for prefix, (documents, sequences, tokens) in zip(prefixes, totals, strict=True):
        print(f"{prefix}: {documents:,} documents, {sequences:,} sequences, {tokens:,} tokens")
    if skipped:
        print(f"skipped {skipped:,} documents without any token")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="preprocess_data.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--input", required=True, nargs="+", type=Path, help="JSONL files")
    add("--output-prefix", required=True, help="beginning of the output's path")
    add("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    add("--json-keys", nargs="+", default=["text"], help="keys of the texts; a dataset for each")
    add("--split-sentences", action="store_true", help="a sequence for each sentence, as for BERT")
    add("--keep-newlines", action="store_true", help="leave line breaks behind their sentence")
    add("--vocab-file", help="vocabulary: vocab.txt or vocab.json")
    add("--merge-file", help="merge rules of byte-pair encoding")
    add("--tokenizer-model", help="model of the SentencePiece tokenizer")
    add("--append-eod", action="store_true", help="end each document with its special token")
    add("--dataset-impl", choices=("mmap",), help="obsolete, there is no other kind")
    add("--workers", type=int, default=1, help="processes that make tokens")
    add("--log-interval", type=int, default=100, help="documents between two reports")
    options = parser.parse_args()
    if options.dataset_impl:
        print("--dataset-impl is obsolete: datasets are always memory-mapped", file=sys.stderr)
    for name in ("workers", "log_interval"):
        if getattr(options, name) < 1:
            flag = "--" + name.replace("_", "-")
            parser.error(f"argument {flag}: {getattr(options, name)} is not at least 1")
    if options.keep_newlines and not options.split_sentences:
        parser.error("argument --keep-newlines: needs --split-sentences")
    return options


def run(
    encoder: Encoder, tokenizer: Tokenizer, paths: Sequence[Path], workers: int
) -> Iterator[tuple[int, int, list[Encoded]]]:
    """Lines, bytes read so far and the encoded documents of each block, in the order of input."""
    blocks = _blocks(read_lines(paths))
    size = 0
    if workers == 1:
        for block in blocks:
            size += sum(len(line) for *_, line in block)
            yield len(block), size, encoder.encode(tokenizer, block)
        return
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(encoder,)) as pool:
        try:
            for block, encoded in _map_ahead(pool, blocks, 3 * workers):
                size += sum(len(line) for *_, line in block)
                yield len(block), size, encoded
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed; is there memory for --workers?"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _blocks(lines: Iterable[tuple[Path, int, bytes]]) -> Iterator[Lines]:
    block: Lines = []
    size = 0
    for line in lines:
        block.append(line)
        size += len(line[2])
        if size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _map_ahead(
    pool: ProcessPoolExecutor, blocks: Iterable[Lines], ahead: int
) -> Iterator[tuple[Lines, list[Encoded]]]:
    """Each block with its documents, in order; at most `ahead` blocks are in the pool's hands."""
    pending: deque[tuple[Lines, Future[list[Encoded]]]] = deque()
    for block in blocks:
        pending.append((block, pool.submit(_work, block)))
        if len(pending) == ahead:
            block, future = pending.popleft()
            yield block, future.result()
    for block, future in pending:
        yield block, future.result()


_worker: tuple[Encoder, Tokenizer]


def _start_worker(encoder: Encoder) -> None:
    global _worker
    _worker = encoder, encoder.load()


def _work(lines: Lines) -> list[Encoded]:
    encoder, tokenizer = _worker
    return encoder.encode(tokenizer, lines)


if __name__ == "__main__":
    run_command(main)
