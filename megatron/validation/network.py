"""The shape of the network, its kind of layer and its number format."""

from megatron.config import ModelConfig, all_flags
from megatron.errors import ConfigError
from megatron.validation.checks import Checks, divides, exclude_each_other

checks = Checks()


@checks.add
def heads_share_the_width(
    hidden_size: int, num_attention_heads: int, kv_channels: int | None
) -> None:
    if kv_channels is None and hidden_size % num_attention_heads:
        raise ConfigError(
            f"--hidden-size {hidden_size} is not divisible by "
            f"--num-attention-heads {num_attention_heads}: "
            "state the width of a head with --kv-channels"
        )


@checks.add
def query_groups_are_equal(num_attention_heads: int, num_query_groups: int | None) -> None:
    if num_query_groups is not None:
        option = "--num-query-groups"
        divides("--num-attention-heads", num_attention_heads, option, num_query_groups)


@checks.add
def positions_suffice(seq_length: int, max_position_embeddings: int) -> None:
    _fits("--seq-length", seq_length, max_position_embeddings)


@checks.add
def positions_of_the_decoder_suffice(
    decoder_seq_length: int | None, max_position_embeddings: int
) -> None:
    _fits("--decoder-seq-length", decoder_seq_length or 0, max_position_embeddings)


def _fits(option: str, length: int, positions: int) -> None:
    if length > positions:
        raise ConfigError(f"{option} {length} is larger than --max-position-embeddings {positions}")


@checks.add
def rotations_turn_pairs(
    position_embedding_type: str,
    hidden_size: int,
    num_attention_heads: int,
    kv_channels: int | None,
    rotary_percent: float,
) -> None:
    if position_embedding_type != "rope" or (
        kv_channels is None and hidden_size % num_attention_heads
    ):
        return  # or the check of the heads speaks
    model = ModelConfig(
        num_layers=1,
        max_position_embeddings=1,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        kv_channels=kv_channels,
        rotary_percent=rotary_percent,
    )
    if model.rotary_channels % 2 or model.rotary_channels == 0:
        raise ConfigError(
            f"--position-embedding-type rope turns pairs of channels: --rotary-percent "
            f"{rotary_percent:g} of a head's {model.head_size} channels is {model.rotary_channels}"
        )


@checks.add
def positions_have_their_options(
    position_embedding_type: str,
    rotary_base: float,
    rotary_percent: float,
    relative_attention_num_buckets: int,
    relative_attention_max_distance: int,
) -> None:
    options = {
        "rotary_base": (rotary_base, "rope"),
        "rotary_percent": (rotary_percent, "rope"),
        "relative_attention_num_buckets": (relative_attention_num_buckets, "relative"),
        "relative_attention_max_distance": (relative_attention_max_distance, "relative"),
    }
    flags = all_flags()
    problems = [
        f"{flags[name].option} needs --position-embedding-type {kind}"
        for name, (value, kind) in options.items()
        if value != flags[name].default and kind != position_embedding_type
    ]
    if problems:
        raise ConfigError(problems)


@checks.add
def distances_have_buckets(
    position_embedding_type: str,
    relative_attention_num_buckets: int,
    relative_attention_max_distance: int,
) -> None:
    if position_embedding_type != "relative":
        return
    buckets, farthest = relative_attention_num_buckets, relative_attention_max_distance
    # Half of the buckets hold one distance each, the others share those up to the farthest.
    if farthest <= buckets // 2:
        raise ConfigError(
            f"--relative-attention-max-distance {farthest} is not larger than half of "
            f"--relative-attention-num-buckets {buckets}"
        )


@checks.add
def one_activation(swiglu: bool, geglu: bool, activation: str) -> None:
    exclude_each_other(("--swiglu", swiglu), ("--geglu", geglu))
    exclude_each_other(("--swiglu", swiglu), (f"--activation {activation}", activation != "gelu"))


@checks.add
def one_way_to_normalise(
    norm_position: str, apply_residual_connection_post_layernorm: bool
) -> None:
    exclude_each_other(
        ("--norm-position post", norm_position == "post"),
        ("--apply-residual-connection-post-layernorm", apply_residual_connection_post_layernorm),
    )


@checks.add
def one_precision(fp16: bool, bf16: bool, fp64: bool) -> None:
    exclude_each_other(("--fp16", fp16), ("--bf16", bf16), ("--fp64", fp64))


@checks.add
def residuals_are_wider_than_the_rest(
    fp32_residual_connection: bool, fp16: bool, bf16: bool
) -> None:
    if fp32_residual_connection and not (fp16 or bf16):
        raise ConfigError("--fp32-residual-connection needs --fp16 or --bf16")


@checks.add
def a_normalised_stream_is_not_wider(fp32_residual_connection: bool, norm_position: str) -> None:
    exclude_each_other(
        ("--fp32-residual-connection", fp32_residual_connection),
        ("--norm-position post", norm_position == "post"),
    )
