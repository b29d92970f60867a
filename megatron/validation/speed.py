"""What makes a run faster, and what it cannot be combined with."""

from megatron.config import ModelConfig, all_flags
from megatron.errors import ConfigError
from megatron.validation.checks import Checks, exclude_each_other

checks = Checks()

_EIGHT_BIT_MULTIPLE = 16  # of both sizes of a product's factors, as the GPU takes them


@checks.add
def packing_belongs_to_bert(model_type: str, pack_sequences: bool) -> None:
    if pack_sequences and model_type != "bert":
        raise ConfigError(
            "--pack-sequences is for BERT alone: samples of "
            f"{ {'gpt': 'GPT', 't5': 'T5'}[model_type] } are not packed"
        )


@checks.add
def packed_rows_have_any_length(
    pack_sequences: bool, pipeline_model_parallel_size: int, cuda_graphs: bool
) -> None:
    if not pack_sequences:
        return
    if pipeline_model_parallel_size > 1:
        raise ConfigError(
            "--pack-sequences needs --pipeline-model-parallel-size 1, found "
            f"{pipeline_model_parallel_size}: the activations' shape changes between micro-batches"
        )
    exclude_each_other(("--pack-sequences", True), ("--cuda-graphs", cuda_graphs))


@checks.add
def packed_rows_are_compiled_too_often(pack_sequences: bool, compile: bool) -> None:
    # The compiler gives up after a few lengths, at others in a run that is resumed.
    exclude_each_other(("--pack-sequences", pack_sequences), ("--compile", compile))


@checks.add
def packed_positions_are_of_tokens(pack_sequences: bool, position_embedding_type: str) -> None:
    option = f"--position-embedding-type {position_embedding_type}"
    is_by_distance = position_embedding_type.startswith("relative")
    exclude_each_other(("--pack-sequences", pack_sequences), (option, is_by_distance))


@checks.add
def recorded_steps_are_alike(
    cuda_graphs: bool,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    recompute_granularity: str | None,
    shard_gradients: bool,
    reset_attention_mask: bool,
    use_cpu: bool,
) -> None:
    if not cuda_graphs:
        return
    problems = [
        f"--cuda-graphs needs --{axis}-model-parallel-size 1, found {size}"
        for axis, size in (
            ("tensor", tensor_model_parallel_size),
            ("pipeline", pipeline_model_parallel_size),
        )
        if size > 1
    ]
    excluded = {
        # Replaying a pass sets the state of the random streams, which cannot be recorded.
        f"--recompute-granularity {recompute_granularity}": recompute_granularity is not None,
        # A gradient is sent on while a backward pass goes on, by the host.
        "--shard-gradients": shard_gradients,
        # The work is cut by the documents' lengths, which a recording would keep.
        "--reset-attention-mask": reset_attention_mask,
        "--use-cpu": use_cpu,
    }
    problems += [
        f"--cuda-graphs and {name} exclude each other" for name, given in excluded.items() if given
    ]
    if problems:
        raise ConfigError(problems)


@checks.add
def eight_bits_are_of_bfloat16(fp8_format: str | None, bf16: bool) -> None:
    if fp8_format is not None and not bf16:
        raise ConfigError(f"--fp8-format {fp8_format} needs --bf16")


@checks.add
def eight_bits_come_by_the_sixteen(
    fp8_format: str | None,
    hidden_size: int,
    num_attention_heads: int,
    kv_channels: int | None,
    num_query_groups: int | None,
    ffn_hidden_size: int | None,
    swiglu: bool,
    geglu: bool,
    tensor_model_parallel_size: int,
) -> None:
    if fp8_format is None:
        return
    model = ModelConfig(
        num_layers=1,
        max_position_embeddings=1,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        kv_channels=kv_channels,
        num_query_groups=num_query_groups,
        ffn_hidden_size=ffn_hidden_size,
        swiglu=swiglu,
        geglu=geglu,
    )
    of_queries = num_attention_heads * model.head_size
    of_keys = model.key_value_heads * model.head_size
    split = {
        "queries": of_queries,
        "keys and values": 2 * of_keys,
        "queries, keys and values": of_queries + 2 * of_keys,
        "MLP": model.ffn_size,
    }
    sizes = {"--hidden-size": hidden_size} | {
        f"the width of the {part} on a tensor rank": width // tensor_model_parallel_size
        for part, width in split.items()
    }
    need = f"--fp8-format {fp8_format} needs sizes divisible by {_EIGHT_BIT_MULTIPLE}"
    problems = [
        f"{need}: {what} is {size}" for what, size in sizes.items() if size % _EIGHT_BIT_MULTIPLE
    ]
    if problems:
        raise ConfigError(problems)


@checks.add
def eight_bits_have_their_options(
    fp8_format: str | None, fp8_recipe: str, fp8_amax_history_len: int
) -> None:
    flags = all_flags()
    if fp8_recipe != flags["fp8_recipe"].default and fp8_format is None:
        raise ConfigError(f"--fp8-recipe {fp8_recipe} needs --fp8-format")
    if fp8_amax_history_len != flags["fp8_amax_history_len"].default and fp8_recipe != "delayed":
        raise ConfigError("--fp8-amax-history-len needs --fp8-recipe delayed")


@checks.add
def backends_of_half_precision(
    attention_backend: str, fp16: bool, bf16: bool, use_cpu: bool
) -> None:
    if attention_backend in ("flash", "cudnn") and not (fp16 or bf16 or use_cpu):
        raise ConfigError(f"--attention-backend {attention_backend} needs --fp16 or --bf16")


@checks.add
def flash_has_no_masks(
    attention_backend: str,
    model_type: str,
    pack_sequences: bool,
    position_embedding_type: str,
    use_cpu: bool,
) -> None:
    if attention_backend != "flash" or use_cpu:
        return
    if model_type == "t5":
        raise ConfigError("--attention-backend flash cannot mask T5's padding")
    if position_embedding_type.startswith("relative"):
        raise ConfigError(
            "--attention-backend flash cannot add the scores of "
            f"--position-embedding-type {position_embedding_type}"
        )
    if model_type == "bert" and not pack_sequences:
        raise ConfigError("--attention-backend flash cannot mask padding: add --pack-sequences")
