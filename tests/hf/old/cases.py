"""Random models of the MegatronBERT and BERT families and random calls of them, as plain JSON.

A case holds the class, its configuration, how it is saved, and one call or two: the second one
continues from the past key values of the first. What transformers 4.34.0 answers with an error, or
by accident (cross attentions of a call without encoder states), is not drawn.
"""

from __future__ import annotations

import random
from typing import Any

from tests.hf.old.records import Call, Case

HEADS = [
    "Model",
    "ForMaskedLM",
    "ForCausalLM",
    "ForNextSentencePrediction",
    "ForPreTraining",
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForTokenClassification",
    "ForQuestionAnswering",
]
CLASSES = [f"MegatronBert{head}" for head in HEADS] + [
    f"Bert{'LMHeadModel' if head == 'ForCausalLM' else head}" for head in HEADS
]
ACTIVATIONS = [
    *("gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh"),
    *("gelu_accurate", "laplace", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6"),
    *("sigmoid", "silu", "swish", "tanh"),
]


def draw_case(draw: random.Random, model_class: str | None = None, *, small: bool = False) -> Case:
    """A case of ``model_class``, or of any; a ``small`` one fits two ranks and two stages."""
    model_class = model_class or draw.choices(CLASSES, [_weight(name) for name in CLASSES])[0]
    head = kind(model_class)
    config = _config(draw, head, small)
    size = _size(draw, head)
    states = None
    if config.get("add_cross_attention") and draw.random() < 0.85:
        states = _normal(draw, (size[0], draw.randint(1, 9), config["hidden_size"]))
    calls = [_call(draw, head, config, size, states)]
    if head in ("Model", "ForCausalLM") and config.get("is_decoder") and draw.random() < 0.5:
        calls[0].pop("labels", None)
        calls[0]["use_cache"] = True
        new = draw.choice([1, 1, 2, 3])
        calls.append(_call(draw, head, config, (size[0], new), states, past=size[1]))
    chunks = [n for n in (2, 3, 4) if all(length(call) % n == 0 for call in calls)]
    if chunks and draw.random() < 0.3:
        config["chunk_size_feed_forward"] = draw.choice(chunks)
    return {
        "class": model_class,
        "arguments": {"add_pooling_layer": False} if head == "Model" and _one_in(draw, 5) else {},
        "config": config,
        "save": _save(draw),
        "seed": draw.randrange(2**31),
        "calls": calls,
        "through_past": len(calls) > 1 and draw.random() < 0.3,
    }


def fits(case: Case, tensor: int, pipeline: int) -> bool:
    """Whether the model can be cut into ``tensor`` ranks and ``pipeline`` stages."""
    config = case["config"]
    return (
        config["num_attention_heads"] % tensor == 0
        and config["intermediate_size"] % tensor == 0
        and config["num_hidden_layers"] >= pipeline
    )


def kind(model_class: str) -> str:
    """The head of a class, by MegatronBERT's name for it."""
    head = model_class.removeprefix("Megatron").removeprefix("Bert")
    return "ForCausalLM" if head == "LMHeadModel" else head


def shape(value: Any) -> tuple[int, ...]:
    """The shape of a drawn argument."""
    if isinstance(value, dict):
        return tuple(value["normal"])
    sizes = []
    while isinstance(value, list):
        sizes.append(len(value))
        value = value[0]
    return tuple(sizes)


def length(call: Call) -> int:
    """How many tokens a call holds for each sequence."""
    if "input_ids" in call:
        return shape(call["input_ids"])[-1]
    return shape(call["inputs_embeds"])[-2]


def _weight(model_class: str) -> int:
    """How often a class is drawn: more often where more can be asked of it."""
    return 3 if kind(model_class) in ("Model", "ForCausalLM") else 1


def _one_in(draw: random.Random, times: int) -> bool:
    return draw.random() < 1 / times


def _config(draw: random.Random, head: str, small: bool) -> dict[str, Any]:
    heads = 2 if small else draw.choice([1, 2, 3, 4])
    # A norm over very few channels makes of rounding what it likes.
    head_size = 8 if small else draw.choice([size for size in (4, 5, 8, 16) if size * heads >= 15])
    config: dict[str, Any] = {
        "vocab_size": draw.randint(31, 37) if small else draw.randint(37, 61),
        "hidden_size": heads * head_size,
        "num_hidden_layers": 2 if small else draw.randint(1, 3),
        "num_attention_heads": heads,
        "intermediate_size": 24 if small else draw.choice([24, 31, 40, 64]),
        "hidden_act": draw.choice(ACTIVATIONS),
        "max_position_embeddings": draw.randint(14, 24),
        "type_vocab_size": draw.choice([1, 2, 2, 3]),
        # Wider ones saturate attention, and float32 no longer knows the gradients to 1e-5.
        "initializer_range": round(draw.choice([0.2, 0.5, 1.0]) / (heads * head_size) ** 0.5, 3),
        "layer_norm_eps": draw.choice([1e-12, 1e-5, 1e-3]),
        "pad_token_id": draw.choice([0, 0, 3, None]),
        "position_embedding_type": draw.choice(
            ["absolute", "absolute", "relative_key", "relative_key_query"]
        ),
        "tie_word_embeddings": draw.random() < 0.7,
    }
    decoder = {"ForCausalLM": 0.85, "Model": 0.5, "ForMaskedLM": 0.25}.get(head, 0.1)
    if draw.random() < decoder:
        config["is_decoder"] = True
        config["add_cross_attention"] = (
            head in ("Model", "ForMaskedLM", "ForCausalLM") and draw.random() < 0.5
        )
    for name in ("output_attentions", "output_hidden_states"):
        if _one_in(draw, 10) and not config.get("add_cross_attention"):
            config[name] = True
    if _one_in(draw, 10):
        config["return_dict"] = False
    if _one_in(draw, 10):
        config["use_cache"] = False
    if _one_in(draw, 3):
        config["classifier_dropout"] = 0.3
    if head == "ForQuestionAnswering":
        config["num_labels"] = 2
    elif head in ("ForSequenceClassification", "ForTokenClassification"):
        config["num_labels"] = draw.randint(1, 4)
    if head == "ForSequenceClassification" and _one_in(draw, 2):
        config["problem_type"] = _problem(draw, config["num_labels"])
    return config


def _problem(draw: random.Random, labels: int) -> str:
    if labels == 1:
        return draw.choice(["regression", "multi_label_classification"])
    return draw.choice(["regression", "single_label_classification", "multi_label_classification"])


def _save(draw: random.Random) -> dict[str, Any]:
    """One file or several, safetensors or PyTorch's own format."""
    return {
        "safe_serialization": draw.random() < 0.5,
        "max_shard_size": draw.choice(["10GB", "10GB", "8KB"]),
    }


def _size(draw: random.Random, head: str) -> tuple[int, ...]:
    """Sequences (of choices) and tokens."""
    batch, tokens = draw.randint(1, 3), draw.choice([1, 2, 3, 4, 6, 6, 8, 9])
    if head == "ForMultipleChoice":
        return batch, draw.randint(2, 3), tokens
    return batch, tokens


def _call(
    draw: random.Random,
    head: str,
    config: dict[str, Any],
    size: tuple[int, ...],
    states: dict[str, Any] | None,
    past: int = 0,
) -> Call:
    """The arguments of one call for ``size`` tokens.

    ``states`` are those of an encoder; ``past`` positions of the sequences are in a cache.
    """
    call = _tokens(draw, config, size)
    mask = _attention_mask(draw, size, past)
    if mask is not None:
        call["attention_mask"] = mask
    if _one_in(draw, 3):
        call["head_mask"] = _head_mask(draw, config)
    if states is not None:
        call["encoder_hidden_states"] = states
        if _one_in(draw, 2):
            rows = size if _one_in(draw, 4) else size[:1]
            call["encoder_attention_mask"] = _bits(draw, (*rows, shape(states)[1]), 0.7)
    if (states is not None or not config.get("add_cross_attention")) and _one_in(draw, 2):
        call["output_attentions"] = draw.random() < 0.85
    if _one_in(draw, 2):
        call["output_hidden_states"] = draw.random() < 0.85
    if _one_in(draw, 2):
        call["return_dict"] = draw.random() < 0.5
    if head in ("Model", "ForCausalLM") and _one_in(draw, 2):
        call["use_cache"] = draw.random() < 0.5
    if draw.random() < 0.7 and (head != "ForCausalLM" or size[-1] > 1):
        call |= _labels(draw, head, config, size)
    return call


def _tokens(draw: random.Random, config: dict[str, Any], size: tuple[int, ...]) -> Call:
    """Token ids or embeddings, with or without token types and positions."""
    call: Call = {}
    if _one_in(draw, 5):
        call["inputs_embeds"] = _normal(draw, (*size, config["hidden_size"]))
    else:
        call["input_ids"] = _integers(draw, size, config["vocab_size"])
    if _one_in(draw, 2):
        call["token_type_ids"] = _integers(draw, size, config["type_vocab_size"])
    if _one_in(draw, 3):
        shared = len(size) == 2 and _one_in(draw, 2)
        call["position_ids"] = _integers(
            draw, (1, size[-1]) if shared else size, config["max_position_embeddings"]
        )
    return call


def _attention_mask(draw: random.Random, size: tuple[int, ...], past: int) -> list[Any] | None:
    """No mask, padding on either side, any two-dimensional mask, or one with rows for each query.

    What is masked altogether attends to everything alike, there and here.
    """
    *batch, length = size
    total = past + length
    which = draw.choice(["none", "right", "left", "any", "rows" if len(batch) == 1 else "any"])
    if which == "none":
        return None
    number = draw.choice([int, int, float, bool])
    if which == "rows":
        return _bits(draw, (*batch, length, total), 0.7, number)
    if which == "any":
        return _bits(draw, (*batch, total), 0.7, number)

    def row() -> list[Any]:
        real = draw.randint(1, total)
        bits = [number(1)] * real + [number(0)] * (total - real)
        return bits if which == "right" else bits[::-1]

    return _nested(batch, row)


def _head_mask(draw: random.Random, config: dict[str, Any]) -> list[Any]:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]

    def row() -> list[float]:
        return [draw.choice([0.0, 0.5, 1.0, 1.0]) for _ in range(heads)]

    return _nested([layers], row) if _one_in(draw, 2) else row()


def _labels(draw: random.Random, head: str, config: dict[str, Any], size: tuple[int, ...]) -> Call:
    """What the class computes its loss from."""
    batch = size[0]
    if head == "ForMaskedLM":
        return {"labels": _token_labels(draw, size, config["vocab_size"])}
    if head == "ForCausalLM":
        return {"labels": _token_labels(draw, size, config["vocab_size"], start=1)}
    if head == "ForNextSentencePrediction":
        name = "next_sentence_label" if _one_in(draw, 4) else "labels"
        return {name: _integers(draw, (batch,), 2)}
    if head == "ForPreTraining":
        call: Call = {"labels": _token_labels(draw, size, config["vocab_size"])}
        if draw.random() < 0.85:
            call["next_sentence_label"] = _integers(draw, (batch,), 2)
        return call
    if head == "ForSequenceClassification":
        return {"labels": _sequence_labels(draw, config, batch)}
    if head == "ForMultipleChoice":
        return {"labels": _integers(draw, (batch,), size[1])}
    if head == "ForTokenClassification":
        return {"labels": _token_labels(draw, size, config["num_labels"])}
    if head == "ForQuestionAnswering":
        return _spans(draw, size)
    return {}


def _sequence_labels(draw: random.Random, config: dict[str, Any], batch: int) -> list[Any]:
    """Classes or numbers, as the stated kind of problem has them, or as one may be guessed from."""
    labels = config["num_labels"]
    guess = "regression" if labels == 1 else draw.choice(["single", "multi"])
    problem = config.get("problem_type", guess)
    if problem.startswith("single"):
        return _integers(draw, (batch,), labels)
    if problem.startswith("multi"):
        return _bits(draw, (batch, labels), 0.5, float)
    if labels == 1:
        rows = [round(draw.gauss(0, 1), 3) for _ in range(batch)]
        return [[value] for value in rows] if _one_in(draw, 2) else rows
    return [[round(draw.gauss(0, 1), 3) for _ in range(labels)] for _ in range(batch)]


def _token_labels(
    draw: random.Random, size: tuple[int, ...], below: int, start: int = 0
) -> list[list[int]]:
    """Labels of tokens, some of them -100; at least one from place ``start`` on is not."""
    rows = _nested(size, lambda: -100 if _one_in(draw, 3) else draw.randrange(below))
    rows[0][draw.randrange(start, size[1])] = draw.randrange(below)
    return rows


def _spans(draw: random.Random, size: tuple[int, ...]) -> Call:
    """First and last tokens of answers, a few of them outside of the sequence."""
    batch, length = size
    call: Call = {}
    for name in ("start_positions", "end_positions"):
        places = [draw.randrange(length + 2) for _ in range(batch)]
        places[draw.randrange(batch)] = draw.randrange(length)
        call[name] = [[place] for place in places] if _one_in(draw, 4) else places
    return call


def _normal(draw: random.Random, size: tuple[int, ...]) -> dict[str, Any]:
    return {"normal": list(size), "seed": draw.randrange(2**31)}


def _integers(draw: random.Random, size: tuple[int, ...], below: int) -> list[Any]:
    return _nested(size, lambda: draw.randrange(below))


def _bits(
    draw: random.Random, size: tuple[int, ...], share: float, number: type = int
) -> list[Any]:
    return _nested(size, lambda: number(draw.random() < share))


def _nested(size: Any, make: Any) -> Any:
    """Lists within lists of the sizes ``size``."""
    if not size:
        return make()
    return [_nested(size[1:], make) for _ in range(size[0])]
