"""A run of any layout continues from a checkpoint of any other, or says why it cannot."""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    load_config,
    load_global_tensors,
    save_checkpoint,
)
from megatron.checkpoint.save_load import NamedTensor
from megatron.config import Config
from megatron.errors import CheckpointError
from megatron.mpu import ParallelState, ShardSpec
from megatron.mpu.topology import Topology
from tests.checkpoint.support import local_part, make_config, random_spec, values
from tests.distributed import run_distributed

SINGLE = ParallelState.single()
RUN_STATE = {"iteration": 7, "samples": 123, "loss_scale": 65536.0, "best": None, "names": ["a"]}


def model_specs(seed: int) -> list[ShardSpec]:
    rng = random.Random(seed)
    return [random_spec(f"weight{i}", rng, multiple=4) for i in range(9)]


def tensors_of(
    state: ParallelState, specs: list[ShardSpec], *, seed: int | None
) -> Iterator[NamedTensor]:
    """This rank's weights and optimizer states, dealt out to the stages; zeros without a seed.

    The first and the last stage both hold the first weight.
    """
    stages = state.pipeline.size
    mine = [spec for i, spec in enumerate(specs) if i % stages == state.pipeline.rank]
    if 0 < state.pipeline.rank == stages - 1:
        first = specs[0]
        copy = ShardSpec("copy", first.shape, first.dim, first.blocks, first.padded, first.name)
        mine.append(copy)
    for spec in mine:
        for prefix, offset in (("", 0), ("optimizer.mean.", 1)):
            whole = torch.zeros(spec.shape) if seed is None else values(spec, seed + offset)
            local = local_part(whole, spec, state.tensor.rank, state.tensor.size)
            yield prefix + spec.key, local, spec


def save_as(path: Path, grid: tuple[int, int, int], seed: int) -> None:
    world_size, tensor, pipeline = grid
    state = ParallelState.create(Topology(world_size, tensor, pipeline))
    save_checkpoint(
        path,
        seed,
        tensors_of(state, model_specs(seed), seed=seed),
        RUN_STATE,
        config=make_config(),
        state=state,
    )


def load_as(path: Path, grid: tuple[int, int, int], seed: int) -> None:
    world_size, tensor, pipeline = grid
    state = ParallelState.create(Topology(world_size, tensor, pipeline))
    found = list(tensors_of(state, model_specs(seed), seed=None))
    assert find_checkpoint(path, state) == seed
    assert load_checkpoint(path, found, config=make_config(), state=state) == RUN_STATE
    expected = list(tensors_of(state, model_specs(seed), seed=seed))
    for (key, tensor, _), (_, truth, _) in zip(found, expected, strict=True):
        assert torch.equal(tensor.nan_to_num(nan=0.0), truth.nan_to_num(nan=0.0)), key


GRIDS = {
    4: [(4, 4, 1), (4, 2, 2), (4, 1, 4), (4, 2, 1), (4, 1, 2), (4, 1, 1)],
    2: [(2, 2, 1), (2, 1, 2), (2, 1, 1)],
    1: [(1, 1, 1)],
}


def run_on(grid: tuple[int, int, int], function: object, *arguments: object) -> None:
    if grid[0] == 1:
        function(*arguments)  # type: ignore[operator]
    else:
        run_distributed(grid[0], function, *arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
def test_any_layout_loads_what_any_other_saved(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    for world_size in (4, 2, 1):
        grid = rng.choice(GRIDS[world_size])
        run_on(grid, save_as, tmp_path, grid, seed)
        for specs, (key, tensor) in zip(
            sorted(model_specs(seed), key=lambda spec: spec.name),
            sorted(load_global_tensors(tmp_path)),
            strict=True,
        ):
            assert key == specs.key
            assert torch.equal(tensor, values(specs, seed)), key
        for other_size in (4, 2, 1):
            other = rng.choice(GRIDS[other_size])
            run_on(other, load_as, tmp_path, other, seed)


def save_single(path: Path, config: Config | None = None, iteration: int = 3) -> None:
    tensors = tensors_of(SINGLE, model_specs(0), seed=0)
    config = config or make_config()
    save_checkpoint(path, iteration, tensors, RUN_STATE, config=config, state=SINGLE)


def load_single(path: Path, config: Config | None = None) -> dict[str, torch.Tensor]:
    """What is loaded into zeros, by name."""
    tensors = list(tensors_of(SINGLE, model_specs(0), seed=None))
    load_checkpoint(path, tensors, config=config or make_config(), state=SINGLE)
    return {key: tensor for key, tensor, _ in tensors}


def test_configuration_and_tokenizer_travel_along(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\nword\n")
    config = make_config(layernorm_epsilon=1e-7, activation="gelu_tanh")
    save_checkpoint(tmp_path, 5, [], {}, config=config, state=SINGLE, files=[vocabulary])
    assert load_config(tmp_path) == config
    copy = tmp_path / "iter_0000005" / "tokenizer" / "vocab.txt"
    assert copy.read_text() == vocabulary.read_text()


@pytest.mark.parametrize("flag", ["finetune", "no_load_optim"])
def test_optimizer_is_left_alone_on_request(tmp_path: Path, flag: str) -> None:
    save_single(tmp_path)
    loaded = load_single(tmp_path, make_config(train={flag: True}))
    for key, tensor in loaded.items():
        assert tensor.nan_to_num(nan=0.0).any() != key.startswith("optimizer."), key


def test_finetuning_starts_a_new_run(tmp_path: Path) -> None:
    save_single(tmp_path)
    config = make_config(train={"finetune": True})
    assert (
        load_checkpoint(
            tmp_path, tensors_of(SINGLE, model_specs(0), seed=None), config=config, state=SINGLE
        )
        == {}
    )


def test_a_checkpoint_without_optimizer_serves_those_that_ask_for_none(tmp_path: Path) -> None:
    save_single(tmp_path, make_config(train={"no_save_optim": True}))
    load_single(tmp_path, make_config(train={"no_load_optim": True}))
    with pytest.raises(CheckpointError, match="lacks 9 tensors of the optimizer.*--no-load-optim"):
        load_single(tmp_path)


def draw() -> tuple[float, float, float]:
    return random.gauss(0, 1), float(np.random.standard_normal()), float(torch.rand(()))


@pytest.mark.parametrize(
    ("save_flags", "load_flags", "restored"),
    [({}, {}, True), ({"no_save_rng": True}, {}, False), ({}, {"no_load_rng": True}, False)],
)
def test_random_states(
    tmp_path: Path, save_flags: dict[str, bool], load_flags: dict[str, bool], restored: bool
) -> None:
    draw()  # leaves a second normal variate behind in the generators
    save_single(tmp_path, make_config(train=save_flags))
    after_save = draw()
    load_single(tmp_path, make_config(train=load_flags))
    assert (draw() == after_save) == restored


def test_random_states_stay_with_their_layout(tmp_path: Path) -> None:
    run_distributed(2, save_as, tmp_path, (2, 2, 1), 0)
    torch.manual_seed(1)
    load_single(tmp_path)
    after_load = draw()
    torch.manual_seed(1)
    assert draw()[2] == after_load[2]


def test_all_differences_of_another_model_are_named(tmp_path: Path) -> None:
    save_single(tmp_path)
    other = make_config(num_layers=3, num_attention_heads=2, activation="gelu_tanh", vocab_size=62)
    with pytest.raises(CheckpointError) as error:
        load_single(tmp_path, other)
    path = tmp_path / "iter_0000003"
    assert error.value.problems == (
        f"checkpoint {path}: --num-layers is 2 there and 3 here",
        f"checkpoint {path}: --num-attention-heads is 4 there and 2 here",
        f"checkpoint {path}: --kv-channels is 4 there and 8 here",
        f"checkpoint {path}: --vocab-size is 61 there and 62 here",
        f"checkpoint {path}: --activation is gelu there and gelu_tanh here",
    )


def test_fields_that_do_not_change_the_weights_may_differ(tmp_path: Path) -> None:
    save_single(tmp_path)
    load_single(
        tmp_path,
        make_config(hidden_dropout=0.0, bf16=True, make_vocab_size_divisible_by=8, kv_channels=4),
    )


def test_all_differences_between_tensors_are_named(tmp_path: Path) -> None:
    specs = [ShardSpec("a", (2,)), ShardSpec("b", (3, 1)), ShardSpec("extra", (1,))]
    tensors = [(spec.name, values(spec), spec) for spec in specs]
    save_checkpoint(tmp_path, 1, tensors, {}, config=make_config(), state=SINGLE)
    wanted = [ShardSpec("a", (2,)), ShardSpec("b", (4,))]
    wanted += [ShardSpec(f"layer{i}", ()) for i in range(20)]
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(
            tmp_path,
            [(spec.name, torch.zeros(spec.shape), spec) for spec in wanted],
            config=make_config(),
            state=SINGLE,
        )
    text = str(error.value)
    assert "layer0 is missing" in text
    assert "and 15 more such tensors, the last: layer19 is missing" in text
    assert "b is (3, 1) there and (4,) here" in text
    assert "extra has no place in this model" in text


def load_on_two(path: Path) -> list[str]:
    """Ranks of two stages, of which only the second misses something."""
    state = ParallelState.create(Topology(2, pipeline=2))
    specs = model_specs(0)
    tensors = list(tensors_of(state, specs, seed=None))
    if state.rank == 1:
        tensors.append(("absent", torch.zeros(2), ShardSpec("absent", (2,))))
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, tensors, config=make_config(), state=state)
    return list(error.value.problems)


def test_all_ranks_report_what_one_rank_misses(tmp_path: Path) -> None:
    save_single(tmp_path)
    reports = run_distributed(2, load_on_two, tmp_path)
    assert reports == [[f"checkpoint {tmp_path / 'iter_0000003'}: absent is missing"]] * 2


def load_damaged(path: Path) -> str:
    state = ParallelState.create(Topology(2, tensor=2))
    if state.rank == 1:  # a disk of its own
        path = path / "elsewhere"
    with pytest.raises(CheckpointError) as error:
        find_checkpoint(path, state)
    return str(error.value)


def test_a_disk_that_is_not_shared_is_reported(tmp_path: Path) -> None:
    save_single(tmp_path)
    for report in run_distributed(2, load_damaged, tmp_path):
        assert "rank 0 finds iteration 3 and rank 1 None" in report
        assert "file system that all nodes share" in report


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: there is no such directory"):
        load_single(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint: latest_checkpointed_iter"):
        load_single(tmp_path)
    save_single(tmp_path)
    run_state = tmp_path / "iter_0000003" / "run_state.json"
    for text, problem in (
        ("{", "damaged"),
        ("[]", "found format None, expected 1"),
        (json.dumps({"state": 1, "format": 1, "iteration": 1}), "damaged: it holds no iter"),
        (json.dumps({"state": {}, "format": 9, "iteration": 1}), "found format 9, expected 1"),
    ):
        run_state.write_text(text)
        with pytest.raises(CheckpointError, match=f"run_state.json.*{problem}"):
            load_single(tmp_path)
    config = tmp_path / "iter_0000003" / "config.yaml"
    for text in ("", "model: {num_layers: many}", "a: [", "model: {surprise: 1}", "model: 5"):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.yaml: "):
            load_config(tmp_path)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"config\.yaml is missing"):
        load_config(tmp_path)


def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    save_single(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"missing.txt: No such file"):
        save_checkpoint(
            tmp_path,
            4,
            tensors_of(SINGLE, model_specs(0), seed=0),
            {},
            config=make_config(),
            state=SINGLE,
            files=[tmp_path / "missing.txt"],
        )
    assert sorted(tmp_path.rglob("*")) == before
    assert find_checkpoint(tmp_path, SINGLE) == 3


def save_with_a_full_disk(path: Path) -> tuple[str, list[str]]:
    """Rank 1 may not write files of more than 64 kB."""
    state = ParallelState.create(Topology(2, tensor=2))
    spec = ShardSpec("weight", (400, 400), dim=0)
    tensors = [("weight", torch.zeros(200, 400), spec)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if state.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(CheckpointError) as error:
            save_checkpoint(path, 1, tensors, {}, config=make_config(), state=state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return str(error.value), sorted(file.name for file in path.iterdir())


def test_all_ranks_report_what_one_cannot_write(tmp_path: Path) -> None:
    expected = f"rank 1 cannot write {tmp_path / '.iter_0000001.tmp'}: File too large"
    for message, left in run_distributed(2, save_with_a_full_disk, tmp_path):
        assert message == expected
        assert left in ([], [".iter_0000001.tmp"])  # rank 0 may not have tidied up yet
    assert not list(tmp_path.iterdir())
