"""Configurations to test with: one small and valid, and any number of random valid ones."""

from typing import Any

from hypothesis import strategies as st

from megatron.config import Config

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
    tensor, stages, data = (draw(st.integers(1, 4)) for _ in range(3))
    heads = tensor * draw(st.integers(1, 4))
    layers = tuple(draw(st.lists(st.integers(1, 3), min_size=stages, max_size=stages)))
    counted = draw(st.sampled_from(["iters", "samples"]))
    length = draw(st.integers(1, 10**9))
    micro = draw(st.integers(1, 8))
    values: dict[str, Any] = {
        "num_layers": sum(layers),
        "hidden_size": heads * draw(st.integers(1, 16)),
        "num_attention_heads": heads,
        "ffn_hidden_size": tensor * draw(st.integers(1, 64)),
        "max_position_embeddings": (positions := draw(st.integers(1, 4096))),
        "seq_length": draw(st.integers(1, positions)),
        "vocab_size": draw(st.none() | _positive),
        "hidden_dropout": draw(_probability),
        "layernorm_epsilon": draw(st.floats(1e-12, 1)),
        "openai_gelu": draw(st.booleans()),
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": stages,
        "pipeline_layers": layers,
        "pipeline_schedule": draw(st.sampled_from(["gpipe", "1f1b"])),
        "lr": (lr := draw(st.floats(0, 1))),
        "min_lr": draw(st.floats(0, lr)),
        "initial_loss_scale": 2.0 ** draw(st.integers(0, 60)),
        f"train_{counted}": length,
        f"lr_decay_{counted}": (decay := draw(st.integers(1, length))),
        f"lr_warmup_{counted}": draw(st.integers(0, decay)),
        "micro_batch_size": micro,
        "global_batch_size": micro * data * draw(st.integers(1, 4)),
        "metrics_file": draw(st.none() | _texts),
        "tensorboard_dir": draw(st.none() | _texts),
        "exit_duration_in_mins": draw(st.none() | st.floats(0.1, 1e6)),
        draw(st.sampled_from(["fp16", "bf16", "fp64"])): draw(st.booleans()),
    }
    return values, tensor * stages * data
