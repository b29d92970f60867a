"""What all classes of the family stand on: the language model with the documented inputs.

A class gives its head, a function of the top hidden states, to `Backbone.answer`. That runs this
rank's stage, calls the head on the last stage, and makes the results whole on every rank.

Letters: s sequence, z sequence of the encoder or of all keys, b batch, h hidden, n heads, d head
size, t tensor size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch

from megatron.hf.inputs import Cache, Inputs, for_all_heads, masked
from megatron.hf.outputs import BaseModelOutputWithPoolingAndCrossAttentions, ModelOutput
from megatron.hf.pretrained import PreTrainedModel
from megatron.hf.relay import (
    SharedGradients,
    all_heads,
    own_heads,
    receive_stream,
    send_stream,
    shared_input,
    spread,
    told_by_stages,
)
from megatron.hf.results import Results, joined
from megatron.model.enums import LayerType
from megatron.model.language_model import TransformerLanguageModel
from megatron.model.probe import Extras, Record
from megatron.mpu.collectives import broadcast
from megatron.ops.attention import AttentionMask

Named = Mapping[str, torch.Tensor | None]


class Top(NamedTuple):
    """What the last stage hands to a head."""

    last_hidden_state: torch.Tensor  # [b, s, h]
    pooler_output: torch.Tensor | None  # [b, h]


Head = Callable[[Top], Named]


class Backbone(PreTrainedModel):
    """Embedding, layers and pooler; the base model of a family.

    Args:
        add_pooling_layer: whether the first token's hidden state is pooled.
    """

    # Whether cross attention, too, has vectors for distances; in this the families differ.
    cross_distances = False

    def __init__(self, config: Any, add_pooling_layer: bool = True, **options: Any) -> None:
        super().__init__(config, **options)
        if config.add_cross_attention and not config.is_decoder:
            raise ValueError("add_cross_attention=True needs is_decoder=True, found False")
        crosses = config.add_cross_attention
        self.language_model = TransformerLanguageModel(
            self.native_config,
            self.state,
            self.stage,
            num_tokentypes=self.native_config.model.num_tokentypes,
            add_pooler=add_pooling_layer,
            pre_process=self.stage.is_first,
            post_process=self.stage.is_last,
            layer_type=LayerType.decoder if crosses else LayerType.encoder,
            cross_distances=self.cross_distances and self.native_config.model.has_distances,
            padding_idx=config.pad_token_id,
        )
        self.add_pooling_layer = add_pooling_layer
        self._forwards = 0
        self._seed: int | None = None
        self._alone = False
        self._shared = SharedGradients(self, self.state)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[Any, ...]:
        """Hidden states behind the last layer and, with the pooling layer, the pooled first one."""
        inputs = Inputs(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        output_class = BaseModelOutputWithPoolingAndCrossAttentions
        return self.answer(inputs, lambda top: top._asdict(), output_class, return_dict)

    def answer(
        self,
        inputs: Inputs,
        head: Head,
        output_class: type[ModelOutput],
        return_dict: bool | None,
    ) -> Any:
        """Run the model under `head`.

        Args:
            head: called on the last stage; its results by the names of `output_class`, in order.

        Returns:
            the output, the same on every rank, or with `return_dict` False the tuple of its parts.
        """
        if return_dict is None:
            return_dict = self.config.use_return_dict
        inputs.check(self.config)
        record = self._record(inputs)
        if self._alone:
            top = self._run_stage(inputs, record)
            return output_class(**head(top)) if isinstance(top, Top) else top
        self.agree_on_frozen()
        inputs = self._shared_inputs(inputs)
        with self._own_randomness():
            if not self.stage.is_first:
                self._receive(inputs)
            own, stream, failure = self._results(inputs, record, head)
            sent = None if stream is None else self._send(stream, inputs)
        results = [own] if self.state.pipeline.size == 1 else self._spread(own, sent, failure)
        made = dict(results[-1].named)
        looked_into = {
            "past_key_values": joined(result.caches for result in results),
            "hidden_states": joined(result.hidden_states for result in results),
            "attentions": joined(result.attentions for result in results),
            "cross_attentions": joined(result.cross_attentions for result in results),
        }
        if not return_dict:
            base = output_class is BaseModelOutputWithPoolingAndCrossAttentions
            parts = (value for value in made.values() if base or value is not None)
            return (*parts, *(part for part in looked_into.values() if part is not None))
        known = {field.name for field in fields(output_class)}
        shown = {name: part for name, part in looked_into.items() if name in known}
        return output_class(**made, **shown)

    @contextmanager
    def stage_alone(self) -> Iterator[None]:
        """Have `forward` run this stage and nothing else, for a pipeline's runtime to drive.

        The stream comes from `language_model.set_input_tensor`. Before the last stage `forward`
        then returns the stream [s, b, h] to send, on the last one its output.
        """
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

    # --- what is asked for -----------------------------------------------------------------------

    def _record(self, inputs: Inputs) -> Record:
        """Empty lists for what is to be recorded."""
        config = self.config

        def asked(value: bool | None, default: bool) -> list[Any] | None:
            return [] if (default if value is None else value) else None

        attentions = asked(inputs.output_attentions, config.output_attentions)
        crosses = attentions is not None and config.add_cross_attention
        holds_less = self.gradient_checkpointing and self.training
        caches = config.is_decoder and not holds_less
        return Record(
            hidden_states=asked(inputs.output_hidden_states, config.output_hidden_states),
            attentions=attentions,
            cross_attentions=[] if crosses else None,
            caches=asked(inputs.use_cache, config.use_cache) if caches else None,
        )

    # --- one stage -------------------------------------------------------------------------------

    def _shared_inputs(self, inputs: Inputs) -> Inputs:
        return replace(
            inputs,
            inputs_embeds=shared_input(inputs.inputs_embeds, self.state),
            encoder_hidden_states=shared_input(inputs.encoder_hidden_states, self.state),
        )

    def _receive(self, inputs: Inputs) -> None:
        b, s = inputs.shape
        shape = (s, b, self.config.hidden_size)
        stream = receive_stream(self.state, shape, self.dtype, inputs.shared)
        self.language_model.set_input_tensor(stream)

    def _send(self, stream: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return send_stream(stream, self.state, inputs.shared if self.stage.is_first else ())

    def _run_stage(self, inputs: Inputs, record: Record) -> Top | torch.Tensor:
        """The last stage's top; of another stage the stream [s, b, h]."""
        b, s = inputs.shape
        extras = self._extras(inputs, record)
        mask = self._mask(inputs.seen(is_decoder=self.config.is_decoder))
        ids = inputs.input_ids
        if ids is None:
            ids = torch.zeros((b, s), dtype=torch.int64, device=inputs.device)
        self._set_recomputation()
        hidden = self.language_model(
            ids,
            inputs.positions,
            mask,
            tokentype_ids=inputs.token_type_ids,
            extras=extras,
        )
        if not self.stage.is_last:
            return hidden.stream
        if record.hidden_states is not None:
            record.hidden_states.append(hidden.stream)
        return Top(hidden.stream.transpose(0, 1), hidden.pooled)

    def _results(
        self, inputs: Inputs, record: Record, head: Head
    ) -> tuple[Results, torch.Tensor | None, Exception | None]:
        """What this stage has made, the stream [s, b, h] to send, and what went wrong.

        A stage of several that fails still sends, so that the others do not wait for it and hear
        of it with the results.
        """
        stream, named = None, {}
        try:
            top = self._run_stage(inputs, record)
            if isinstance(top, Top):
                named = dict(head(top))
            else:
                stream = top
            return Results(named, *self._shown(record)), stream, None
        except Exception as error:
            if self.state.pipeline.size == 1:
                raise
            if not self.stage.is_last:
                b, s = inputs.shape
                shape = (s, b, self.config.hidden_size)
                stream = torch.zeros(shape, dtype=self.dtype, device=self.state.device)
            return Results({}, None, None, None, None), stream, error

    def _extras(self, inputs: Inputs, record: Record) -> Extras:
        extras: dict[str, Any] = {}
        output = inputs.encoder_hidden_states
        if self.config.add_cross_attention and output is not None:
            extras["encoder_output"] = output.transpose(0, 1).to(self.dtype)
            mask = inputs.encoder_attention_mask
            extras["encoder_mask"] = self._mask(None if mask is None else for_all_heads(mask))
        return Extras(
            inputs_embeds=inputs.inputs_embeds,
            head_masks=self._head_masks(inputs.head_mask),
            past=self._own_past(inputs.past_key_values),
            record=record,
            **extras,
        )

    def _mask(self, seen: torch.Tensor | None) -> AttentionMask:
        """What is not seen gets the least number of the format added to its score.

        That number, and not minus infinity, so that a row of which nothing is seen is defined.
        """
        if seen is None:
            return AttentionMask()
        return masked(seen.to(self.dtype), can_look=seen.device.type == "cpu")

    def _head_masks(self, given: torch.Tensor | None) -> torch.Tensor | None:
        """[n] or [layers, n] -> [layers, 1, n / t, 1, 1]"""
        if given is None:
            return None
        layers, heads = self.config.num_hidden_layers, self.config.num_attention_heads
        if tuple(given.shape) not in ((heads,), (layers, heads)):
            raise ValueError(
                f"head_mask has the shape {tuple(given.shape)}, "
                f"expected ({heads},) or ({layers}, {heads})"
            )
        axis = self.state.tensor
        masks = given.to(self.dtype).expand(layers, heads).chunk(axis.size, dim=1)[axis.rank]
        return masks[:, None, :, None, None]

    def _own_past(self, past: Cache | None) -> Cache | None:
        """The cache of this stage's layers, of this rank's heads; the others' are left as given."""
        if not past:
            return None
        own = list(past)
        for number in self.stage.layers:
            own[number] = tuple(own_heads(part, self.state) for part in past[number])
        return own

    def _set_recomputation(self) -> None:
        encoder = self.language_model.encoder
        assert encoder is not None
        layers = range(len(encoder.layers)) if self.gradient_checkpointing else ()
        encoder.recomputed = [range(number, number + 1) for number in layers]

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Where ranks share the model, dropout draws what they agree on.

        One process draws from PyTorch's generator, as its user is used to.
        """
        axis = self.state.model
        if axis.size == 1 or not self.training:
            yield
            return
        if self._seed is None:
            seed = torch.tensor(torch.initial_seed() & (2**63 - 1), device=self.state.device)
            self._seed = int(broadcast(seed, axis))
        on_device = [] if self.state.device.type == "cpu" else [self.state.device]
        with torch.random.fork_rng(on_device, device_type=self.state.device.type):
            self.state.streams.start(self._seed, self._forwards, 0)
            self._forwards += 1
            yield

    # --- all ranks -------------------------------------------------------------------------------

    def _shown(self, record: Record) -> tuple[Any, Any, Any, Any]:
        """What was recorded, batch first and with all heads."""
        state = self.state

        def weights(recorded: list[torch.Tensor] | None) -> list[torch.Tensor] | None:
            return None if recorded is None else [all_heads(each, state) for each in recorded]

        hidden, caches = record.hidden_states, record.caches
        return (
            None
            if caches is None
            else [tuple(all_heads(part, state) for part in cache) for cache in caches],
            None if hidden is None else [each.transpose(0, 1) for each in hidden],
            weights(record.attentions),
            weights(record.cross_attentions),
        )

    def _spread(
        self, own: Results, sent: torch.Tensor | None, failure: Exception | None
    ) -> list[Results]:
        """The results of all stages.

        Raises:
            RuntimeError: another stage has failed; this one's failure is raised as it is.
        """
        tensors, form = own.flattened()
        mine = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        trouble = None if failure is None else f"{type(failure).__name__}: {failure}"
        told = told_by_stages((mine, form, trouble), self.state)
        kinds, forms, failures = zip(*told, strict=True)
        if failure is not None:
            raise failure
        for stage, said in enumerate(failures):
            if said is not None:
                raise RuntimeError(f"stage {stage} of the pipeline failed: {said}")
        stages = spread(tensors, kinds, sent, self.state, self._shared.finish)
        return [Results.of(*each) for each in zip(stages, forms, strict=True)]

    def agree_on_frozen(self) -> None:
        """Have the last stage's copy of the word embeddings be trained or frozen as they are."""
        self._shared.agree()

    def tie_output(self, copy: torch.nn.Parameter | None) -> None:
        """Have tokens scored by the word embeddings: the gradients of both ends add up.

        copy: the last stage's copy of them, where it is not the first.
        """
        embedding = self.language_model.embedding
        own = None if embedding is None else embedding.word_embeddings.weight
        self._shared.tie(own if copy is None else copy)
