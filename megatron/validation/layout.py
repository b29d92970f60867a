"""How heads, MLPs, sequences, batches and the optimizer split over the ranks."""

from megatron.config import ModelConfig, ParallelConfig, TrainConfig
from megatron.errors import ConfigError
from megatron.validation.checks import Checks, divides

checks = Checks()

_TENSOR = "--tensor-model-parallel-size"


@checks.add
def ranks_hold_whole_models(
    tensor_model_parallel_size: int, pipeline_model_parallel_size: int, world_size: int
) -> None:
    ParallelConfig(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
    ).data_parallel_size(world_size)


@checks.add
def heads_split_over_tensor_ranks(
    num_attention_heads: int, tensor_model_parallel_size: int
) -> None:
    divides("--num-attention-heads", num_attention_heads, _TENSOR, tensor_model_parallel_size)


@checks.add
def query_groups_split_over_tensor_ranks(
    num_query_groups: int | None, tensor_model_parallel_size: int
) -> None:
    if num_query_groups is not None:
        divides("--num-query-groups", num_query_groups, _TENSOR, tensor_model_parallel_size)


@checks.add
def mlp_splits_over_tensor_ranks(
    ffn_hidden_size: int | None,
    hidden_size: int,
    swiglu: bool,
    geglu: bool,
    tensor_model_parallel_size: int,
) -> None:
    if ffn_hidden_size is not None:
        divides("--ffn-hidden-size", ffn_hidden_size, _TENSOR, tensor_model_parallel_size)
        return
    model = ModelConfig(
        num_layers=1,
        max_position_embeddings=1,
        num_attention_heads=1,
        hidden_size=hidden_size,
        swiglu=swiglu,
        geglu=geglu,
    )
    option = f"the MLP's width for --hidden-size {hidden_size},"
    divides(option, model.ffn_size, _TENSOR, tensor_model_parallel_size)


@checks.add
def sequences_split_over_tensor_ranks(
    sequence_parallel: bool,
    seq_length: int,
    decoder_seq_length: int | None,
    tensor_model_parallel_size: int,
) -> None:
    lengths = {"--seq-length": seq_length, "--decoder-seq-length": decoder_seq_length or 0}
    problems = [
        f"--sequence-parallel: {option} {length} is not divisible by "
        f"{_TENSOR} {tensor_model_parallel_size}"
        for option, length in lengths.items()
        if sequence_parallel and length % tensor_model_parallel_size
    ]
    if problems:
        raise ConfigError(problems)


@checks.add
def batch_is_whole(
    micro_batch_size: int,
    global_batch_size: int | None,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    world_size: int,
) -> None:
    data, rest = divmod(world_size, tensor_model_parallel_size * pipeline_model_parallel_size)
    if data and not rest:  # otherwise the check of the ranks speaks
        TrainConfig(
            micro_batch_size=micro_batch_size, global_batch_size=global_batch_size
        ).num_micro_batches(data)


@checks.add
def ramp_is_made_of_whole_batches(
    rampup_batch_size: tuple[int, ...] | None,
    micro_batch_size: int,
    global_batch_size: int | None,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    world_size: int,
) -> None:
    data, rest = divmod(world_size, tensor_model_parallel_size * pipeline_model_parallel_size)
    if rampup_batch_size is None or len(rampup_batch_size) != 3 or rest or not data:
        return  # other checks speak
    start, increment, _ = rampup_batch_size
    samples = micro_batch_size * data
    full = global_batch_size or samples
    problems = [
        f"--rampup-batch-size: {name} {value} is not divisible by --micro-batch-size "
        f"{micro_batch_size} x data-parallel size {data} = {samples}"
        for name, value in (("START", start), ("INCREMENT", increment))
        if value % samples
    ]
    if start >= full:
        problems.append(f"--rampup-batch-size: START {start} is not below the global batch, {full}")
    elif (full - start) % increment:
        problems.append(
            f"--rampup-batch-size: steps of {increment} do not lead from {start} to the global "
            f"batch, {full}"
        )
    if problems:
        raise ConfigError(problems)


@checks.add
def backend_suits_the_device(distributed_backend: str | None, use_cpu: bool) -> None:
    if use_cpu and distributed_backend == "nccl":
        raise ConfigError("--distributed-backend nccl needs GPUs, --use-cpu uses none")


@checks.add
def gradients_are_sharded_with_their_optimizer(
    shard_gradients: bool, use_distributed_optimizer: bool, pipeline_model_parallel_size: int
) -> None:
    problems = []
    if shard_gradients and not use_distributed_optimizer:
        problems.append("--shard-gradients needs --use-distributed-optimizer")
    if shard_gradients and pipeline_model_parallel_size > 1:
        problems.append(
            "--shard-gradients needs --pipeline-model-parallel-size 1, found "
            f"{pipeline_model_parallel_size}: a pipeline adds up whole gradients"
        )
    if problems:
        raise ConfigError(problems)


@checks.add
def recomputation_is_asked_for(
    recompute_granularity: str | None, recompute_method: str, recompute_num_layers: int
) -> None:
    asked = {
        f"--recompute-method {recompute_method}": recompute_method != "uniform",
        f"--recompute-num-layers {recompute_num_layers}": recompute_num_layers != 1,
    }
    problems = [
        f"{option} needs --recompute-granularity full"
        for option, value in asked.items()
        if value and recompute_granularity != "full"
    ]
    if problems:
        raise ConfigError(problems)


@checks.add
def saved_activations_can_be_distributed(
    distribute_saved_activations: bool,
    recompute_granularity: str | None,
    tensor_model_parallel_size: int,
    sequence_parallel: bool,
) -> None:
    if not distribute_saved_activations:
        return
    problems = []
    if recompute_granularity != "full":
        problems.append("--distribute-saved-activations needs --recompute-granularity full")
    if tensor_model_parallel_size == 1:
        problems.append(f"--distribute-saved-activations needs {_TENSOR} above 1")
    elif sequence_parallel:
        problems.append(
            "--distribute-saved-activations and --sequence-parallel exclude each other: "
            "activations between layers are split already"
        )
    if problems:
        raise ConfigError(problems)
