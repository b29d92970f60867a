"""Save a run so that a run of any layout can continue from it.

    DIR/iter_0000100/*.distcp, .metadata    every tensor, global, under its global name
                     run_state.json         iteration, samples, schedule, loss scale: plain values
                     config.yaml            the configuration of the run that saved
                     tokenizer/             the tokenizer's files
    DIR/latest_checkpointed_iteration.txt   "100"

What a tensor is says its `ShardSpec`; weights and optimizer states come as one stream of
(name, this rank's part, spec). Where a rank holds but a stretch of its part, as with the
distributed optimizer, it is (name, the stretch, spec, index of its first element in the flattened
part); how a run was spread does not show in its checkpoint. Names that begin with "optimizer." are
the optimizer's, those that begin with "random." are the states of random-number generators, which
belong to a rank of a layout and are restored on the same layout only.

Every function here is called by all ranks together, and fails on all of them or on none.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron.checkpoint import random_states
from megatron.checkpoint.compare import differences
from megatron.checkpoint.directory import aside_path, begin, commit, latest_iteration
from megatron.checkpoint.reader import (
    CONFIG_FILE,
    FORMAT,
    MASTER,
    RANDOM,
    RUN_STATE_FILE,
    TOKENIZER_DIRECTORY,
    Checkpoint,
    is_optimizer,
    is_weight,
)
from megatron.checkpoint.sharded import GlobalTensor
from megatron.checkpoint.stored import StoredTensors
from megatron.config import Config
from megatron.errors import CheckpointError, UserError
from megatron.mpu.parallel_state import Axis, ParallelState
from megatron.mpu.shard_spec import ShardSpec

NamedTensor = tuple[str, torch.Tensor, ShardSpec] | tuple[str, torch.Tensor, ShardSpec, int]
T = TypeVar("T")


def save_checkpoint(
    directory: Path,
    iteration: int,
    tensors: Iterable[NamedTensor],
    run_state: Mapping[str, Any],
    *,
    config: Config,
    state: ParallelState,
    files: Sequence[Path] = (),
) -> None:
    """Save this run's state as the checkpoint of `iteration` in `directory` and make it the latest.

    tensors: this rank's parts; run_state: plain values for JSON, equal on all ranks; files: the
    tokenizer's. `--no-save-optim` and `--no-save-rng` leave those tensors out.

    Raises:
        CheckpointError: it could not be written; what was there before is still there.
    """
    named = _global_tensors(tensors, state, with_optimizer=not config.train.no_save_optim)
    if not config.train.no_save_rng:
        named |= _random_tensors(state)
    write_checkpoint(
        directory, iteration, named, run_state, config=config, state=state, files=files
    )


def write_checkpoint(
    directory: Path,
    iteration: int,
    tensors: Mapping[str, GlobalTensor],
    run_state: Mapping[str, Any],
    *,
    config: Config,
    state: ParallelState,
    files: Sequence[Path] = (),
    writer: Callable[[Path], CheckpointWriter] | None = None,
) -> None:
    """As `save_checkpoint`, from the global tensors under their names.

    writer: makes what writes the tensors into a directory, where it is not a `CheckpointWriter`.

    Raises:
        CheckpointError: it could not be written; what was there before is still there.
    """
    aside = aside_path(directory, iteration)
    try:
        _on_first(lambda: begin(directory, iteration), state)
        _write_tensors(tensors, (writer or CheckpointWriter)(aside), state)
        _on_first(lambda: _finish(directory, iteration, run_state, config, files), state)
    except CheckpointError:
        if state.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def find_checkpoint(directory: Path, state: ParallelState) -> int | None:
    """The iteration of the latest checkpoint in `directory`, None where there is none yet.

    Raises:
        CheckpointError: it cannot be told, or not all ranks see the same.
    """
    iteration = _together(lambda: latest_iteration(directory), state)
    found = _gather(iteration, state.world_size)
    if len(set(found)) > 1:
        without = [rank for rank, other in enumerate(found) if other != found[0]]
        raise CheckpointError(
            f"{directory}: rank 0 finds iteration {found[0]} and rank {without[0]} "
            f"{found[without[0]]}; it must be on a file system that all nodes share"
        )
    return iteration


def load_checkpoint(
    directory: Path,
    tensors: Iterable[NamedTensor],
    *,
    config: Config,
    state: ParallelState,
    optional: Collection[str] = (),
) -> dict[str, Any]:
    """Fill the tensors in place from the latest checkpoint in `directory`; returns its run state.

    `--finetune` loads the weights alone and returns an empty run state; `--no-load-optim` and
    `--no-load-rng` leave those tensors as they are, and so are those of the `optional` keys which
    the checkpoint does not have in this shape.

    Raises:
        CheckpointError: it is missing, damaged, or of another model; a line for each problem.
    """
    train = config.train
    checkpoint, wanted, sources = _match(directory, tensors, config, state, optional)
    _together(lambda: _load(checkpoint.stored, wanted, sources), state)
    if train.finetune:
        return {}
    if not train.no_load_rng:
        _together(lambda: _restore_random(checkpoint.stored, state), state)
    return checkpoint.run_state


def check_checkpoint(
    directory: Path,
    tensors: Iterable[NamedTensor],
    *,
    config: Config,
    state: ParallelState,
    optional: Collection[str] = (),
) -> dict[str, Any]:
    """As `load_checkpoint` before it reads a tensor; those given may be on the meta device.

    Raises:
        CheckpointError: as `load_checkpoint`, but for damage within the data of tensors.
    """
    checkpoint, _, _ = _match(directory, tensors, config, state, optional)
    return {} if config.train.finetune else checkpoint.run_state


def _match(
    directory: Path,
    tensors: Iterable[NamedTensor],
    config: Config,
    state: ParallelState,
    optional: Collection[str],
) -> tuple[Checkpoint, dict[str, GlobalTensor], dict[str, str]]:
    """The latest checkpoint, what is wanted of it, and the name each of that is stored under."""
    with_optimizer = not (config.train.finetune or config.train.no_load_optim)
    wanted = _global_tensors(tensors, state, with_optimizer=with_optimizer)
    checkpoint = _together(lambda: Checkpoint.open(directory), state)
    shapes_there = checkpoint.stored.shapes
    for key in optional:
        if key in wanted and shapes_there.get(key) != tuple(wanted[key].shape):
            del wanted[key]
    own = [key for key in wanted if is_weight(key)]
    weights = set(chain.from_iterable(_gather(own, state.model.size, state.model.group)))
    sources = _sources(wanted, checkpoint.stored)
    shapes = {sources[key]: tuple(tensor.shape) for key, tensor in wanted.items()}
    _together(lambda: _check(checkpoint, shapes, weights, config), state)
    return checkpoint, wanted, sources


def _global_tensors(
    tensors: Iterable[NamedTensor], state: ParallelState, *, with_optimizer: bool
) -> dict[str, GlobalTensor]:
    named: dict[str, GlobalTensor] = {}
    for entry in tensors:
        key = entry[0]
        if is_optimizer(key) and not with_optimizer:
            continue
        tensor = _global_tensor(entry, state.tensor)
        # A tensor that several chunks of a rank hold may come from each.
        assert key not in named or _same_memory(named[key], tensor), f"two tensors named {key}"
        named[key] = tensor
    return named


def _global_tensor(entry: NamedTensor, tensor_axis: Axis) -> GlobalTensor:
    rank, size = tensor_axis.rank, tensor_axis.size
    match entry:
        case _, part, spec:
            return GlobalTensor.of(part, spec, rank, size)
        case _, stretch, spec, first:
            return GlobalTensor.of_stretch(stretch, first, spec, rank, size)


def _same_memory(one: GlobalTensor, other: GlobalTensor) -> bool:
    pairs = zip(one.pieces, other.pieces, strict=True)
    return all(a.view.data_ptr() == b.view.data_ptr() for a, b in pairs)


class CheckpointWriter(dcp.FileSystemWriter):
    """DCP's writer, without the note of where a checkpoint was once written."""

    def storage_meta(self) -> StorageMeta | None:
        return None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return self.write_boxes(plan, planner)
        except RuntimeError as error:
            # torch.save calls a full disk an unexpected position; what happened is said below it.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    def write_boxes(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what the plan says."""
        return super().write_data(plan, planner)


def _write_tensors(
    named: Mapping[str, GlobalTensor], writer: CheckpointWriter, state: ParallelState
) -> None:
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            # That one process saves alone is no reason for a warning.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.save(
                dict(named),
                storage_writer=writer,
                planner=planner,
                no_dist=state.world_size == 1,
            )
    except CheckpointException as error:
        raise CheckpointError(
            f"rank {rank} cannot write {writer.path}: {getattr(cause, 'strerror', None) or cause}"
            for rank, (cause, _) in error.failures.items()
        ) from error


def _finish(
    directory: Path,
    iteration: int,
    run_state: Mapping[str, Any],
    config: Config,
    files: Sequence[Path],
) -> None:
    """Write what is no tensor and put the checkpoint in place, once the tensors are all there."""
    path = aside_path(directory, iteration)
    document = {"format": FORMAT, "iteration": iteration, "state": dict(run_state)}
    (path / RUN_STATE_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (path / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    (path / TOKENIZER_DIRECTORY).mkdir()
    for file in files:
        shutil.copyfile(file, path / TOKENIZER_DIRECTORY / file.name)
    # Ranks that write to a disk of their own, not a shared one, leave files missing here.
    StoredTensors(path)
    commit(directory, iteration)


def _sources(wanted: Mapping[str, GlobalTensor], stored: StoredTensors) -> dict[str, str]:
    """Under which name each wanted tensor is stored, most under their own.

    In half precision a weight is its master's rounded copy. A run in float32 goes on from the
    master, and a run in half precision takes a float32 weight as its master.
    """
    sources, types = {key: key for key in wanted}, stored.dtypes
    for key, tensor in wanted.items():
        master, weight = MASTER + key, key.removeprefix(MASTER)
        if key not in types:
            sources[key] = weight if weight in types else key
        elif master in types and tensor.dtype.itemsize > types[key].itemsize:
            sources[key] = master
    return sources


def _load(
    stored: StoredTensors, wanted: Mapping[str, GlobalTensor], sources: Mapping[str, str]
) -> None:
    stored.load({key: tensor for key, tensor in wanted.items() if sources[key] == key})
    stored.load({sources[key]: t for key, t in wanted.items() if sources[key] != key})


def _check(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], weights: set[str], config: Config
) -> None:
    """Raise a CheckpointError with all that makes the checkpoint one of another model."""
    problems = differences(checkpoint, config.model, shapes, weights)
    if problems:
        raise CheckpointError(problems)


def _random_tensors(state: ParallelState) -> dict[str, GlobalTensor]:
    states = random_states.collect(state.device)
    return {_random_key(name, state): GlobalTensor.whole(value) for name, value in states.items()}


def _restore_random(stored: StoredTensors, state: ParallelState) -> None:
    """Restore this rank's generators where a rank of the same layout saved its own."""
    states = random_states.collect(state.device)
    wanted = {_random_key(name, state): value for name, value in states.items()}
    shapes = stored.shapes
    if all(shapes.get(key) == tuple(value.shape) for key, value in wanted.items()):
        stored.load({key: GlobalTensor.whole(value) for key, value in wanted.items()})
        random_states.restore(states, state.device)


def _random_key(name: str, state: ParallelState) -> str:
    grid, place = state.topology, state.coordinates
    return (
        f"{RANDOM}pipeline{place.pipeline}of{grid.pipeline}.data{place.data}of{grid.data}"
        f".tensor{place.tensor}of{grid.tensor}.{name}"
    )


def _together(action: Callable[[], T], state: ParallelState) -> T:
    """Do `action` on every rank; the problems of any rank are raised on all of them."""
    problems: Sequence[str] = ()
    try:
        result = action()
    except UserError as error:
        problems = error.problems
    except OSError as error:
        problems = (f"{error.filename}: {error.strerror}",)
    every_problem = dict.fromkeys(chain.from_iterable(_gather(problems, state.world_size)))
    if every_problem:
        raise CheckpointError(every_problem)
    return result


def _on_first(action: Callable[[], object], state: ParallelState) -> None:
    """Do `action` on rank 0; all ranks wait for it, and its problems are raised on all of them."""
    _together(lambda: action() if state.rank == 0 else None, state)


def _gather(value: T, size: int, group: dist.ProcessGroup | None = None) -> list[T]:
    """The values of the `size` ranks of a group, by default of all ranks, in their order."""
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group)
    return values
