"""Real runs on four processes: killed at any moment, and failing on one rank."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch

from megatron.checkpoint.reader import Checkpoint
from megatron.monitor import read_metrics
from tests.training.corpus import Corpus, write_corpus

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
LIMIT_SECONDS = 240


def _start(script: Path, flags: list[str], output: Path) -> subprocess.Popen[bytes]:
    """Starts a script on four ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with output.open("wb") as file:
        return subprocess.Popen(
            [*launcher, "--nproc-per-node", "4", str(script), *flags],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )


def _pretrain(corpus: Corpus, directory: Path, **flags: object) -> subprocess.Popen[bytes]:
    """Starts a run that saves every third iteration in `directory` and continues from there."""
    directory.mkdir(exist_ok=True)
    places = {"save": directory / "run", "load": directory / "run", "save_interval": 3}
    metrics = {"metrics_file": directory / "metrics.jsonl"}
    every = corpus.flags(**LAYOUT, **places, **metrics, hidden_dropout=0.2, **flags)
    return _start(ROOT / "pretrain_bert.py", every, directory / "output.txt")


def _iterations(directory: Path) -> list[int]:
    path = directory / "metrics.jsonl"
    return [int(r["iteration"]) for r in read_metrics(path) if "loss" in r] if path.exists() else []


def _kill_after(
    run: subprocess.Popen[bytes], directory: Path, iterations: int, more: float
) -> None:
    """SIGKILL to the launcher, `more` seconds after the run has reported `iterations`.

    The ranks are in sessions of their own and have to notice by themselves.
    """
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(_iterations(directory)) < iterations and run.poll() is None:
        assert time.monotonic() < deadline, (directory / "output.txt").read_text()
        time.sleep(0.01)
    time.sleep(more)
    run.kill()
    run.wait()


def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(
    corpus: Corpus, tmp_path: Path
) -> None:
    seed = random.randrange(1000)
    print(f"seed {seed}")
    chance = random.Random(seed)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _pretrain(corpus, whole).wait(LIMIT_SECONDS) == 0, (whole / "output.txt").read_text()
    run = _pretrain(corpus, killed)
    _kill_after(run, killed, chance.randint(1, 11), more=0.1 * chance.random())
    assert _pretrain(corpus, killed).wait(LIMIT_SECONDS) == 0, (killed / "output.txt").read_text()

    expected, found = (Checkpoint.open(path / "run") for path in (whole, killed))
    assert found.run_state == expected.run_state
    assert found.stored.shapes == expected.stored.shapes
    for key in expected.stored.shapes:
        pair = (found.stored.read(key), expected.stored.read(key))
        torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True, msg=key)
    assert _iterations(killed) == list(range(1, 13))
    losses = [
        [r["loss"] for r in read_metrics(path / "metrics.jsonl") if "loss" in r]
        for path in (whole, killed)
    ]
    assert losses[0] == losses[1]


def test_a_mistake_of_all_ranks_is_said_once(tmp_path: Path) -> None:
    damaged = write_corpus(tmp_path, largest_token=64)
    run = _pretrain(damaged, tmp_path / "run")
    assert run.wait(LIMIT_SECONDS) != 0
    output = (tmp_path / "run" / "output.txt").read_text()
    assert output.count("error: ") == 1
    assert "error: [rank 0]" in output and "is 64, outside the vocabulary of 64 tokens" in output


FAILING = """
from megatron.arguments import parse_config
from megatron.errors import DataError, run_command
from megatron.training import BertPretraining, pretrain
from megatron.training.initialize import own_rank

class FailsOnRankTwo(BertPretraining):
    counted = 0

    def denominators(self, batch):
        self.counted += 1
        if own_rank() == 2 and self.counted == 4:
            raise DataError("sample 6 is torn")
        return super().denominators(batch)

run_command(lambda: pretrain(parse_config(prog="failing.py"), FailsOnRankTwo))
"""


def test_a_mistake_of_one_rank_ends_them_all_with_its_message_alone(
    corpus: Corpus, tmp_path: Path
) -> None:
    script, output = tmp_path / "failing.py", tmp_path / "output.txt"
    script.write_text(FAILING)
    flags = corpus.flags(**LAYOUT, tokenizer_type="BertWordPieceLowerCase", eval_iters=0)
    assert _start(script, flags, output).wait(LIMIT_SECONDS) != 0
    text = output.read_text()
    assert text.count("error: ") == 1 and "error: [rank 2] sample 6 is torn" in text
    assert text.count("Traceback") == 1  # the launcher's own, about a failed rank


HANGING = """
import time
from megatron.arguments import parse_config
from megatron.errors import run_command
from megatron.training import BertPretraining, pretrain
from megatron.training.initialize import own_rank

class HangsOnRankTwo(BertPretraining):
    counted = 0

    def denominators(self, batch):
        self.counted += 1
        if own_rank() == 2 and self.counted == 4:
            time.sleep(3600)
        return super().denominators(batch)

run_command(lambda: pretrain(parse_config(prog="hanging.py"), HangsOnRankTwo))
"""


def test_a_rank_that_hangs_ends_the_run_and_all_say_what_they_wait_for(
    corpus: Corpus, tmp_path: Path
) -> None:
    script, output = tmp_path / "hanging.py", tmp_path / "output.txt"
    script.write_text(HANGING)
    limit = {"eval_iters": 0, "distributed_timeout_minutes": 0.2}
    flags = corpus.flags(**LAYOUT, tokenizer_type="BertWordPieceLowerCase", **limit)
    assert _start(script, flags, output).wait(LIMIT_SECONDS) != 0
    text = output.read_text()
    receives = "rank 0, stage 0, waits to receive the gradient of micro-batch 0 from rank 2; "
    assert receives in text, text
    assert f"rank 2 waits for no other rank; it is in denominators, {script} line 14" in text, text
