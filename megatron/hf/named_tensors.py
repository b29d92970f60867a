"""A model as its user sees it: tensors by Hugging Face's names.

`entries` maps those names to the parameters, which know by their `shard_spec` what they are and how
they are split; reading, writing and gathering go through these two. A rank that holds a part of a
tensor shows that part.

Letters: v vocabulary, h hidden, t tensor size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron.checkpoint.hugging_face.bert import bert_entries
from megatron.checkpoint.name_map import Entry
from megatron.hf.gathering import Part, held_by_stages, true_part, whole_tensors
from megatron.hf.initial_values import InitialisedModule
from megatron.hf.loading import BUFFERS, Naming, without


class NamedTensors(InitialisedModule):
    """A network whose tensors go by Hugging Face's names.

    Attributes:
        heads: those of the class, as `bert_entries` calls them.
    """

    base_model_prefix: ClassVar[str] = "bert"
    heads: ClassVar[tuple[str, ...]] = ()

    @property
    def base_model(self) -> nn.Module:
        """The network without a head."""
        return getattr(self, self.base_model_prefix, self)

    def entries(self) -> list[Entry]:
        """An entry for every tensor of the whole model, from Hugging Face's names to ours."""
        config, is_base = self.config, self.base_model is self
        mapped = bert_entries(
            self.native_config.model,
            heads=self.heads,
            decoder=config.is_decoder and config.add_cross_attention,
            cross_distances=True,
            prefix="" if is_base else f"{self.base_model_prefix}.",
        )
        # Whether there is a pooler, or a distance across, is seen from the parameters.
        entries = [entry for entry in mapped if entry.ours in self._held]
        known = {entry.ours for entry in entries}
        return entries + [Entry(name, (name,)) for name in self._held if name not in known]

    def aliases(self) -> dict[str, str]:
        """Second names of tensors, as `transformers` has them in a model's `state_dict`."""
        if "lm" not in self.heads:
            return {}
        table = f"{self.base_model_prefix}.embeddings.word_embeddings.weight"
        tied = {"cls.predictions.decoder.weight": table}
        return {
            **(tied if self.config.tie_word_embeddings else {}),
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }

    def unused_table(self) -> dict[str, tuple[int, int]]:
        """The table of absolute positions that `transformers` has beside relative ones, too."""
        if not self.native_config.model.has_distances:
            return {}
        prefix = "" if self.base_model is self else f"{self.base_model_prefix}."
        shape = (self.config.max_position_embeddings, self.config.hidden_size)
        return {f"{prefix}embeddings.position_embeddings.weight": shape}

    def meaningful(self, names: Iterable[str]) -> list[str]:
        """The names but for those that may be there and mean nothing."""
        return [name for name in without(names, BUFFERS) if name not in self.unused_table()]

    def naming(self) -> Naming:
        """What is needed to find the model's tensors in files."""
        return Naming(
            self.entries(),
            {name: held.shape for name, held in self._held.items()},
            self.aliases(),
            # Where releases of today tie nothing, it is the one that is computed with.
            {"cls.predictions.decoder.bias"},
            f"{self.base_model_prefix}.",
            self.base_model is not self,
        )

    def _own_tensors(self, parts: Mapping[str, Part]) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face's names and tensors of parts of ours; a copy goes by its second name."""
        aliases = {name: alias for alias, name in self.aliases().items()}
        for entry in self.entries():
            if entry.ours in parts:
                part = parts[entry.ours]
                names: Sequence[str] = entry.theirs
                if part.spec.tied_to is not None:
                    names = [aliases[name] for name in names]
                yield from zip(names, entry.split(true_part(part, self.state)), strict=True)

    def state_dict(  # type: ignore[override]
        self,
        *,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
    ) -> dict[str, Any]:
        """This rank's parts by Hugging Face's names, without vocabulary padding.

        What is renamed and no more is a view of the parameter; query, key and value are cut out of
        a fused matrix. Tied tensors are there under both names where this rank has both.
        """
        parts = self.parts()
        if not keep_vars:
            parts = {key: replace(part, tensor=part.tensor.detach()) for key, part in parts.items()}
        found = dict(self._own_tensors(parts))
        for alias, name in self.aliases().items():
            if name in found and self.stage.is_last:
                found.setdefault(alias, found[name])
        destination = OrderedDict() if destination is None else destination
        destination.update({prefix + name: tensor for name, tensor in found.items()})
        return destination

    @torch.no_grad()
    def load_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Tensor], strict: bool = True
    ) -> Any:
        """Copy into the parameters what `state_dict` would return.

        A tied tensor is enough under one of its names.

        Returns:
            the missing and the unexpected names.

        Raises:
            RuntimeError: a tensor has another shape, or with `strict` names are missing or unknown.
        """
        aliases = self.aliases()
        expected = self.state_dict()
        given = dict(state_dict)
        for pair in (*aliases.items(), *((name, alias) for alias, name in aliases.items())):
            if pair[0] in given:
                given.setdefault(pair[1], given[pair[0]])
        missing = [name for name in expected if name not in given]
        known = {*expected, *aliases}
        unexpected = self.meaningful(name for name in state_dict if name not in known)
        problems = [
            f"size mismatch for {name}: copying a param with shape {tuple(given[name].shape)} from "
            f"checkpoint, the shape in current model is {tuple(tensor.shape)}."
            for name, tensor in expected.items()
            if name in given and given[name].shape != tensor.shape
        ]
        if strict:
            problems = [*_named("Unexpected", unexpected), *_named("Missing", missing), *problems]
        if problems:
            lines = "\n\t".join(problems)
            raise RuntimeError(
                f"Error(s) in loading state_dict for {type(self).__name__}:\n\t{lines}"
            )
        self._copy_parts(given)
        return nn.modules.module._IncompatibleKeys(missing, unexpected)

    def _copy_parts(self, given: Mapping[str, Tensor]) -> None:
        """Fill the parameters from this rank's parts under Hugging Face's names."""
        parts = self.parts()
        for entry in self.entries():
            if entry.ours in parts:
                own = true_part(parts[entry.ours], self.state)
                # Of several that make one, those that are not given stay as they are.
                theirs = [
                    given.get(name, old).to(own.device, own.dtype)
                    for name, old in zip(entry.theirs, entry.split(own.detach()), strict=True)
                ]
                own.copy_(entry.join(theirs))

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of this rank's parts by Hugging Face's names; of those that have one."""
        return dict(self._own_tensors(self._gradient_parts()))

    def _gradient_parts(self) -> dict[str, Part]:
        parts = {}
        for key, part in self.parts().items():
            gradient = getattr(part.tensor, "main_grad", part.tensor.grad)
            if gradient is not None:
                parts[key] = Part(part.spec, gradient)
        return parts

    def full_state_dict(self, *, gradients: bool = False) -> dict[str, Tensor]:
        """The whole tensors, or their gradients, of all stages, on every rank; all must call it.

        For models that fit into one process' memory.
        """
        parts = self._gradient_parts() if gradients else self.parts()
        found = {
            name: tensor.detach().clone() for name, tensor in self.gathered(parts, everywhere=True)
        }
        if not gradients:
            for alias, name in self.aliases().items():
                found[alias] = found[name]
        return found

    def gathered(
        self, parts: Mapping[str, Part], *, everywhere: bool
    ) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face's names and whole tensors, in the order of `entries`."""
        parts = {key: replace(part, tensor=part.tensor.detach()) for key, part in parts.items()}
        held = held_by_stages(parts.values(), self.state)
        entries = {entry.ours: entry for entry in self.entries() if entry.ours in held}
        for name, whole in whole_tensors(entries, parts, held, self.state, everywhere=everywhere):
            if whole.shape == held[name].shape:
                entry = entries[name]
                yield from zip(entry.theirs, entry.split(whole), strict=True)


def _named(what: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        listed = ", ".join(f'"{name}"' for name in names)
        yield f"{what} key(s) in state_dict: {listed}. "
