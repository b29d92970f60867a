"""What stock `transformers` computes from a directory of Hugging Face's format, in float32.

The weights stay in memory as they are stored. A half-precision model is computed in float32 all the
same: around the forward pass of each layer the layer's weights are widened, and forgotten behind
it. What is a layer here is a member of a list of modules, or a module with parameters of its own
outside of one: a whole layer at a time, because some look at the format of their weights to decide
in which to compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch import nn

from megatron.checkpoint.hugging_face.models import is_ignorable
from megatron.conversion.network import (
    HIDDEN,
    MASKED_LM,
    NEXT_SENTENCE,
    NEXT_TOKEN,
    POOLED,
    Inputs,
    Outputs,
)
from megatron.conversion.stored_model import StoredModel
from megatron.errors import CheckpointError

# What their fields are, and what the field `logits` of a class with such an end of its name is.
_FIELDS = {
    "prediction_logits": MASKED_LM,
    "seq_relationship_logits": NEXT_SENTENCE,
    "start_logits": "start",
    "end_logits": "end",
    "last_hidden_state": HIDDEN,
    "pooler_output": POOLED,
}
_LOGITS = {
    "ForMaskedLM": MASKED_LM,
    "BertLMHeadModel": MASKED_LM,
    "BertForCausalLM": MASKED_LM,
    "ForNextSentencePrediction": NEXT_SENTENCE,
    "LMHeadModel": NEXT_TOKEN,
    "ForCausalLM": NEXT_TOKEN,
    "ForConditionalGeneration": NEXT_TOKEN,
}
_NAMED_AT_MOST = 3
# The bias of a masked-LM head with an output layer of its own: version 4 stores it once and uses it
# for both names, version 5 has two.
_SECOND_BIAS = "cls.predictions.decoder.bias"


@torch.no_grad()
def run_stock(stored: StoredModel, inputs: Inputs) -> Outputs:
    """The outputs of a model of Hugging Face's format, as `run_network` gives them.

    Raises:
        CheckpointError: `transformers` cannot load or compute it, or finds tensors missing or
            unknown.
    """
    import transformers

    directory, name = stored.path, str(stored.facts["architecture"])
    files = stored.source
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not hasattr(transformers, name):
        raise CheckpointError(f"transformers {transformers.__version__} has no class {name}")
    options: dict[str, Any] = {
        "ignore_mismatched_sizes": True,  # reported below
        "torch_dtype": reduce(torch.promote_types, files.dtypes.values()),
    }
    pools = any(".pooler." in key for key in files.shapes)
    if name.endswith("BertModel") and not pools:
        options["add_pooling_layer"] = False
    try:
        model, report = getattr(transformers, name).from_pretrained(
            directory, output_loading_info=True, **options
        )
    except Exception as error:  # a file that it does not like can fail in any way
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot load {directory}: {reason}"
        ) from error
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    found = {kind: sorted(map(str, report[kind])) for kind in kinds}
    # Whatever is left out here may lie in the files.
    found["unexpected_keys"] = [
        key
        for key in found["unexpected_keys"]
        if not is_ignorable(key, stored.model) and (pools or ".pooler." not in key)
    ]
    if found["missing_keys"] == [_SECOND_BIAS]:
        head = model.cls.predictions
        head.decoder.bias = head.bias
        found["missing_keys"] = []
    if any(found.values()):
        unknown = {kind: keys[:_NAMED_AT_MOST] for kind, keys in found.items() if keys}
        raise CheckpointError(
            f"{name} of transformers {transformers.__version__} finds in {directory} {unknown}"
        )
    try:
        return _run(model.eval(), inputs)
    except Exception as error:  # labels that are too many, for instance
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{name} of transformers {transformers.__version__} cannot compute {directory}: "
            f"{reason}"
        ) from error


def _run(model: Any, inputs: Inputs) -> Outputs:
    for part in _layers(model):
        _Widened(part)
    hidden: list[Any] = []
    # The hidden states that scores are made from, whatever head is on them.
    base = model.decoder if model.config.is_encoder_decoder else model.base_model
    base.register_forward_hook(lambda *call: hidden.append(call[2].last_hidden_state))
    if type(model).__name__.endswith("ForMultipleChoice"):  # one choice for each sample
        inputs = {name: ids.unsqueeze(1) for name, ids in inputs.items()}
    outputs = model(**inputs)
    named = {ours: outputs[theirs] for theirs, ours in _FIELDS.items() if theirs in outputs}
    if "logits" in outputs:
        kinds = (kind for end, kind in _LOGITS.items() if type(model).__name__.endswith(end))
        named[next(kinds, "classes")] = outputs.logits
    return {HIDDEN: hidden[0], **named}


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts that are computed one after the other."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) or any(True for _ in child.parameters(recurse=False)):
            yield child
        else:
            yield from _layers(child)


class _Widened:
    """Hooks that hold a layer's parameters in float32 while it computes."""

    def __init__(self, layer: nn.Module) -> None:
        self._stored: list[tuple[nn.Parameter, torch.Tensor]] = []
        layer.register_forward_pre_hook(self._widen)
        layer.register_forward_hook(self._restore)

    def _widen(self, layer: nn.Module, _: Any) -> None:
        for parameter in layer.parameters():
            self._stored.append((parameter, parameter.data))
            parameter.data = parameter.data.float()

    def _restore(self, *_: Any) -> None:
        for parameter, stored in self._stored:
            parameter.data = stored
        self._stored.clear()
