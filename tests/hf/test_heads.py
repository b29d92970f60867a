"""Every class of both families: arguments, outputs, losses, names, number formats, ranks.

That the numbers are those of `transformers` is shown elsewhere; here is what can be told from the
outputs alone. Losses are compared with torch's own on the logits that are returned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import megatron.hf as hf
from megatron.errors import ConfigError
from megatron.hf.pretrained import PreTrainedModel
from tests.distributed import run_distributed

BATCH, LENGTH, LABELS, CHOICES, VOCABULARY = 3, 7, 5, 4, 37

FIRST = [
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "head_mask",
    "inputs_embeds",
]
ACROSS = ["encoder_hidden_states", "encoder_attention_mask"]
CACHE = ["past_key_values", "use_cache"]
LAST = ["output_attentions", "output_hidden_states", "return_dict"]

LOOKED_INTO = ["hidden_states", "attentions"]
ONE_LOGITS = ["loss", "logits", *LOOKED_INTO]

# By what follows the name of the family: the arguments between the first and the last ones, and
# the fields of the output.
DOCUMENTED = {
    "Model": (
        ACROSS + CACHE,
        [
            "last_hidden_state",
            "pooler_output",
            "hidden_states",
            "past_key_values",
            "attentions",
            "cross_attentions",
        ],
    ),
    "ForPreTraining": (
        ["labels", "next_sentence_label"],
        ["loss", "prediction_logits", "seq_relationship_logits", *LOOKED_INTO],
    ),
    "ForMaskedLM": ([*ACROSS, "labels"], ONE_LOGITS),
    "ForCausalLM": (
        [*ACROSS, "labels", *CACHE],
        ["loss", "logits", "past_key_values", *LOOKED_INTO, "cross_attentions"],
    ),
    "ForNextSentencePrediction": (["labels"], ONE_LOGITS),
    "ForSequenceClassification": (["labels"], ONE_LOGITS),
    "ForMultipleChoice": (["labels"], ONE_LOGITS),
    "ForTokenClassification": (["labels"], ONE_LOGITS),
    "ForQuestionAnswering": (
        ["start_positions", "end_positions"],
        ["loss", "start_logits", "end_logits", *LOOKED_INTO],
    ),
}
FAMILIES = ("MegatronBert", "Bert")
EVERY = [(family, kind) for family in FAMILIES for kind in DOCUMENTED]
every_class = pytest.mark.parametrize(("family", "kind"), EVERY)
both_families = pytest.mark.parametrize("family", FAMILIES)


def class_of(family: str, kind: str) -> type[Any]:
    name = "BertLMHeadModel" if (family, kind) == ("Bert", "ForCausalLM") else family + kind
    found: type[Any] = getattr(hf, name)
    return found


def config_of(family: str, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 16,
        "num_labels": LABELS,
        "initializer_range": 0.3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return getattr(hf, f"{family}Config")(**(fields | changes))


def model_of(family: str, kind: str, **changes: Any) -> Any:
    torch.manual_seed(5)
    if kind == "ForCausalLM":
        changes = {"is_decoder": True} | changes
    if kind == "ForQuestionAnswering":
        changes = {"num_labels": 2} | changes
    return class_of(family, kind)(config_of(family, **changes))


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    shape = shape or (BATCH, LENGTH)
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def below(size: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, size, shape, generator=torch.Generator().manual_seed(9))


def some_left_out(labels: torch.Tensor) -> torch.Tensor:
    return labels.masked_fill(below(3, *labels.shape) == 0, -100)


def inputs_of(kind: str) -> dict[str, Any]:
    return {"input_ids": tokens(BATCH, CHOICES, LENGTH) if "Choice" in kind else tokens()}


def labels_of(kind: str) -> dict[str, torch.Tensor]:
    if kind == "Model":
        return {}
    if kind == "ForPreTraining":
        labels = some_left_out(tokens(seed=1))
        return {"labels": labels, "next_sentence_label": below(2, BATCH)}
    if kind == "ForQuestionAnswering":
        return {"start_positions": below(LENGTH, BATCH), "end_positions": below(LENGTH, BATCH)}
    return {
        "labels": {
            "ForMaskedLM": some_left_out(tokens(seed=1)),
            "ForCausalLM": some_left_out(tokens(seed=1)),
            "ForNextSentencePrediction": below(2, BATCH),
            "ForSequenceClassification": below(LABELS, BATCH),
            "ForMultipleChoice": below(CHOICES, BATCH),
            "ForTokenClassification": some_left_out(below(LABELS, BATCH, LENGTH)),
        }[kind]
    }


def entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Written out: the mean of -log softmax at the label, without labels of -100."""
    logs = torch.log_softmax(logits.double().flatten(0, -2), dim=-1)
    rows = labels.flatten() != -100
    return -logs[rows].gather(1, labels.flatten()[rows, None]).mean()


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "ForPreTraining": lambda out, labels, next_sentence_label: (
        entropy(out.prediction_logits, labels)
        + entropy(out.seq_relationship_logits, next_sentence_label)
    ),
    "ForMaskedLM": lambda out, labels: entropy(out.logits, labels),
    "ForCausalLM": lambda out, labels: entropy(out.logits[:, :-1], labels[:, 1:]),
    "ForNextSentencePrediction": lambda out, labels: entropy(out.logits, labels),
    "ForSequenceClassification": lambda out, labels: entropy(out.logits, labels),
    "ForMultipleChoice": lambda out, labels: entropy(out.logits, labels),
    "ForTokenClassification": lambda out, labels: entropy(out.logits, labels),
    "ForQuestionAnswering": lambda out, start_positions, end_positions: (
        (entropy(out.start_logits, start_positions) + entropy(out.end_logits, end_positions)) / 2
    ),
}
SHAPES = {
    "last_hidden_state": (BATCH, LENGTH, 12),
    "pooler_output": (BATCH, 12),
    "prediction_logits": (BATCH, LENGTH, VOCABULARY),
    "seq_relationship_logits": (BATCH, 2),
    "start_logits": (BATCH, LENGTH),
    "end_logits": (BATCH, LENGTH),
    "loss": (),
}
LOGITS = {
    "ForMaskedLM": (BATCH, LENGTH, VOCABULARY),
    "ForCausalLM": (BATCH, LENGTH, VOCABULARY),
    "ForNextSentencePrediction": (BATCH, 2),
    "ForSequenceClassification": (BATCH, LABELS),
    "ForMultipleChoice": (BATCH, CHOICES),
    "ForTokenClassification": (BATCH, LENGTH, LABELS),
}


@every_class
def test_the_arguments_are_the_documented_ones(family: str, kind: str) -> None:
    between, _ = DOCUMENTED[kind]
    parameters = inspect.signature(class_of(family, kind).forward).parameters
    names = [name for name in parameters if name not in ("self", "kwargs")]
    assert names == FIRST + between + LAST
    assert all(parameters[name].default is None for name in names)
    assert ("kwargs" in parameters) == (kind == "ForNextSentencePrediction")


@both_families
def test_the_classes_are_a_family(family: str) -> None:
    base = getattr(hf, f"{family}PreTrainedModel")
    for kind in DOCUMENTED:
        cls = class_of(family, kind)
        assert issubclass(cls, base) and issubclass(cls, PreTrainedModel)
        assert cls.config_class is getattr(hf, f"{family}Config")
        assert cls.base_model_prefix == "bert"


@every_class
def test_the_output_has_the_documented_fields(family: str, kind: str) -> None:
    _, fields = DOCUMENTED[kind]
    model = model_of(family, kind).eval()
    asked = {"output_attentions": True, "output_hidden_states": True}
    out = model(**inputs_of(kind), **labels_of(kind), **asked)
    assert [field.name for field in dataclasses.fields(out)] == fields
    for name in set(out) - {"past_key_values", *LOOKED_INTO}:
        assert tuple(out[name].shape) == SHAPES.get(name, LOGITS.get(kind)), name
    assert set(fields) - set(out) <= {"past_key_values", "cross_attentions"}
    rows = BATCH * CHOICES if "Choice" in kind else BATCH
    assert [tuple(h.shape) for h in out.hidden_states] == [(rows, LENGTH, 12)] * 3
    assert [tuple(a.shape) for a in out.attentions] == [(rows, 2, LENGTH, LENGTH)] * 2


@every_class
@pytest.mark.parametrize("with_labels", [False, True])
def test_a_tuple_holds_the_same_in_the_same_order(
    family: str, kind: str, with_labels: bool
) -> None:
    model = model_of(family, kind).eval()
    given = inputs_of(kind) | (labels_of(kind) if with_labels else {})
    given["output_hidden_states"] = True
    out, parts = model(**given), model(**given, return_dict=False)
    model.config.return_dict = False
    configured = model(**given)
    assert isinstance(parts, tuple) and isinstance(configured, tuple)
    named = out.to_tuple()
    assert len(parts) == len(configured) == len(named)
    for left, right, again in zip(parts, named, configured, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
        torch.testing.assert_close(left, again, rtol=0, atol=0)
    if kind != "Model":
        assert ("loss" in out) is with_labels


@both_families
def test_the_base_models_tuple_keeps_a_place_for_the_pooled_token(family: str) -> None:
    model = class_of(family, "Model")(config_of(family), add_pooling_layer=False).eval()
    parts = model(tokens(), return_dict=False)
    assert len(parts) == 2 and parts[1] is None
    assert list(model(tokens()).keys()) == ["last_hidden_state"]


@both_families
def test_a_decoders_classifier_leaves_its_cache_in_the_tuple_alone(family: str) -> None:
    model = model_of(family, "ForTokenClassification", is_decoder=True).eval()
    logits, cache = model(tokens(), return_dict=False)
    assert logits.shape == (BATCH, LENGTH, LABELS) and len(cache) == 2
    assert list(model(tokens()).keys()) == ["logits"]


@every_class
def test_the_loss_is_that_of_the_logits(family: str, kind: str) -> None:
    if kind == "Model":
        return
    model, labels = model_of(family, kind).eval(), labels_of(kind)
    out = model(**inputs_of(kind), **labels)
    torch.testing.assert_close(
        out.loss, LOSSES[kind](out, **labels).to(out.loss.dtype), rtol=1e-5, atol=1e-6
    )
    out.loss.backward()
    reached = [p for p in model.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(reached) > 10


@both_families
def test_both_labels_of_pretraining_make_a_loss(family: str) -> None:
    model = model_of(family, "ForPreTraining").eval()
    for name, value in labels_of("ForPreTraining").items():
        assert model(tokens(), **{name: value}).loss is None


@both_families
@pytest.mark.parametrize(
    ("labels", "num_labels", "expected"),
    [
        (below(LABELS, BATCH), LABELS, "single_label_classification"),
        (below(2, BATCH, LABELS).float(), LABELS, "multi_label_classification"),
        (torch.linspace(-1, 1, BATCH), 1, "regression"),
        (torch.linspace(-1, 1, BATCH)[:, None], 1, "regression"),
    ],
)
def test_the_labels_choose_the_kind_of_problem(
    family: str, labels: torch.Tensor, num_labels: int, expected: str
) -> None:
    model = model_of(family, "ForSequenceClassification", num_labels=num_labels).eval()
    out = model(tokens(), labels=labels)
    assert model.config.problem_type == expected
    logits = out.logits
    if expected == "regression":
        loss = (logits.flatten() - labels.flatten()).square().mean()
    elif expected == "multi_label_classification":
        chances = torch.sigmoid(logits)
        loss = -(labels * chances.log() + (1 - labels) * (1 - chances).log()).mean()
    else:
        loss = entropy(logits, labels.long()).float()
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)


@both_families
def test_a_configured_problem_is_not_chosen_again(family: str) -> None:
    model = model_of(family, "ForSequenceClassification", problem_type="regression").eval()
    labels = torch.randn(BATCH, LABELS, generator=torch.Generator().manual_seed(1))
    out = model(tokens(), labels=labels)
    torch.testing.assert_close(out.loss, (out.logits - labels).square().mean())
    assert model.config.problem_type == "regression"


@both_families
def test_choices_are_scored_one_by_one(family: str) -> None:
    model = model_of(family, "ForMultipleChoice").eval()
    ids, kinds = tokens(BATCH, CHOICES, LENGTH), below(2, BATCH, CHOICES, LENGTH)
    mask = torch.ones_like(ids)
    mask[:, 1, 4:] = 0
    together = model(ids, mask, kinds).logits
    for choice in range(CHOICES):
        part = slice(choice, choice + 1)
        alone = model(ids[:, part], mask[:, part], kinds[:, part]).logits
        torch.testing.assert_close(together[:, part], alone, rtol=1e-5, atol=1e-6)
    table = model.get_input_embeddings().weight
    embedded = model(None, mask, kinds, inputs_embeds=F.embedding(ids, table)).logits
    torch.testing.assert_close(together, embedded, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(attention_mask=mask)


@both_families
def test_positions_behind_the_sequence_are_left_out(family: str) -> None:
    model = model_of(family, "ForQuestionAnswering").eval()
    starts, ends = torch.tensor([2, LENGTH, 99]), torch.tensor([-4, 3, 6])
    out = model(tokens(), start_positions=starts, end_positions=ends)
    start = entropy(out.start_logits[:1], starts[:1])
    end = entropy(out.end_logits, ends.clamp(min=0))
    torch.testing.assert_close(out.loss, ((start + end) / 2).float(), rtol=1e-5, atol=1e-6)
    column = model(tokens(), start_positions=starts[:, None], end_positions=ends[:, None])
    assert torch.equal(column.loss, out.loss)
    assert model(tokens(), start_positions=starts).loss is None


@both_families
def test_an_answer_has_a_start_and_an_end(family: str) -> None:
    with pytest.raises(ConfigError, match="num_labels: found 3"):
        model_of(family, "ForQuestionAnswering", num_labels=3)


@both_families
def test_the_old_name_of_the_next_sentences_label(family: str) -> None:
    model, labels = model_of(family, "ForNextSentencePrediction").eval(), below(2, BATCH)
    expected = model(tokens(), labels=labels).loss
    with pytest.warns(FutureWarning, match="next_sentence_label"):
        assert torch.equal(model(tokens(), next_sentence_label=labels).loss, expected)
    with pytest.raises(TypeError, match="label_of_sentence"):
        model(tokens(), label_of_sentence=labels)


@both_families
@pytest.mark.parametrize(("kind", "is_decoder"), [("ForMaskedLM", True), ("ForCausalLM", False)])
def test_a_direction_that_does_not_fit_is_said(
    family: str, kind: str, is_decoder: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model_of(family, kind, is_decoder=not is_decoder)
    assert caplog.text == ""
    model_of(family, kind, is_decoder=is_decoder)
    assert class_of(family, kind).__name__ in caplog.text and "is_decoder" in caplog.text


@both_families
def test_token_by_token_with_a_cache(family: str) -> None:
    model, ids = model_of(family, "ForCausalLM").eval(), tokens()
    whole = model(ids)
    assert model(ids, labels=ids).past_key_values is None
    assert model(ids, labels=ids, use_cache=True).past_key_values is None
    steps: list[torch.Tensor] = []
    cache: Any = None
    for end in range(1, LENGTH + 1):
        given = model.prepare_inputs_for_generation(ids[:, :end], past_key_values=cache)
        assert given["input_ids"].shape == (BATCH, 1)
        assert given["attention_mask"].shape == (BATCH, end)
        out = model(**given)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole.logits, rtol=1e-4, atol=1e-5)
    order = torch.tensor([2, 0, 0])
    reordered = model._reorder_cache(cache, order)
    assert torch.equal(reordered[1][0], cache[1][0][order])


@every_class
@pytest.mark.parametrize("tied", [True, False])
def test_saved_names_are_those_of_transformers(family: str, kind: str, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = model_of(family, kind, tie_word_embeddings=tied)
    theirs_config = getattr(transformers, f"{family}Config")(**model.config.to_dict())
    theirs = getattr(transformers, type(model).__name__)(theirs_config).state_dict()
    theirs = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    decoder = {f"cls.predictions.decoder.{name}" for name in ("weight", "bias")}
    assert {name: theirs[name] for name in ours} == ours
    assert set(theirs) - set(ours) <= (
        decoder if tied else decoder - {"cls.predictions.decoder.weight"}
    )


@both_families
@pytest.mark.parametrize("kind", ["ForMaskedLM", "ForCausalLM", "ForPreTraining"])
def test_tokens_are_scored_by_the_embeddings_or_by_a_matrix_of_their_own(
    family: str, kind: str
) -> None:
    for tied in (True, False):
        model = model_of(family, kind, tie_word_embeddings=tied).eval()
        ids = tokens().clamp(max=VOCABULARY - 2)
        before = model(ids)[0]
        with torch.no_grad():
            model.get_input_embeddings().weight[VOCABULARY - 1] += 1.0  # of a token not in the text
        after = model(ids)[0]
        assert torch.equal(before[..., :-1], after[..., :-1])
        assert torch.equal(before[..., -1], after[..., -1]) is not tied


@every_class
def test_in_bfloat16(family: str, kind: str) -> None:
    model = model_of(family, kind).eval().to(torch.bfloat16)
    out = model(**inputs_of(kind), **labels_of(kind))
    first = out[0]
    assert first.dtype == torch.bfloat16 and bool(first.isfinite().all())
    first.float().sum().backward()
    gradients = model.gradients()
    assert gradients and all(g.dtype == torch.bfloat16 for g in gradients.values())
    assert all(tensor.dtype == torch.bfloat16 for tensor in model.state_dict().values())


@both_families
def test_dropout_in_front_of_a_classifier(family: str) -> None:
    assert model_of(family, "ForTokenClassification", hidden_dropout_prob=0.25).dropout.p == 0.25
    if family == "Bert":
        changes = {"hidden_dropout_prob": 0.25, "classifier_dropout": 0.5}
        for kind in ("ForTokenClassification", "ForSequenceClassification", "ForMultipleChoice"):
            assert model_of(family, kind, **changes).dropout.p == 0.5


def test_pretraining_has_both_heads() -> None:
    with pytest.raises(ConfigError, match="MegatronBertForMaskedLM"):
        hf.MegatronBertForPreTraining(config_of("MegatronBert"), add_binary_head=False)


def logits_in_training(tensor: int, pipeline: int) -> list[torch.Tensor]:
    """Of classes whose heads differ, in training mode, with dropout."""
    state = hf.parallel_state(tensor, pipeline)
    found = []
    for kind in ("ForTokenClassification", "ForSequenceClassification", "ForMaskedLM"):
        torch.manual_seed(5)
        config = config_of("Bert", classifier_dropout=0.5, hidden_dropout_prob=0.1)
        model = class_of("Bert", kind)(config, parallel_state=state)
        out = model(**inputs_of(kind), **labels_of(kind))
        out.loss.backward()
        found += [out.logits.detach(), out.loss.detach()]
    return found


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_all_ranks_drop_and_return_the_same(tensor: int, pipeline: int) -> None:
    one, other = run_distributed(2, logits_in_training, tensor, pipeline)
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left, right)


def examples(kind: str) -> str:
    """The code in the documentation, of one process or for torchrun."""
    text = (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text(encoding="utf-8")
    return "\n".join(re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


def run_example(directory: Path) -> None:
    with contextlib.chdir(directory):
        exec(compile(examples("python torchrun"), "docs/huggingface.md", "exec"), {})


def test_the_examples_of_the_documentation_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(examples("python"), "docs/huggingface.md", "exec"), names)
    assert names["result"].number == 10 and names["text"].shape == (1, 8)
    saved = tmp_path / "small-classifier" / "model.safetensors"
    saved.unlink()
    run_distributed(4, run_example, tmp_path)
    assert saved.exists()
