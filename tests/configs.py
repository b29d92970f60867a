"""Configurations to test with: one small and valid, and any number of random valid ones."""

from typing import Any

from hypothesis import strategies as st

from megatron.config import Config
from megatron.config.model import ACTIVATIONS

SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "lr": 1e-4,
    "seq_length": 64,
    "micro_batch_size": 2,
    "train_iters": 10,
}


def small(**changes: Any) -> Config:
    """The small configuration with some fields, of whatever section, set otherwise."""
    return Config.from_flags(SMALL | changes)


def argv_of(values: dict[str, Any]) -> list[str]:
    """The command line that states these values, by field name."""
    words: list[str] = []
    for name, value in values.items():
        option = "--" + name.replace("_", "-")
        if value is None or value is False or value == ():
            continue
        if value is True:
            words.append(option)
        elif isinstance(value, tuple):
            words += [option, *map(str, value)]
        else:
            words += [option, str(value)]
    return words


SMALL_ARGV = argv_of(SMALL)

_positive = st.integers(1, 10**12)
_probability = st.floats(0, 0.999)
_texts = st.text(
    st.characters(exclude_categories=["C", "Z"], exclude_characters="-="), min_size=1, max_size=20
).filter(lambda text: text.lower() not in ("true", "false"))


@st.composite
def valid_values(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Values by field name that exclude nothing, and a number of ranks that they run on."""
    model = draw(st.sampled_from(["bert", "gpt", "t5"]))
    tensor, ranks, data = (draw(st.integers(1, 4)) for _ in range(3))
    values: dict[str, Any] = {
        "model_type": model,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": ranks,
        "vocab_size": draw(st.none() | _positive),
        "metrics_file": draw(st.none() | _texts),
        "tensorboard_dir": draw(st.none() | _texts),
        "exit_duration_in_mins": draw(st.none() | st.floats(0.1, 1e6)),
    }
    values |= draw(_layers(model, tensor))
    values |= draw(_stages(model, ranks))
    values |= draw(_sequences(model, tensor))
    values |= draw(_length_and_batch(data))
    values |= draw(_memory(tensor, ranks, sequence_parallel=values["sequence_parallel"]))
    return values, tensor * ranks * data


@st.composite
def _layers(draw: st.DrawFn, model: str, tensor: int) -> dict[str, Any]:
    groups = tensor * draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 3))
    gate = draw(st.sampled_from([None, "swiglu", "geglu"]))
    position = draw(st.sampled_from(["pre"] if model == "t5" else ["pre", "post"]))
    precision = draw(st.sampled_from(["fp16", "bf16", "fp64"]))
    values = {
        "num_attention_heads": heads,
        "num_query_groups": draw(st.sampled_from([None, groups])),
        "hidden_size": heads * 2 * draw(st.integers(1, 8)),
        "ffn_hidden_size": tensor * draw(st.integers(1, 64)),
        "normalization": draw(st.sampled_from(["LayerNorm", "RMSNorm"])),
        "layernorm_epsilon": draw(st.floats(1e-12, 1)),
        "norm_position": position,
        "apply_residual_connection_post_layernorm": position == "pre" and draw(st.booleans()),
        "disable_bias_linear": draw(st.booleans()),
        "hidden_dropout": draw(_probability),
        "attention_backend": draw(st.sampled_from(["auto", "unfused"])),
        "activation": "gelu" if gate == "swiglu" else draw(st.sampled_from(ACTIVATIONS)),
        "attention_scale": draw(st.none() | st.floats(1e-3, 10)),
        precision: (is_given := draw(st.booleans())),
        "fp32_residual_connection": (
            is_given and precision != "fp64" and position == "pre" and draw(st.booleans())
        ),
        "bert_no_binary_head": model == "bert" and draw(st.booleans()),
        "untie_embeddings_and_output_weights": draw(st.booleans()),
    }
    if gate is not None:
        values[gate] = True
    if model == "bert":
        values["num_tokentypes"] = draw(st.integers(0, 3))
        values["head_activation"] = draw(st.none() | st.sampled_from(ACTIVATIONS))
    else:
        values["logit_scale"] = draw(st.floats(1e-3, 10))
    positions = ["learned_absolute", "rope"]
    positions += {"bert": ["relative_key", "relative_key_query"], "t5": ["relative"]}.get(model, [])
    match draw(st.sampled_from(positions)):
        case "relative_key" | "relative_key_query" as kind:
            values["position_embedding_type"] = kind
        case "rope":
            values |= {"position_embedding_type": "rope", "rotary_base": draw(st.floats(2, 1e6))}
        case "relative":
            values |= {
                "position_embedding_type": "relative",
                "relative_attention_num_buckets": (buckets := draw(st.integers(4, 64))),
                "relative_attention_max_distance": draw(st.integers(buckets // 2 + 1, 999)),
            }
    return values


@st.composite
def _stages(draw: st.DrawFn, model: str, ranks: int) -> dict[str, Any]:
    """Stages of stated or of equal numbers of layers, and a schedule."""
    plain = ["gpipe", "1f1b", "zb-h1", "zb-2p"]
    schedule = draw(st.sampled_from(plain + ["interleaved"] * (model != "t5" and ranks > 1)))
    virtual = draw(st.integers(2, 3)) if schedule == "interleaved" else 1
    values: dict[str, Any] = {"pipeline_schedule": schedule}
    if schedule == "zb-2p":
        costs = st.tuples(*[st.floats(0, 1e3)] * 4)
        values["pipeline_costs"] = draw(st.none() | costs)
    if model == "t5":
        split = draw(st.integers(1, ranks - 1)) if ranks > 1 else None
        encoder, decoder = (
            draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
            for count in (split or 1, ranks - (split or 0))
        )
        return values | {
            "pipeline_model_parallel_split_rank": split,
            "num_layers": sum(encoder),
            "decoder_num_layers": sum(decoder),
            "pipeline_layers": (*encoder, *decoder) if split else None,
        }
    stages = ranks * virtual
    if draw(st.booleans()):
        layers = tuple(draw(st.lists(st.integers(1, 3), min_size=stages, max_size=stages)))
        return values | {"num_layers": sum(layers), "pipeline_layers": layers}
    each = draw(st.integers(1, 3))
    if schedule == "interleaved":
        values["num_layers_per_virtual_pipeline_stage"] = each
    return values | {"num_layers": each * stages}


@st.composite
def _sequences(draw: st.DrawFn, model: str, tensor: int) -> dict[str, Any]:
    sequence_parallel = draw(st.booleans())
    unit = tensor if sequence_parallel else 1
    lengths = st.integers(1, 1024).map(lambda length: length * unit)
    values: dict[str, Any] = {
        "sequence_parallel": sequence_parallel,
        "seq_length": (length := draw(lengths)),
        "max_position_embeddings": length,
    }
    if model == "gpt":
        switches = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
        return values | {name: draw(st.booleans()) for name in switches}
    values["mask_prob"] = draw(st.floats(0.01, 0.99))
    if model == "t5":
        values |= {
            "decoder_seq_length": (target := draw(st.none() | lengths)),
            "max_position_embeddings": max(length, target or 1),
            "vocab_extra_ids": draw(st.integers(1, 100)),
            "mean_span_length": draw(st.floats(1, 10)),
        }
    return values


@st.composite
def _length_and_batch(draw: st.DrawFn, data: int) -> dict[str, Any]:
    counted = draw(st.sampled_from(["iters", "samples"]))
    length = draw(st.integers(1, 10**9))
    samples = (micro := draw(st.integers(1, 8))) * data
    start, increment, steps = (samples * draw(st.integers(1, 3)) for _ in range(3))
    values: dict[str, Any] = {
        "lr": (lr := draw(st.floats(0, 1))),
        "min_lr": draw(st.floats(0, lr)),
        "initial_loss_scale": 2.0 ** draw(st.integers(0, 60)),
        f"train_{counted}": length,
        f"lr_decay_{counted}": (decay := draw(st.integers(1, length))),
        f"lr_warmup_{counted}": draw(st.integers(0, decay)),
        "micro_batch_size": micro,
        "global_batch_size": start + increment * steps,
    }
    if counted == "samples" and draw(st.booleans()):
        values["rampup_batch_size"] = (start, increment, draw(st.integers(1, 10**6)))
    return values


@st.composite
def _memory(draw: st.DrawFn, tensor: int, ranks: int, *, sequence_parallel: bool) -> dict[str, Any]:
    """What is kept, what is shared out and what is computed again."""
    distributed = draw(st.booleans())
    values: dict[str, Any] = {
        "use_distributed_optimizer": distributed,
        "shard_gradients": distributed and ranks == 1 and draw(st.booleans()),
        "recompute_granularity": draw(st.sampled_from([None, "selective", "full"])),
    }
    if values["recompute_granularity"] == "full":
        values |= {
            "recompute_method": draw(st.sampled_from(["uniform", "block"])),
            "recompute_num_layers": draw(st.integers(1, 4)),
            "distribute_saved_activations": (
                tensor > 1 and not sequence_parallel and draw(st.booleans())
            ),
        }
    return values
