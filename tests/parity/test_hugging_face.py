"""Rungs 3 and 5 of the parity ladder: the model and its training equal Hugging Face's.

With the same weights, logits and gradients agree; and a training with our optimizer follows the
loss curve of a plain PyTorch loop over their model.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.checkpoint.hugging_face.models import entries, hugging_face_config
from megatron.checkpoint.name_map import to_theirs
from megatron.config import Config
from megatron.model import BertModel
from megatron.mpu import ParallelState
from megatron.mpu.stage import stages
from megatron.training.bert import BertPretraining
from megatron.training.task import Batch
from megatron.training.trainer import Trainer
from tests.distributed import run_distributed
from tests.parity.runs import STEPS, Case, new_trainer, own_batches

transformers = pytest.importorskip("transformers")

GLOBAL_BATCH = 8


def _their_model(config: Config, ours: BertModel) -> Any:
    options = hugging_face_config(config.model, dtype=torch.float64)
    model = transformers.MegatronBertForPreTraining(transformers.MegatronBertConfig(**options))
    model.double()  # before the weights are loaded: they would be rounded
    tensors = ours.state_dict_for_save_checkpoint()
    state = dict(to_theirs(entries(config.model), lambda name: tensors[name]))
    vocabulary = config.model.vocab_size
    state = {
        # Our padding of the vocabulary is not theirs.
        name: tensor[:vocabulary]
        if "word_embeddings" in name or name.endswith("predictions.bias")
        else tensor
        for name, tensor in state.items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("decoder" in name for name in missing), (missing, unexpected)
    return model


def _their_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"].long(),
        "token_type_ids": batch["tokentype_ids"],
    }


def _their_loss(model: Any, batches: list[Batch]) -> torch.Tensor:
    """The mean over the masked tokens and over the pairs of all micro-batches."""
    masked = sum(batch["masked_weights"].sum() for batch in batches)
    pairs = sum(len(batch["is_random"]) for batch in batches)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        output = model(**_their_inputs(batch))
        scores = output.prediction_logits.log_softmax(-1)
        at_masked = scores.gather(
            1, batch["masked_positions"][..., None].expand(-1, -1, scores.size(-1))
        )
        nll = -at_masked.gather(2, batch["masked_labels"][..., None]).squeeze(2)
        total = total + (nll * batch["masked_weights"]).sum() / masked
        binary = output.seq_relationship_logits.log_softmax(-1)
        total = total - binary.gather(1, batch["is_random"][:, None]).sum() / pairs
    return total


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("epsilon", [1e-5, 1e-12])
def test_logits_and_gradients_equal_transformers(activation: str, epsilon: float) -> None:
    config = Case.of().config()
    config = replace(
        config, model=replace(config.model, activation=activation, layernorm_epsilon=epsilon)
    )
    state = ParallelState.single()
    ours = BertModel(config, state, stages([5])[0], parallel_output=False)
    with torch.no_grad():  # biases and norms away from their initial zeros and ones
        for number, parameter in enumerate(ours.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter += 0.1 * noise
    theirs = _their_model(config, ours)
    (batch,) = own_batches(Case.of(micro_batch_size=8), step=0, size=8, data_rank=0)

    logits, binary = ours(batch["input_ids"], batch["attention_mask"], batch["tokentype_ids"])
    output = theirs(**_their_inputs(batch))
    torch.testing.assert_close(logits, output.prediction_logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(binary, output.seq_relationship_logits, rtol=1e-9, atol=1e-9)

    task = BertPretraining(config)
    totals = task.denominators(batch)
    loss, _ = task.forward_step(ours, batch, totals)
    loss.backward()
    their_loss = _their_loss(theirs, [batch])
    their_loss.backward()
    torch.testing.assert_close(loss, their_loss, rtol=1e-9, atol=0)
    gradients = {p.shard_spec.name: p.grad for p in ours.parameters()}
    mapped = dict(to_theirs(entries(config.model), lambda name: gradients[name]))
    for name, parameter in theirs.named_parameters():
        gradient = mapped[name][: parameter.size(0)]
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-8, atol=1e-10, msg=name)


def _our_losses(case: Case) -> list[float]:
    trainer = new_trainer(case)
    losses = []
    for number in range(STEPS):
        step = trainer.step(own_batches(case, number, GLOBAL_BATCH, trainer.state.data.rank))
        losses.append(trainer.over_ranks(step.parts).sum().item())
    trainer.finish()
    return losses


def test_training_follows_a_plain_loop_over_transformers() -> None:
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    case = Case.of(ranks=4, **layout, pipeline_layers=(3, 2), micro_batch_size=1)
    one_batch = case.on_one_process()
    config = one_batch.config()
    ours = BertModel(config, ParallelState.single(), stages([5])[0])
    theirs = _their_model(config, ours).train()
    untrained = copy.deepcopy(theirs)
    options = config.optimizer
    decayed = [p for p in theirs.parameters() if p.dim() > 1]
    others = [p for p in theirs.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_eps,
    )
    rates = Trainer(config, BertPretraining(config), ParallelState.single()).learning_rates
    expected = []
    for number in range(STEPS):
        batches = own_batches(one_batch, number, GLOBAL_BATCH, data_rank=0)
        for group in optimizer.param_groups:
            group["lr"] = rates.rate(number * GLOBAL_BATCH)
        optimizer.zero_grad()
        loss = _their_loss(theirs, batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), options.clip_grad)
        optimizer.step()
        expected.append(loss.item())
    found = run_distributed(case.ranks, _our_losses, case)[0]
    assert abs(_their_loss(untrained, batches).item() - expected[-1]) > 1e-3
    assert found == pytest.approx(expected, rel=1e-9)
