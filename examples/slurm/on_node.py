"""Starts training on one node of a SLURM job, and hands its signals to the ranks alone.

    srun python3 examples/slurm/on_node.py SCRIPT [FLAGS...]

SCRIPT is a launch script, *.sh, which starts torchrun, or a program, *.py, for which torchrun is
started. What torchrun has to know comes through its environment variables, PET_ and a flag's name.

SLURM sends a signal to this process alone, or to every process of the node, depending on how it
keeps track of them. torchrun would die of SIGUSR1; of SIGTERM it would end the ranks, within half a
minute, and fail. So this process has it ignore both, with all that starts it, and tells the ranks
by SIGUSR1, which they obey (`--exit-signal-handler`). A rank that is still importing PyTorch
ignores it as well: all are told again until they have ended.
"""

import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SECONDS_BETWEEN_REMINDERS = 10.0
FROM_SLURM = (signal.SIGUSR1, signal.SIGTERM)


def main() -> int:
    """Runs the command to its end; returns its exit code."""
    command = training_command(sys.argv[1:])
    for number in FROM_SLURM:
        signal.signal(number, _from_now_on)
    signal.signal(signal.SIGALRM, _tell_ranks)
    run = subprocess.Popen(command, env=os.environ | settings(), preexec_fn=_ignore)
    code = run.wait()
    return code if code >= 0 else 128 - code


def training_command(words: list[str]) -> list[str]:
    """The command for a script and its flags; `python` before a program may be left out."""
    if words and Path(words[0]).name.startswith("python"):
        words = words[1:]
    if not words or Path(words[0]).suffix not in (".sh", ".py"):
        sys.exit(
            f"error: {' '.join(words[:1])}: expected a launch script, *.sh, or a program, *.py"
        )
    if words[0].endswith(".sh"):
        return ["bash", *words]
    return [sys.executable, "-m", "torch.distributed.run", *words]


def settings() -> dict[str, str]:
    """The environment variables that differ from node to node, and those of torchrun."""
    given, node = os.environ, os.environ["SLURM_NODEID"]
    return {
        "NODE_RANK": node,
        "PYTHONUNBUFFERED": "1",  # a rank writes to a file, which shall not lag behind
        "PET_NNODES": given["NODES"],
        "PET_NPROC_PER_NODE": given["GPUS_PER_NODE"],
        "PET_MAX_RESTARTS": given.get("MAX_RESTARTS", "0"),
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": f"{given['MASTER_ADDR']}:{given['MASTER_PORT']}",
        "PET_RDZV_ID": given["RDZV_ID"],
        "PET_RDZV_CONF": f"is_host={'true' if node == '0' else 'false'}",
        "PET_LOG_DIR": f"{given['LOG_DIR']}/node-{int(node):04d}",
        "PET_TEE": "3",  # each rank's output to its files, and here
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": f"[node {node} rank ${{rank}}] ",
        "PET_SIGNALS_TO_HANDLE": "SIGINT,SIGHUP,SIGQUIT",
    }


def ranks() -> Iterator[int]:
    """The process ids of this node's ranks: torchrun gives each a session of its own."""
    children: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            # The fields behind the name, which may hold anything: state, parent, group, session.
            fields = stat.read_text().rpartition(")")[2].split()
            children[int(fields[1])].append((int(stat.parent.name), int(fields[3])))
    below = list(children[os.getpid()])
    while below:
        pid, session = below.pop()
        if pid == session:
            yield pid
        else:
            below += children[pid]


def _tell_ranks(*_: object) -> None:
    for rank in ranks():
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGUSR1)


def _from_now_on(*_: object) -> None:
    _tell_ranks()
    signal.setitimer(signal.ITIMER_REAL, SECONDS_BETWEEN_REMINDERS, SECONDS_BETWEEN_REMINDERS)


def _ignore() -> None:
    for number in FROM_SLURM:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
