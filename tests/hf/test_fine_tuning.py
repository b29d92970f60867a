"""Fine-tuning changes with the layout and the cut into micro-batches by rounding alone.

In float64 and without dropout, all ways of training are compared with one process that takes each
step's samples at once, and that with a plain PyTorch loop over the model of `transformers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import megatron.hf as hf
from megatron.errors import ConfigError, DataError
from megatron.hf.fine_tuning import FineTuner
from megatron.hf.fine_tuning_losses import loss_terms
from tests.distributed import run_distributed

SAMPLES, LENGTH, VOCABULARY, LABELS, CHOICES = 8, 10, 37, 3, 2
STEPS = 3
SEED = 1
NOT_COUNTED = -100

Batch = dict[str, Tensor]


def small_config(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": LENGTH,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.1,
        "num_labels": LABELS,
    }
    return hf.MegatronBertConfig(**{**fields, **changes})


# --- the heads, and labels for them ------------------------------------------------------------


def token_labels(ids: Tensor, generator: torch.Generator) -> Tensor:
    """A third of the tokens counts, and none of the first two samples'."""
    kept = torch.rand(ids.shape, generator=generator) < 1 / 3
    kept[:2] = False
    return ids.where(kept, NOT_COUNTED)


def places(generator: torch.Generator) -> Tensor:
    """Of which some lie behind the sequence."""
    return torch.randint(0, LENGTH + 3, (SAMPLES,), generator=generator)


def numbers(below: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, below, (SAMPLES,), generator=generator)


@dataclass(frozen=True)
class Head:
    """What to make a model with a head, and labels for it, of."""

    kind: str
    labels: Callable[[Tensor, torch.Generator], Batch]
    config: dict[str, Any] = field(default_factory=dict)


HEADS = {
    "masked": Head("ForMaskedLM", lambda ids, g: {"labels": token_labels(ids, g)}),
    "causal": Head(
        "ForCausalLM", lambda ids, g: {"labels": token_labels(ids, g)}, {"is_decoder": True}
    ),
    "next": Head("ForNextSentencePrediction", lambda ids, g: {"labels": numbers(2, g)}),
    "pretraining": Head(
        "ForPreTraining",
        lambda ids, g: {"labels": token_labels(ids, g), "next_sentence_label": numbers(2, g)},
    ),
    "classes": Head("ForSequenceClassification", lambda ids, g: {"labels": numbers(LABELS, g)}),
    "several": Head(
        "ForSequenceClassification",
        lambda ids, g: {"labels": numbers(8, g)[:, None].bitwise_and(torch.tensor([1, 2, 4])) / 4},
    ),
    "regression": Head(
        "ForSequenceClassification",
        lambda ids, g: {"labels": torch.randn(SAMPLES, generator=g)},
        {"num_labels": 1},
    ),
    "choice": Head("ForMultipleChoice", lambda ids, g: {"labels": numbers(CHOICES, g)}),
    "tokens": Head(
        "ForTokenClassification",
        lambda ids, g: {"labels": (token_labels(ids, g) % LABELS).where(ids % 4 > 0, NOT_COUNTED)},
    ),
    "span": Head(
        "ForQuestionAnswering",
        lambda ids, g: {"start_positions": places(g), "end_positions": places(g)},
        {"num_labels": 2},
    ),
}
every_head = pytest.mark.parametrize("head", HEADS)


def build(head: str, state: Any = None, **changes: Any) -> Any:
    torch.manual_seed(SEED)
    config = small_config(**HEADS[head].config, **changes)
    model = getattr(hf, f"MegatronBert{HEADS[head].kind}")(config, parallel_state=state)
    return model.double()


def batches_of(head: str) -> list[Batch]:
    """The samples of each step, float64 where they are not whole numbers."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (SAMPLES, CHOICES, LENGTH) if head == "choice" else (SAMPLES, LENGTH)
    found = []
    for _ in range(STEPS):
        ids = torch.randint(0, VOCABULARY, shape, generator=generator)
        mask = (torch.arange(LENGTH) < LENGTH - 2).long().expand(shape)
        labels = HEADS[head].labels(ids, generator)
        labels = {n: t.double() if t.is_floating_point() else t for n, t in labels.items()}
        found.append({"input_ids": ids, "attention_mask": mask, **labels})
    return found


class Trained(NamedTuple):
    """What a run has come to."""

    losses: list[float]
    norms: list[float]
    outputs: Tensor
    weights: dict[str, Tensor]


def tuner_of(model: Any, **options: Any) -> FineTuner:
    return FineTuner(model, **{"lr": 1e-2, "total_steps": 10, "warmup_steps": 1, **options})


def train(head: str, state: Any = None, **options: Any) -> Trained:
    """Some steps of which each data-parallel rank takes its share."""
    model = build(head, state)
    tuner = tuner_of(model, **options)
    axis = model.state.data
    batches = batches_of(head)
    done = [
        tuner.step([{name: part.chunk(axis.size)[axis.rank] for name, part in batch.items()}])
        for batch in batches
    ]
    (output,) = tuner.evaluate(batches[:1])
    return Trained(
        [step.loss.item() for step in done],
        [step.grad_norm.item() for step in done],
        output[1],
        model.full_state_dict(),
    )


def assert_same(found: Trained, expected: Trained) -> None:
    close: Any = pytest.approx
    assert found.losses == close(expected.losses, rel=1e-10)
    assert found.norms == close(expected.norms, rel=1e-10)
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-9, atol=1e-10)


# --- the same training -------------------------------------------------------------------------

LAYOUTS = {
    "tensor 2": (2, 2, 1, {"micro_batch_size": 4}),
    "pipeline 2": (2, 1, 2, {"micro_batch_size": 2}),
    "pipeline 2, zero bubble": (2, 1, 2, {"micro_batch_size": 2, "pipeline_schedule": "zb-h1"}),
    "data 2": (2, 1, 1, {"use_distributed_optimizer": True, "micro_batch_size": 2}),
    "tensor 2, pipeline 2": (4, 2, 2, {"micro_batch_size": 4, "pipeline_schedule": "gpipe"}),
    "tensor 2, data 2": (4, 2, 1, {"use_distributed_optimizer": True}),
}
ON_LAYOUTS = ("pretraining", "causal", "choice", "span")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_the_model_of_one_process(layout: str) -> None:
    ranks, tensor, pipeline, options = LAYOUTS[layout]
    expected = {head: train(head) for head in ON_LAYOUTS}
    for trained in run_distributed(ranks, _train_all, tensor, pipeline, options):
        for head in ON_LAYOUTS:
            assert_same(trained[head], expected[head])


def _train_all(tensor: int, pipeline: int, options: dict[str, Any]) -> dict[str, Trained]:
    state = hf.parallel_state(tensor, pipeline)
    return {head: train(head, state, **options) for head in ON_LAYOUTS}


@every_head
def test_micro_batches_change_nothing(head: str) -> None:
    whole = train(head)
    for size in 1, 4:
        assert_same(train(head, micro_batch_size=size), whole)


@every_head
def test_the_loss_is_the_one_that_the_model_documents(head: str) -> None:
    model = build(head)
    batch = batches_of(head)[0]
    documented = model(**batch).loss.item()
    assert tuner_of(model).step([batch]).loss.item() == pytest.approx(documented, rel=1e-12)


def test_it_follows_plain_adamw_over_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    head = "tokens"
    ours = build(head)
    ours.save_pretrained(tmp_path)
    theirs = transformers.MegatronBertForTokenClassification.from_pretrained(tmp_path)
    theirs.double().train()
    decayed = [p for p in theirs.parameters() if p.dim() > 1]
    others = [p for p in theirs.parameters() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-3
    )
    tuner = tuner_of(ours, lr=1e-3, lr_decay_style="constant", warmup_steps=0, weight_decay=0.1)
    for batch in batches_of(head):
        loss = theirs(**batch).loss
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adam.step()
        step = tuner.step([batch])
        assert step.loss.item() == pytest.approx(loss.item(), rel=1e-10)
        assert step.grad_norm.item() == pytest.approx(norm.item(), rel=1e-10)
    weights = theirs.state_dict()
    for name, weight in ours.full_state_dict().items():
        # A bias of the keys changes nothing, and its gradient is nothing but rounding.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(weight, weights[name], rtol=1e-8, atol=1e-10)


# --- what a user relies on ---------------------------------------------------------------------


def test_a_resumed_run_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    first, second, third = batches_of("pretraining")
    tuner = tuner_of(build("pretraining"))
    for batch in first, second:
        tuner.step([batch])
    tuner.save(tmp_path)
    expected = tuner.step([third])
    resumed = tuner_of(build("pretraining", initializer_range=0.2))
    resumed.resume(tmp_path)
    found = resumed.step([third])
    assert (found.number, found.learning_rate) == (3, expected.learning_rate)
    assert torch.equal(found.loss, expected.loss)
    weights = tuner.model.state_dict()
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (1, 1)])
def test_another_layout_goes_on_with_a_run(tensor: int, pipeline: int, tmp_path: Path) -> None:
    first, second, _ = batches_of("pretraining")
    tuner = tuner_of(build("pretraining"))
    tuner.step([first])
    tuner.save(tmp_path)
    expected = tuner.step([second]).loss.item(), tuner.model.full_state_dict()
    for loss, weights in run_distributed(2, _resumed, tensor, pipeline, tmp_path):
        assert loss == pytest.approx(expected[0], rel=1e-10)
        torch.testing.assert_close(weights, expected[1], rtol=1e-9, atol=1e-10)


def _resumed(tensor: int, pipeline: int, directory: Path) -> tuple[float, dict[str, Tensor]]:
    model = build("pretraining", hf.parallel_state(tensor, pipeline), initializer_range=0.2)
    tuner = tuner_of(model, use_distributed_optimizer=True)
    tuner.resume(directory)
    axis, batch = model.state.data, batches_of("pretraining")[1]
    own = {name: part.chunk(axis.size)[axis.rank] for name, part in batch.items()}
    return tuner.step([own]).loss.item(), model.full_state_dict()


def test_dropout_is_drawn_anew_each_step_and_alike_from_the_same_seed() -> None:
    batch = batches_of("tokens")[0]

    def losses(seed: int) -> list[float]:
        model = build("tokens", hidden_dropout_prob=0.5)
        tuner = tuner_of(model, lr=0.0, lr_decay_style="constant", seed=seed)
        return [tuner.step([batch]).loss.item() for _ in range(2)]

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = build("tokens", hidden_dropout_prob=0.5)
    torch.manual_seed(5)
    tuner_of(model).step([batch])
    assert torch.equal(torch.rand(3), expected), "the user's generator was used"
    assert losses(1) == losses(1)
    assert len({*losses(1), *losses(2)}) == 4


def test_frozen_parameters_stay() -> None:
    model = build("classes")
    for parameter in model.bert.parameters():
        parameter.requires_grad = False
    before = model.full_state_dict()
    tuner = tuner_of(model, warmup_steps=0)
    tuner.step(batches_of("classes")[:1])
    for name, weight in model.full_state_dict().items():
        assert torch.equal(weight, before[name]) is name.startswith("bert."), name


def test_half_precision_has_float32_masters() -> None:
    model = build("classes").bfloat16()
    tuner = tuner_of(model, lr=1e-5, warmup_steps=0, total_steps=100)
    kinds = {key.split(".")[1]: part.dtype for key, part, *_ in tuner.optimizer.state_tensors()}
    assert kinds == dict.fromkeys(["exp_avg", "exp_avg_sq", "master"], torch.float32)
    batch = batches_of("classes")[0]
    losses = [tuner.step([batch]).loss.item() for _ in range(30)]
    assert losses[-1] < losses[0], "steps smaller than the weights' rounding were lost"


def test_labels_of_a_micro_batch_are_counted_before_anything_is_computed() -> None:
    model = build("pretraining")
    batch = batches_of("pretraining")[0]
    tokens, pairs = loss_terms(model, batch)
    assert int(tokens.count) == int((batch["labels"] != NOT_COUNTED).sum())
    assert int(pairs.count) == SAMPLES


# --- what is refused ---------------------------------------------------------------------------


def test_micro_batches_of_different_shapes_are_refused() -> None:
    whole = batches_of("tokens")[0]
    shorter = {name: tensor[:, :-1] for name, tensor in whole.items()}
    with pytest.raises(
        DataError, match="micro-batch 1 of a step has 8 x 9 tokens and .* 0 has 8 x"
    ):
        tuner_of(build("tokens")).step([whole, shorter])


def test_batches_that_cannot_be_trained_on_are_refused() -> None:
    batch = batches_of("tokens")[0]
    tuner = tuner_of(build("tokens"), micro_batch_size=3)
    with pytest.raises(DataError, match="8 samples, no multiple of micro_batch_size 3"):
        tuner.step([batch])
    with pytest.raises(DataError, match="no batch"):
        tuner.step([])
    del batch["labels"]
    with pytest.raises(DataError, match="no labels, found input_ids, attention_mask"):
        tuner_of(build("tokens")).step([batch])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr -1.0 is outside \[0, inf\)"),
        ({"adam_beta1": 1.0}, r"adam_beta1 1.0 is outside"),
        ({"total_steps": None}, "linear needs total_steps"),
        ({"warmup_steps": 11}, "warmup_steps 11 is more than total_steps 10"),
        ({"lr_decay_style": "square"}, "lr_decay_style square is none of"),
        ({"micro_batch_size": 0}, "micro_batch_size 0 is outside"),
        ({"pipeline_schedule": "interleaved"}, "one stage"),
        ({"pipeline_schedule": "1f2b"}, "pipeline_schedule 1f2b is none of"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tuner_of(build("tokens"), **options)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="MegatronBertModel has no head"):
        tuner_of(hf.MegatronBertModel(small_config()))
