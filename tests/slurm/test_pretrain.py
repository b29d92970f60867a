"""The SLURM job script: it ends in good order, is queued again, and goes on with the same bits."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import pretrain_gpt
from megatron.checkpoint.reader import Checkpoint
from megatron.errors import run_command
from megatron.monitor import read_metrics
from tests.training.corpus import Corpus, write_corpus

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
JOB_SCRIPT = ROOT / "examples" / "slurm" / "pretrain.sbatch"
LIMIT_SECONDS = 150


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Job:
    """A job that the stand-in for sbatch runs, below `directory`."""

    def __init__(
        self, directory: Path, command: list[str], nodes: int = 2, **environment: str
    ) -> None:
        self.directory = directory
        self.state = directory / "slurm" / "1"
        self._environment = os.environ | {
            "PATH": f"{HERE / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "STAND_IN": str(directory / "slurm"),
            "GPUS_PER_NODE": "1",
            "MASTER_PORT": str(_free_port()),
            "LOGS": str(directory / "logs"),
            "PET_LOCAL_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            **environment,
        }
        self._batch = subprocess.Popen(
            [
                HERE / "bin" / "sbatch",
                f"--nodes={nodes}",
                f"--output={directory}/%x-%j.out",
                str(JOB_SCRIPT),
                *command,
            ],
            env=self._environment,
            cwd=ROOT,
            start_new_session=True,
        )

    @property
    def output(self) -> str:
        return (self.directory / "pretrain-1.out").read_text()

    @property
    def requeues(self) -> int:
        path = self.state / "requeues"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait_for(self, path: Path) -> None:
        """Waits until the job has made a file."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not path.exists():
            assert self._batch.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def time_is_nearly_up(self) -> None:
        self._batch.send_signal(signal.SIGALRM)

    def is_preempted(self) -> None:
        self.scancel("--signal=TERM")

    def scancel(self, *words: str) -> None:
        subprocess.run([HERE / "bin" / "scancel", *words, "1"], env=self._environment, check=True)

    def wait(self) -> int:
        return self._batch.wait(LIMIT_SECONDS)

    def end(self) -> None:
        """Leaves nothing behind, whatever has happened."""
        if self._batch.poll() is None:
            self._batch.kill()
            tasks = (self.state / "tasks").read_text().split()
            for pid in (*tasks, (self.state / "batch.pid").read_text()):
                subprocess.run(["pkill", "-KILL", "--session", pid])


@contextmanager
def _job(directory: Path, command: list[str], **more: object) -> Iterator[Job]:
    job = Job(directory, command, **more)  # type: ignore[arg-type]
    try:
        yield job
    finally:
        job.end()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def _training(corpus: Corpus, directory: Path) -> list[str]:
    """The flags of a pipeline of two ranks with dropout, twelve steps of two micro-batches."""
    return corpus.flags(
        tokenizer_type="BertWordPieceLowerCase",
        pipeline_model_parallel_size=2,
        hidden_dropout=0.2,
        num_workers=1,
        eval_iters=0,
        log_interval=1,
        metrics_file=directory / "metrics.jsonl",
        save=directory / "run",
        load=directory / "run",
    )


GATED = str(HERE / "gated.py")


def _run_uninterrupted(flags: list[str]) -> None:
    """The two ranks without SLURM and torchrun."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    port = _free_port()
    ranks = [context.Process(target=_rank, args=(rank, port, flags)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(LIMIT_SECONDS)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert codes == [0, 0]


def _rank(rank: int, port: int, flags: list[str]) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ.update(place | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"})
    torch.set_num_threads(1)
    sys.argv = ["pretrain_gpt.py", *flags]
    run_command(pretrain_gpt.main)


def test_an_interrupted_job_ends_with_the_weights_of_an_uninterrupted_one(
    corpus: Corpus, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    _run_uninterrupted(_training(corpus, whole))
    gate = cut / "gate"
    gates = {"GATE": str(gate), "GATES": "7 0", "STAND_IN_PROCTRACK": "linuxproc"}
    with _job(cut, [GATED, *_training(corpus, cut)], **gates) as job:
        # Preempted in step 4: every process of both nodes gets SIGTERM. Step 5 ends knowing of it.
        job.wait_for(Path(f"{gate}-0"))
        job.is_preempted()
        assert job.wait() == 0, job.output
    assert job.requeues == 1
    endings = re.findall(r"ending after iteration (\d+): SIG\w+ asked for it; the same", job.output)
    assert endings == ["5"]
    assert job.output.rstrip().endswith("job 1 is done")

    expected, found = (Checkpoint.open(path / "run") for path in (whole, cut))
    assert found.run_state == expected.run_state
    assert found.stored.shapes == expected.stored.shapes
    for key in expected.stored.shapes:
        pair = (found.stored.read(key), expected.stored.read(key))
        torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True, msg=key)
    losses = [
        [(record["iteration"], record["loss"]) for record in read_metrics(path / "metrics.jsonl")]
        for path in (whole, cut)
    ]
    assert losses[0] == losses[1] and [step for step, _ in losses[1]] == list(range(1, 13))

    logs = sorted((cut / "logs").rglob("stdout.log"))
    places = [re.findall(r"restart-\d+|node-\d+", str(log)) for log in logs]
    expected_places = [[f"restart-00{i}", f"node-000{j}"] for i in range(2) for j in range(2)]
    assert places == expected_places
    assert re.findall(r"\[(.*)\] iteration +1/", job.output)[0] in (
        "node 0 rank 0",
        "node 1 rank 0",
    )
    text = "".join(log.read_text() for log in logs)
    assert [int(n) for n in re.findall(r"iteration +(\d+)/", text)] == list(range(1, 13))


def test_a_wrong_flag_ends_the_job(corpus: Corpus, tmp_path: Path) -> None:
    command = [GATED, *_training(corpus, tmp_path), "--train-iter", "3"]
    with _job(tmp_path, command, nodes=1, GATES="0") as job:
        assert job.wait() != 0
    assert job.requeues == 0
    assert "error: unknown flag --train-iter: did you mean --train-iters?" in job.output
    assert "failed with code 1; it is not requeued" in job.output


def _fake_ranks(directory: Path, then: str) -> Path:
    """A launch script with a rank on each node, which waits for SIGUSR1 and does `then`."""
    script = directory / "ranks.sh"
    script.write_text(
        f"""\
[[ "$*" == "--some-flag --exit-signal-handler" ]] || exit 3
cat > {directory}/rank-$NODE_RANK.py <<'END'
import os, signal
from pathlib import Path
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
Path("{directory}/waits-" + os.environ["NODE_RANK"]).touch()
signal.sigwait([signal.SIGUSR1])
{then}
END
exec setsid --wait "$PYTHON" {directory}/rank-$NODE_RANK.py
"""
    )
    return script


def test_ranks_are_told_until_they_listen(tmp_path: Path) -> None:
    twice = "signal.sigwait([signal.SIGUSR1])"
    script = _fake_ranks(tmp_path, twice)
    rendezvous = ("NODES", "GPUS_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "RDZV_ID")
    places = dict.fromkeys((*rendezvous, "LOG_DIR", "SLURM_NODEID"), "0")
    hurried = """
import sys
from examples.slurm import on_node
on_node.SECONDS_BETWEEN_REMINDERS = 0.1
sys.exit(on_node.main())
"""
    on_node = subprocess.Popen(
        [sys.executable, "-c", hurried, script, "--some-flag", "--exit-signal-handler"],
        env=os.environ | places | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
    )
    while not (tmp_path / "waits-0").exists():
        assert on_node.poll() is None
        time.sleep(0.01)
    on_node.terminate()
    assert on_node.wait(LIMIT_SECONDS) == 0


def test_a_signal_that_comes_before_a_node_listens_does_not_fail_the_job(tmp_path: Path) -> None:
    slow, gate = tmp_path / "python", tmp_path / "gate"
    slow.write_text(
        f"""\
#!/bin/bash
if [[ $1 == *on_node.py ]]; then touch {tmp_path}/starts && read -r < {gate}; fi
exec {sys.executable} "$@"
"""
    )
    slow.chmod(0o755)
    os.mkfifo(gate)
    opened = os.open(gate, os.O_RDWR)  # to write alone would wait for a reader, who may have failed
    script = _fake_ranks(tmp_path, "pass")
    with _job(tmp_path, [str(script), "--some-flag"], nodes=1, PYTHON=str(slow)) as job:
        job.wait_for(tmp_path / "starts")
        job.is_preempted()
        job.scancel("--signal=USR1")
        os.write(opened, b"go on\n")
        job.wait_for(tmp_path / "waits-0")
        job.is_preempted()
        assert job.wait() == 0, job.output
    os.close(opened)
    assert job.output.rstrip().endswith("job 1 is done")


INTERRUPTED = "Path(os.environ['MEGATRON_INTERRUPTED_FILE']).write_text('at an end')"


@pytest.mark.parametrize(
    ("then", "end", "goes_well", "line"),
    [
        (INTERRUPTED, Job.time_is_nearly_up, True, "job 1 is requeued: at an end"),
        ("pass", Job.is_preempted, True, "job 1 is done"),
        ("raise SystemExit(5)", Job.is_preempted, False, "job 1 failed with code"),
        (INTERRUPTED, Job.scancel, True, "job 1 is being ended by SLURM"),
    ],
    ids=["interrupted", "done", "failed", "cancelled"],
)
def test_what_becomes_of_a_job_when_its_steps_have_a_signal(
    tmp_path: Path, then: str, end: Callable[[Job], None], goes_well: bool, line: str
) -> None:
    script = _fake_ranks(tmp_path, then)
    with _job(tmp_path, [str(script), "--some-flag"]) as job:
        for node in range(2):
            job.wait_for(tmp_path / f"waits-{node}")
        script.write_text("exit 0")  # what a second start does
        end(job)
        assert (job.wait() == 0) is goes_well, job.output
    assert line in job.output
    assert job.requeues == ("requeued:" in line)
