"""The launch scripts as a shell runs them, and the table of them in examples/README.md.

`python -m tests.examples.published` prints the table: what the flags say is read from the flags,
what a paper says from the comment at the script's top.
"""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

from megatron.arguments import read_command
from megatron.config import Config
from megatron.mpu import ParallelState, ShardSpec
from megatron.training import BertPretraining, GPTPretraining, T5Pretraining
from megatron.training.task import Task

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TASKS: dict[str, Callable[[Config], Task]] = {
    "bert": BertPretraining,
    "gpt": GPTPretraining,
    "t5": T5Pretraining,
}
SCRIPTS = tuple(
    script.relative_to(EXAMPLES).with_suffix("").as_posix()
    for folder in TASKS
    for script in (EXAMPLES / folder).glob("*.sh")
)


def kind_of(script: str) -> str:
    """bert, gpt or t5."""
    return script.split("/")[0]


def run(
    script: str, *flags: str, cwd: str = str(ROOT), **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script by its name, such as bert/345m, in an environment of these variables alone."""
    return subprocess.run(
        ["bash", f"{EXAMPLES / script}.sh", *flags],
        env={"PATH": os.environ["PATH"], **variables},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def dry_flags(script: str) -> list[str]:
    """The words that a dry run of the script hands to its program."""
    dry = run(script, PYTHON="echo", DRY_RUN="1")
    assert dry.returncode == 0, dry.stderr
    program, *flags = dry.stdout.split()
    assert program == f"{ROOT}/pretrain_{kind_of(script)}.py"
    return flags


@cache
def planned(script: str) -> tuple[Config, int]:
    """The configuration that a dry run of the script plans, and for how many ranks."""
    command = read_command(dry_flags(script), defaults={"model_type": kind_of(script)})
    world_size = command.dry_run.world_size
    assert world_size is not None and not command.notes and not command.problems
    return command.config, world_size


@cache
def parameters(script: str) -> int:
    """Parameters of the whole model, without padding and copies."""
    config, _ = planned(script)
    task = TASKS[config.model.model_type](config)
    state = ParallelState.single("meta")
    specs: list[ShardSpec] = [
        parameter.shard_spec  # type: ignore[attr-defined]
        for stage in task.stages(config)
        for parameter in task.build_model(config, state, stage).parameters()
    ]
    return sum(math.prod(spec.shape) for spec in specs if spec.tied_to is None)


def in_words(count: int) -> str:
    """Four digits of a number of parameters: 336.2 million."""
    return f"{count / 1e6:.4g} million" if count < 999.5e6 else f"{count / 1e9:.4g} billion"


def layout(script: str) -> str:
    """GPUs, and the sizes of the axes above 1: 1024 GPUs: tensor 8, pipeline 4, data 32."""
    config, world_size = planned(script)
    parallel = config.parallel
    virtual = parallel.virtual_stages(config.model.num_layers)
    sizes = {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "data": parallel.data_parallel_size(world_size),
    }
    parts = {name: f"{name} {size}" for name, size in sizes.items() if size > 1}
    if virtual > 1:
        parts["pipeline"] += f" of {virtual} virtual stages each"
    return f"{world_size} GPUs: {', '.join(parts.values())}"


def header(script: str) -> dict[str, str]:
    """The comment at the script's top: its first sentence as "title", then its fields by name."""
    lines = (EXAMPLES / f"{script}.sh").read_text(encoding="utf-8").splitlines()
    comment = [line[2:] for line in lines[1:] if line.startswith("#")]
    fields = {"title": comment[0]}
    name = ""
    for line in comment[2 : comment.index("", 2)]:
        name = line[:12].strip() or name
        fields[name] = f"{fields.get(name, '')} {line[12:]}".strip()
    return fields


def by_size() -> list[str]:
    """The scripts, a family after the other, by the number of parameters."""
    families = list(TASKS)
    return sorted(SCRIPTS, key=lambda script: (families.index(kind_of(script)), parameters(script)))


def table() -> str:
    """The table of examples/README.md."""
    rows = [
        "| script | source | parameters | published | layout | batch |",
        "|---|---|---|---|---|---|",
    ]
    for script in by_size():
        config, _ = planned(script)
        published = header(script)["parameters"].split("; published: ")[1]
        batch = f"{config.train.global_batch_size} x {config.data.seq_length}"
        cells = [
            f"[{script}]({script}.sh)",
            header(script)["source"],
            in_words(parameters(script)),
            published,
            layout(script),
            batch,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
