"""sbatch, srun, scontrol and scancel as far as examples/slurm uses them, for one machine.

tests/slurm/bin holds a command for each. A "node" is a process; what a job is doing lies in the
directory $STAND_IN/JOB, where tests look at it:

    state          RUNNING or COMPLETING
    requeue        there while a requeue is asked for
    batch.pid      the process of the batch script
    tasks          process ids of the step's tasks, one on each node

sbatch runs the job at once and ends with it, with its exit code. Its clock is the test's: SIGALRM
says that the time limit is near, when it sends what the script's `--signal=B:...` asks for. A
signal to a step reaches its tasks alone or, with STAND_IN_PROCTRACK=linuxproc, all processes below
them, as with SLURM's plugins of that kind.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

HOST = "127.0.0.1"


def _directory(job: str) -> Path:
    return Path(os.environ["STAND_IN"]) / job


def _options(words: list[str]) -> dict[str, str]:
    """--name=value options, from a script's lines or from the front of a command line."""
    return dict(word.removeprefix("--").partition("=")[::2] for word in words)


def _own_options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options in front, and the command behind them."""
    first = next(i for i, word in enumerate(words) if not word.startswith("--"))
    return _options(words[:first]), words[first:]


def sbatch(words: list[str]) -> int:
    """Runs the job, again and again while it is requeued."""
    options, (script, *arguments) = _own_options(words)
    lines = Path(script).read_text().splitlines()
    stated = [line.split()[1] for line in lines if line.startswith("#SBATCH")]
    options = _options(stated) | options
    job = str(1 + len(list(Path(os.environ["STAND_IN"]).glob("[0-9]*"))))
    directory = _directory(job)
    directory.mkdir(parents=True)
    spooled = directory / "slurm_script"  # SLURM runs a copy, too
    shutil.copy(script, spooled)
    environment = os.environ | {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NAME": options["job-name"],
        "SLURM_JOB_NUM_NODES": options["nodes"],
        "SLURM_JOB_NODELIST": f"node[1-{options['nodes']}]",
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
        "SLURM_EXPORT_ENV": "NONE",  # as on clusters where users do not take their shell along
    }
    output = options["output"].replace("%x", options["job-name"]).replace("%j", job)
    warning = options["signal"].removeprefix("B:").partition("@")[0]
    assert options["signal"].startswith("B:") and "requeue" in options
    assert options["open-mode"] == "append"
    batch: subprocess.Popen[bytes] | None = None

    def time_is_nearly_up(*_: object) -> None:
        assert batch is not None
        batch.send_signal(signal.Signals[f"SIG{warning}"])

    signal.signal(signal.SIGALRM, time_is_nearly_up)
    restarts = 0
    while True:
        (directory / "state").write_text("RUNNING")
        again = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        with open(output, "ab") as file:
            batch = subprocess.Popen(
                ["bash", str(spooled), *arguments],
                env=environment | again,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        (directory / "batch.pid").write_text(str(batch.pid))
        code = batch.wait()
        if not (directory / "requeue").exists():
            return code
        (directory / "requeue").unlink()
        restarts += 1


def srun(words: list[str]) -> int:
    """Starts the command once for each node and waits; the highest exit code."""
    options, command = _own_options(words)
    nodes = os.environ["SLURM_JOB_NUM_NODES"]
    # Where the counts do not fit together, SLURM goes by that of the tasks, which sbatch may state.
    assert (options["nodes"], options["ntasks"], options["ntasks-per-node"]) == (nodes, nodes, "1")
    exported = options.get("export", os.environ["SLURM_EXPORT_ENV"])
    assert exported == "ALL", "what the job script has set does not reach the nodes"
    job = os.environ["SLURM_JOB_ID"]
    tasks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: object) -> None:
        _signal_tasks(job, signal.SIGKILL if number == signal.SIGTERM else signal.Signals(number))

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, forward)
    for node in map(str, range(int(nodes))):
        place = {"SLURM_NODEID": node, "SLURM_PROCID": node, "SLURM_LOCALID": "0"}
        tasks.append(
            subprocess.Popen(
                command, env=os.environ | place | {"SLURM_STEP_ID": "0"}, start_new_session=True
            )
        )
    (_directory(job) / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    while any(task.poll() is None for task in tasks):
        if options.get("kill-on-bad-exit") == "1" and any(task.poll() for task in tasks):
            _signal_tasks(job, signal.SIGKILL)
        time.sleep(0.02)
    return max(code if code >= 0 else 128 - code for code in (task.wait() for task in tasks))


def scontrol(words: list[str]) -> int:
    """show hostnames LIST, show job ID, requeue ID."""
    match words:
        case ["show", "hostnames", nodes]:
            count = int(nodes.partition("-")[2].rstrip("]"))
            print("\n".join([HOST] * count))
        case ["show", "job", job]:
            print(f"JobId={job}\n   JobState={(_directory(job) / 'state').read_text()} Reason=None")
        case ["requeue", job]:
            (_directory(job) / "requeue").touch()
            with (_directory(job) / "requeues").open("a") as file:
                file.write("requeued\n")
        case _:
            raise SystemExit(f"scontrol: what is {words}?")
    return 0


def scancel(words: list[str]) -> int:
    """--signal=NAME JOB signals the steps alone; without it the job is ended."""
    parser = argparse.ArgumentParser(prog="scancel")
    parser.add_argument("--signal")
    parser.add_argument("job")
    asked = parser.parse_args(words)
    if asked.signal is not None:
        _signal_tasks(asked.job, signal.Signals[f"SIG{asked.signal}"])
        return 0
    (_directory(asked.job) / "state").write_text("COMPLETING")
    _signal_tasks(asked.job, signal.SIGTERM)
    os.kill(int((_directory(asked.job) / "batch.pid").read_text()), signal.SIGTERM)
    return 0


def _signal_tasks(job: str, number: signal.Signals) -> None:
    tasks = [int(pid) for pid in (_directory(job) / "tasks").read_text().split()]
    everything = os.environ.get("STAND_IN_PROCTRACK") == "linuxproc" or number == signal.SIGKILL
    for pid in _with_all_below(tasks) if everything else tasks:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _with_all_below(roots: list[int]) -> list[int]:
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
    children = defaultdict(list)
    for line in listing.splitlines():
        pid, parent = map(int, line.split())
        children[parent].append(pid)
    found = list(roots)
    for pid in found:
        found += children[pid]
    return found


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "sbatch": sbatch,
    "srun": srun,
    "scontrol": scontrol,
    "scancel": scancel,
}

if __name__ == "__main__":
    sys.exit(COMMANDS[sys.argv[1]](sys.argv[2:]))
