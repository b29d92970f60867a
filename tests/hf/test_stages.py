"""What one stage of a pipeline alone knows of, and the others would wait for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron import hf
from tests.distributed import run_distributed
from tests.hf.tiny import class_of, config_of

IDS = torch.arange(12).view(2, 6)


def trained_with_frozen_embeddings(fine_tuner: bool) -> tuple[bool, bool]:
    """Whether the embeddings, and whether anything else, were changed by a step."""
    torch.manual_seed(0)
    model = class_of("bert", "ForMaskedLM")(
        config_of("bert"), parallel_state=hf.parallel_state(1, 2)
    )
    table = model.get_input_embeddings()
    if table is not None:
        table.requires_grad_(False)
    before = model.full_state_dict()
    batch = {"input_ids": IDS, "labels": IDS}
    if fine_tuner:
        tuner = hf.FineTuner(model, lr=0.1, lr_decay_style="constant")  # type: ignore[arg-type]
        tuner.step([batch])
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(2):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    after = model.full_state_dict()
    copies = {
        parameter.shard_spec.key: parameter.detach()  # type: ignore[attr-defined]
        for parameter in model.parameters()
    }
    key, name = "language_model.embedding.word_embeddings.weight", "embeddings.word_embeddings"
    moved = {each for each, weight in after.items() if not torch.equal(weight, before[each])}
    return (
        any(name in each for each in moved)
        or not torch.equal(copies[key], before[f"bert.{name}.weight"]),
        bool(moved),
    )


@pytest.mark.parametrize("fine_tuner", [False, True])
def test_embeddings_that_the_first_stage_freezes_are_frozen_on_the_last(fine_tuner: bool) -> None:
    for embeddings, anything in run_distributed(2, trained_with_frozen_embeddings, fine_tuner):
        assert anything and not embeddings


MISTAKES: list[dict[str, torch.Tensor]] = [
    {"attention_mask": torch.ones(2, 5)},
    {"token_type_ids": torch.full((2, 6), 9)},
    {"input_ids": IDS + 1000},
    {"position_ids": torch.arange(6)[None] + 90},
    {"labels": torch.tensor([0, 7])},
    {"labels": torch.tensor([0])},
]


def what_is_said() -> list[str]:
    """A line for each mistake; then that the model is as good as ever."""
    torch.manual_seed(0)
    model = class_of("bert", "ForSequenceClassification")(
        config_of("bert"), parallel_state=hf.parallel_state(1, 2)
    )
    right = {"input_ids": IDS, "labels": torch.tensor([0, 1])}
    lines = []
    calls: list[Callable[[], object]] = [
        lambda wrong=wrong: model(**{**right, **wrong}) for wrong in MISTAKES
    ]
    for call in calls:
        try:
            call()
        except Exception as error:
            lines.append(f"{type(error).__name__}: {error}")
        else:
            lines.append("nothing")
    model(**right).loss.backward()
    return lines


def test_a_mistake_that_one_stage_finds_ends_all() -> None:
    first, last = run_distributed(2, what_is_said)
    for one, other in zip(first, last, strict=True):
        assert "nothing" not in (one, other)
        assert one.split(": ", 1)[1] in other or other in one.split(" failed: ")[-1], (one, other)


def said_of_an_unknown_token() -> str:
    model = class_of("bert", "Model")(config_of("bert"), parallel_state=hf.parallel_state(2, 1))
    with pytest.raises(ValueError, match="input_ids hold") as raised:
        model(IDS + 45)
    return str(raised.value)


def test_tensor_ranks_do_not_pass_over_unknown_tokens() -> None:
    assert {*run_distributed(2, said_of_an_unknown_token)} == {
        "input_ids hold 56, expected 0 to 50"
    }


def test_a_mask_that_hides_nothing_has_to_fit_as_well() -> None:
    model = class_of("bert", "Model")(config_of("bert"))
    with pytest.raises(ValueError, match=r"attention_mask has the shape \(2, 5\), expected \(2, 6"):
        model(IDS, attention_mask=torch.ones(2, 5))
    model(IDS, attention_mask=torch.ones(1, 6, 6))


def loss_of_one_layer(stages: int) -> float:
    torch.manual_seed(0)
    config = config_of("bert", num_hidden_layers=1)
    model = class_of("bert", "ForMaskedLM")(
        config, parallel_state=hf.parallel_state(1, stages)
    ).eval()
    loss = model.double()(IDS, labels=IDS).loss
    loss.backward()
    assert model.dtype == torch.float64 and model.bert.dtype == torch.float64
    return loss.item()


def test_stages_without_layers_or_any_parameter() -> None:
    alone = loss_of_one_layer(1)
    assert run_distributed(3, loss_of_one_layer, 3) == pytest.approx([alone] * 3, rel=1e-12)
