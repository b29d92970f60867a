"""What training would refuse is found before it is started, all of it at once."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import pretrain_bert
import pretrain_gpt
import pretrain_t5
from megatron import arguments
from megatron.config import Config
from megatron.data import build_indexed_dataset
from megatron.planner.preflight import preflight
from megatron.training import BertPretraining, GPTPretraining, T5Pretraining, Task
from tests.training.command import Command
from tests.training.corpus import Corpus, write_corpus


@dataclass(frozen=True)
class Kind:
    """A program, what it trains, and the flags by which it takes the corpus of these tests."""

    program: ModuleType
    task: Callable[[Config], Task]
    flags: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "bert": Kind(pretrain_bert, BertPretraining),
    "gpt": Kind(pretrain_gpt, GPTPretraining, {"tokenizer_type": "BertWordPieceLowerCase"}),
    "t5": Kind(pretrain_t5, T5Pretraining, {"vocab_extra_ids": 10, "decoder_seq_length": 8}),
}


class Place:
    """A corpus of the test's own, a run of it, and what the preflight says of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.corpus: Corpus = write_corpus(directory)
        self.prefix = self.corpus.prefix

    def file(self, name: str) -> Path:
        """A file where a directory would have to be."""
        path = self.directory / name
        path.write_text("not a directory\n")
        return path

    def words(self, kind: str, **flags: object) -> list[str]:
        return self.corpus.flags(**{"train_iters": 2, **KINDS[kind].flags, **flags})

    def config(self, kind: str, **flags: object) -> Config:
        """The configuration, as a dry run has it though files are missing."""
        defaults = {"model_type": kind, "tokenizer_type": "BertWordPieceLowerCase"}
        words = [*self.words(kind, **flags), "--dry-run"]
        return arguments.read_command(words, defaults=defaults).config

    def problems(
        self, kind: str, checkpoint_bytes: int | None = None, **flags: object
    ) -> list[str]:
        config = self.config(kind, **flags)
        before = _state(self.directory)
        found = preflight(config, KINDS[kind].task(config), 1, checkpoint_bytes)
        assert _state(self.directory) == before, "the preflight has written something"
        return found


def _state(directory: Path) -> dict[str, tuple[int, int]]:
    stats = {str(path): path.stat() for path in directory.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def train(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, list[str]]]:
    """Runs a program: its exit status and the lines of its errors."""

    def run(kind: str, words: list[str]) -> tuple[int, list[str]]:
        command = Command(KINDS[kind].program, capfd, monkeypatch)
        status = command(words)
        return status, re.findall(r"^error: (.*)$", command.err, re.MULTILINE)

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_sound_run_nothing_is_said(place: Place, kind: str) -> None:
    places = {
        "save": place.directory / "new" / "run",
        "metrics_file": place.directory / "new" / "metrics.jsonl",
        "tensorboard_dir": place.directory / "new" / "curves",
        "profile_steps": "1:2",
        "profile_dir": place.directory / "new" / "profile",
        "data_cache_dir": place.directory / "new" / "cache",
    }
    assert place.problems(kind, checkpoint_bytes=1000, **places) == []


@pytest.mark.parametrize("kind", KINDS)
def test_without_data_nothing_is_said_of_it(place: Place, kind: str) -> None:
    flags = {"data_path": None, "vocab_file": None, "vocab_size": 1000}
    assert place.problems(kind, **flags) == []
    place.corpus.vocab_file.unlink()
    assert place.problems(kind, data_path=None, vocab_size=1000) == [
        f"--vocab-file {place.corpus.vocab_file} does not exist"
    ]


# What is done to a sound run: to its files, and by its flags, which are returned.
Damage = Callable[[Place], dict[str, object]]


def _cut(suffix: str, keep: float) -> Damage:
    def damage(place: Place) -> dict[str, object]:
        path = place.prefix.with_suffix(suffix)
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])
        return {}

    return damage


def _bytes(offset: int, value: bytes) -> Damage:
    def damage(place: Place) -> dict[str, object]:
        path = place.prefix.with_suffix(".idx")
        content = bytearray(path.read_bytes())
        content[offset : offset + len(value)] = value
        path.write_bytes(content)
        return {}

    return damage


def _dataset(sizes: list[int], sentences: list[int], dtype: str = "u2", token: int = 9) -> Damage:
    def damage(place: Place) -> dict[str, object]:
        with build_indexed_dataset(place.prefix, dtype) as builder:
            builder.add(np.full(sum(sizes), token), sizes, sentences)
        return {}

    return damage


def _gone(suffix: str) -> Damage:
    def damage(place: Place) -> dict[str, object]:
        place.prefix.with_suffix(suffix).unlink()
        return {}

    return damage


def _vocabulary(change: Callable[[str], str]) -> Damage:
    def damage(place: Place) -> dict[str, object]:
        path = place.corpus.vocab_file
        path.write_text(change(path.read_text()))
        return {}

    return damage


def _flags(**flags: object) -> Damage:
    return lambda place: flags


def _byte_pairs(place: Place) -> dict[str, object]:
    vocabulary, merges = place.directory / "vocab.json", place.directory / "merges.txt"
    vocabulary.write_text('{"<|endoftext|>": 0, "a": 1}')
    merges.write_text("#version\na b\n")
    return {
        "tokenizer_type": "GPT2BPETokenizer",
        "vocab_file": vocabulary,
        "merge_file": merges,
    }


def _metrics_of_something_else(place: Place) -> dict[str, object]:
    return {"metrics_file": place.file("metrics")}


REFUSED: dict[str, tuple[str, Damage, str]] = {
    "truncated-bin": (
        "bert",
        _cut(".bin", 0.5),
        r"within the \d+ bytes of .*\.bin; all its .* \d+",
    ),
    "truncated-idx": ("gpt", _cut(".idx", 0.9), r"\.idx: \d+ bytes; its header .* needs \d+"),
    "empty-idx": ("gpt", _cut(".idx", 0), r"\.idx: 0 bytes, too short"),
    "magic": ("t5", _bytes(0, b"X"), r"\.idx: offset 0 holds .* expected"),
    "version": ("bert", _bytes(9, b"\2"), r"\.idx: offset 9 holds version 2, expected 1"),
    "pointer": ("bert", _bytes(60, b"\xff\xff"), r"\.idx: offset \d+ places sequence"),
    "missing-idx": ("bert", _gone(".idx"), r"--data-path .*\.idx does not exist"),
    "missing-bin": ("gpt", _gone(".bin"), r"--data-path .*\.bin does not exist"),
    "no-prefix": ("gpt", _flags(data_path="/no/such"), r"--data-path /no/such: .*does not exist"),
    "weights": ("gpt", _flags(data_path=["x", "a", "1", "b"]), r"positive weight before a"),
    "empty": ("bert", _dataset([], []), r"leaves no document for train.*has 0 documents"),
    "floats": ("gpt", _dataset([40], [1], dtype="f8"), r"tokens are float64, expected whole"),
    "token": ("gpt", _dataset([40], [1], token=64), r"token 0 .*is 64, outside .* of 64 tokens"),
    "sentinel": ("t5", _dataset([40], [1], token=70), r"is 70, outside the vocabulary of 64"),
    "split": ("gpt", _flags(split="0,1"), r"--split '0,1' leaves no document for train"),
    "sentences": (
        "bert",
        _dataset([5] * 20, [1] * 20),
        r"16 of 16 .* single sentence .*--split-sen",
    ),
    "short": ("gpt", _dataset([9], [1]), r"9 tokens, --seq-length 16 needs 17"),
    "no-sentence": ("t5", _dataset([], [0] * 9), r"7 documents for train hold no sample"),
    "special": ("bert", _vocabulary(lambda t: t.replace("[MASK]", "x")), r"missing .*: \[MASK\]"),
    "repeated": ("t5", _vocabulary(lambda text: text + "w3\n"), r"line 65 repeats the token 'w3'"),
    "no-vocabulary": ("bert", _vocabulary(lambda text: ""), r"vocab.txt: the vocabulary is empty"),
    "merges": ("gpt", _byte_pairs, r"merges.txt: line 2 makes 'b', which .* lacks"),
    "vocab-size": (
        "gpt",
        _flags(vocab_size=60),
        r"--vocab-size 60 is less than the tokenizer's 64",
    ),
    "sentinels": ("t5", _flags(vocab_extra_ids=1), r"--vocab-extra-ids 1: T5 needs at least \d"),
    "length": ("bert", _flags(seq_length=4), r"--seq-length 4 is too short: BERT needs"),
    "metrics": ("gpt", _metrics_of_something_else, r"metrics, line 1: is not JSON"),
    "no-load": ("gpt", _flags(load="/no/such"), r"--load /no/such does not exist"),
    "apex": ("bert", _flags(kernels="apex"), r"--kernels apex: apex is not installed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_training_refuses_is_listed_in_its_words(
    place: Place, train: Callable[..., tuple[int, list[str]]], name: str
) -> None:
    kind, damage, message = REFUSED[name]
    flags = damage(place)
    found = place.problems(kind, **flags)
    assert any(re.search(message, line) for line in found), found
    status, errors = train(kind, place.words(kind, **flags))
    assert status in (1, 2) and errors
    assert set(errors) <= set(found)


@pytest.mark.parametrize("flag", ["metrics_file", "tensorboard_dir", "data_cache_dir", "save"])
def test_where_training_cannot_write_is_named(
    place: Place, train: Callable[..., tuple[int, list[str]]], flag: str
) -> None:
    below = place.file("file") / "below"
    (line,) = place.problems("gpt", **{flag: below})
    assert str(place.directory / "file") in line
    if flag != "data_cache_dir":
        assert line == f"--{flag.replace('_', '-')} {below}: {place.directory}/file is no directory"
    status, _ = train("gpt", place.words("gpt", **{flag: below}))
    # A run looks at where it will save before any work; the others it finds as it opens them.
    assert status == (2 if flag == "save" else 1)


@pytest.mark.parametrize("flag", ["save", "load"])
def test_a_file_is_no_directory_of_checkpoints(place: Place, flag: str) -> None:
    path = place.file("file")
    assert place.problems("gpt", **{flag: path}) == [f"--{flag} {path} is a file, not a directory"]


def test_index_files_serve_where_nothing_can_be_written_if_none_is_missing(
    place: Place, train: Callable[..., tuple[int, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"data_path": ["1", place.prefix, "2", place.prefix]}
    assert train("gpt", place.words("gpt", **flags))[0] == 0
    cache = place.directory / "index-cache"
    names = [path for path in cache.iterdir() if not path.name.startswith(".")]
    assert {path.name.split("_")[0] for path in names} == {"blend", "corpus"} and len(names) > 6

    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("megatron.data.check.why_not_writable", lambda directory: "read-only")
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert place.problems("gpt", **flags) == []
    for path in names:
        hidden = path.rename(path.with_suffix(".hidden"))
        (line,) = place.problems("gpt", **flags)
        assert line.startswith(f"{cache}: cannot write index files there (Permission denied)")
        hidden.rename(path)
    place.corpus.vocab_file.unlink()
    assert "read-only, so that training can only use index files" in place.problems("gpt")[-1]


# Checkpoints


@pytest.fixture
def saved(place: Place, train: Callable[..., tuple[int, list[str]]]) -> Path:
    """A checkpoint of GPT after two iterations."""
    run = place.directory / "run"
    assert train("gpt", place.words("gpt", save=run))[0] == 0
    return run / "iter_0000002"


def test_a_checkpoint_that_fits_is_no_problem(place: Place, saved: Path) -> None:
    run = saved.parent
    for flags in ({"save": run}, {"finetune": True}, {"bf16": True, "no_load_optim": True}):
        assert place.problems("gpt", load=run, **flags) == []
    assert place.problems("gpt", load=(empty := place.directory / "empty"), save=empty) == []


def _metadata(saved: Path) -> None:
    (saved / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


def _data(saved: Path) -> None:
    path = next(saved.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-100])


UNFIT: dict[str, tuple[Callable[[Path], object], dict[str, object], str]] = {
    "layers": (lambda saved: None, {"num_layers": 3}, "--num-layers is 2 there and 3 here"),
    "vocabulary": (lambda saved: None, {"vocab_size": 70}, "--vocab-size is 64 there and 70 here"),
    "optimizer": (lambda saved: None, {"optimizer": "sgd"}, "lacks .* of the optimizer's state"),
    "rates": (lambda saved: None, {"lr": 0.5}, "--lr: the checkpoint has .*, the flags give 0.5"),
    "metadata": (_metadata, {}, r"\.metadata is refused: it asks for \w+\.system"),
    "data": (_data, {}, r"\.distcp is truncated: \d+ bytes, expected \d+"),
    "state": (lambda saved: (saved / "run_state.json").unlink(), {}, "run_state.json is missing"),
    "config": (
        lambda saved: (saved / "config.yaml").write_text("a: 1"),
        {},
        "config.yaml: unknown",
    ),
    "gone": (lambda saved: saved.rename(saved.with_name("x")), {}, "is missing; .* iteration 2"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_checkpoint_that_does_not_fit_is_refused_in_trainings_words(
    place: Place, train: Callable[..., tuple[int, list[str]]], saved: Path, name: str
) -> None:
    damage, flags, message = UNFIT[name]
    damage(saved)
    flags = {"load": saved.parent, **flags}
    found = place.problems("gpt", **flags)
    assert re.search(message, "\n".join(found))
    status, errors = train("gpt", place.words("gpt", **flags))
    assert status in (1, 2) and set(errors) <= set(found)


def test_a_checkpoint_of_another_layout_is_no_problem(place: Place, saved: Path) -> None:
    # Two replicas, whose two samples each make the four of the run that saved.
    flags = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "world_size": 8}
    flags |= {"use_distributed_optimizer": True, "global_batch_size": None}
    config = place.config("gpt", load=saved.parent, **flags)
    assert preflight(config, GPTPretraining(config), 8, None) == []


# Packages


@pytest.mark.parametrize(
    ("package", "flags", "message"),
    [
        ("tensorboard", {"tensorboard_dir": "curves"}, "needs the package tensorboard: pip"),
        (
            "sentencepiece",
            {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": __file__},
            "needs the package sentencepiece: pip",
        ),
    ],
)
def test_a_missing_package_is_named(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    flags: dict[str, object],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (line,) = place.problems("gpt", **flags)
    assert message in line


# Together


def test_one_fault_hides_no_other(place: Place) -> None:
    place.corpus.vocab_file.unlink()
    damaged = _cut(".bin", 0.5)(place)
    run = place.directory / "run"
    run.mkdir()
    (run / "latest_checkpointed_iteration.txt").write_text("7\n")
    found = place.problems(
        "bert",
        checkpoint_bytes=1 << 60,
        data_path=["1", place.prefix, "2", "/no/such"],
        load=run,
        save=run,
        save_interval=1,
        metrics_file=place.file("file") / "below",
        kernels="apex",
        **damaged,
    )
    for message in (
        "--vocab-file .* does not exist",
        r"corpus_text_sentence\.idx: .* places sequence",
        r"--data-path /no/such: /no/such\.idx does not exist",
        r"--data-path /no/such: /no/such\.bin does not exist",
        "iter_0000007 is missing",
        "--save .* are free, expected 2 EiB at least",
        "--metrics-file .* is no directory",
        "--kernels apex",
    ):
        assert any(re.search(message, line) for line in found), (message, found)
    assert len(found) == len(set(found)) == 8


def test_what_is_unknown_is_no_fault_of_the_rest(place: Place, saved: Path) -> None:
    """Without a tokenizer a checkpoint's vocabulary serves, without --split nothing is split."""
    place.corpus.vocab_file.unlink()
    missing = f"--vocab-file {place.corpus.vocab_file} does not exist"
    empty = place.directory / "empty"
    assert place.problems("gpt", load=saved.parent) == [missing]
    assert place.problems("gpt", load=empty, save=empty) == [missing]
    empty.mkdir()
    assert place.problems("gpt", load=empty, save=empty) == [missing]
    no_checkpoint = f"--load {empty}: there is no checkpoint"
    assert place.problems("gpt", load=empty) == [missing, no_checkpoint]
    found = place.problems("gpt", split="a,b", load=empty)
    assert [line.split(":")[0] for line in found] == [
        f"--vocab-file {place.corpus.vocab_file} does not exist",
        "--split 'a,b'",
        f"--load {empty}",
    ]


def test_warnings_are_of_what_training_lives_with(
    place: Place, train: Callable[..., tuple[int, list[str]]]
) -> None:
    _dataset([5] * 40, [4] * 10)(place)
    flags: dict[str, Any] = {"split": "9,0.1,1", "reset_attention_mask": True}
    found = place.problems("gpt", **flags)
    assert [line.split(":")[0] for line in found] == ["warning"] * len(found)
    assert any("valid: skipped, since --split" in line for line in found)
    assert any("so that --reset-attention-mask has no effect" in line for line in found)
    assert train("gpt", place.words("gpt", **flags))[0] == 0


def test_many_datasets_need_many_open_files(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (15, 15))
    (line,) = place.problems("bert", data_path=[x for _ in range(4) for x in ("1", place.prefix)])
    assert "its 4 datasets keep 20 files open at least on each rank, where 15 are allowed" in line
    assert (
        place.problems("bert", data_path=[x for _ in range(3) for x in ("1", place.prefix)]) == []
    )
