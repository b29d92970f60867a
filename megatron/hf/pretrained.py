"""What all models of the family can do beside computing: be loaded, saved, looked at and resized.

    model = MegatronBertForMaskedLM.from_pretrained(directory, tensor_model_parallel_size=2)
    model.save_pretrained(elsewhere)

`initial_values` is how a model comes to be, `named_tensors` how its tensors are called. Here they
are read from files and written into them, each rank reading what it holds and the first writing
what all hold, one tensor at a time.

Letters: v vocabulary, h hidden, t tensor size.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron.checkpoint.hugging_face.files import HuggingFaceFiles
from megatron.checkpoint.safetensors_writer import TensorPlan
from megatron.checkpoint.tensor_source import TensorSource
from megatron.config import Config
from megatron.errors import ConfigError
from megatron.hf.backends import requires_backends
from megatron.hf.configuration import BertFamilyConfig
from megatron.hf.gathering import held_by_stages
from megatron.hf.hub import locate_weights
from megatron.hf.initial_values import WORD_EMBEDDINGS, built_on, spec_of, without_memory
from megatron.hf.loading import Found, Naming, find, read_into, size_error, without
from megatron.hf.named_tensors import NamedTensors
from megatron.hf.parallel import parallel_state as join_ranks
from megatron.hf.saving import number_of_bytes, write_model
from megatron.hf.tf_weights import TensorFlowCheckpoint, load_tf_weights
from megatron.mpu import ParallelState

logger = logging.getLogger(__name__)

_OUTPUT_LAYER = "language_model.output_layer.weight"
_LM_BIAS = "lm_head.bias"
_POOLER = "language_model.pooler."


class PreTrainedModel(NamedTensors):
    """A network of the BERT families, or the part of it that this rank holds.

    Attributes:
        heads: those of the class, as `bert_entries` calls them.
    """

    config_class: ClassVar[type[BertFamilyConfig]] = BertFamilyConfig
    supports_gradient_checkpointing: ClassVar[bool] = True
    # Patterns of names that a load says nothing about.
    _keys_to_ignore_on_load_missing: ClassVar[Sequence[str]] = (r"embeddings\.position_ids",)
    _keys_to_ignore_on_load_unexpected: ClassVar[Sequence[str]] = ()

    load_tf_weights = load_tf_weights

    # --- files -----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        config: BertFamilyConfig | str | Path | None = None,
        parallel_state: ParallelState | None = None,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        torch_dtype: torch.dtype | str | None = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        from_tf: bool = False,
        cache_dir: str | Path | None = None,
        revision: str = "main",
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str = "",
        **overrides: Any,
    ) -> Any:
        """The model whose files are in a directory or on the Hugging Face hub, set to `eval()`.

        With tensor or pipeline sizes all ranks call it, and each reads only what it holds.

        Args:
            model_args: further positional arguments of the constructor.
            parallel_state: the ranks, in place of the two sizes.
            torch_dtype: a type or its name; "auto" for the configuration's or else the files'.
            ignore_mismatched_sizes: initialise what has another shape in the files anew.
            from_tf: read a TensorFlow checkpoint of BERT's original programs.
            overrides: fields of the configuration; what it does not have goes to the constructor.

        Returns:
            the model, and with `output_loading_info` a dictionary of the names that were missing,
            unexpected and of another shape.

        Raises:
            CheckpointError: files are missing, damaged or of another shape.
            ConfigError: the configuration cannot be built, or not on these ranks.
            ImportError: a package that is needed for it is absent.
        """
        hub: dict[str, Any] = {
            "cache_dir": cache_dir,
            "revision": revision,
            "token": token,
            "local_files_only": local_files_only,
            "force_download": force_download,
            "subfolder": subfolder,
        }
        torch_dtype = overrides.pop("dtype", torch_dtype)
        if isinstance(config, BertFamilyConfig):
            known = config
        else:
            known, overrides = cls.config_class.from_pretrained(
                pretrained_model_name_or_path if config is None else config,
                return_unused_kwargs=True,
                **hub,
                **overrides,
            )
        ranks = parallel_state or join_ranks(
            tensor_model_parallel_size, pipeline_model_parallel_size
        )
        with built_on(without_memory(ranks)):
            model = cls(known, *model_args, **overrides)
        with _opened(cls.__name__, pretrained_model_name_or_path, from_tf, hub) as source:
            model.materialise(ranks.device, _chosen_dtype(torch_dtype, known, source))
            info = model.load_tensors(source, ignore_mismatched_sizes=ignore_mismatched_sizes)
        model.eval()
        return (model, info) if output_loading_info else model

    def load_tensors(
        self, source: TensorSource, *, ignore_mismatched_sizes: bool = False
    ) -> dict[str, list[Any]]:
        """Fill the parameters from tensors by Hugging Face's names; all ranks must call it.

        What is missing is newly initialised, and a warning names it.

        Returns:
            the names that were missing, unexpected and of another shape, as `from_pretrained` does.

        Raises:
            CheckpointError: tensors are damaged or of another shape.
        """
        naming = self.naming()
        found = find(naming, source)
        if found.mismatched and not ignore_mismatched_sizes:
            raise size_error(type(self).__name__, found.mismatched)
        self._read(naming, source, found)
        ignored = [*self._keys_to_ignore_on_load_unexpected]
        if not any(entry.ours.startswith(_POOLER) for entry in naming.entries):
            ignored.append(r"(^|\.)pooler\.")  # left out on purpose
        info: dict[str, list[Any]] = {
            "missing_keys": without(found.missing, self._keys_to_ignore_on_load_missing),
            "unexpected_keys": without(self.meaningful(found.unexpected), ignored),
            "mismatched_keys": [(name, *shapes) for name, shapes in found.mismatched.items()],
            "error_msgs": [],
        }
        if self.state.rank == 0:
            _warn(type(self).__name__, info)
        return info

    @torch.no_grad()
    def _read(self, naming: Naming, source: TensorSource, found: Found) -> None:
        entries = {entry.ours: entry for entry in naming.entries}
        if not all(found.has(entry) for entry in naming.entries):
            self.seed_of_values()  # which all ranks agree on, whoever needs it
        for key, part in self.parts().items():
            if not found.has(entries[key]):
                self.init_parameter(part.tensor)  # type: ignore[arg-type]
                continue
            read_into(part.tensor, part.spec, entries[key], source, found, self.state.tensor)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write the whole model into a directory that `transformers` loads.

        All ranks call it and the first writes; one tensor at a time passes through memory.

        Args:
            max_shard_size: bytes of a file, or a text such as "5GB".
            safe_serialization: safetensors files; otherwise archives of `torch.save`.

        Raises:
            ConfigError: `max_shard_size` is no size.
        """
        max_bytes = number_of_bytes(max_shard_size)
        first = self.state.rank == 0
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        config.torch_dtype = self.dtype
        tensors = self._to_write()
        if first:
            self._warn_of_positions()
            write_model(
                Path(save_directory),
                config.to_json_string(),
                self._plans(),
                tensors,
                max_bytes=max_bytes,
                safetensors=safe_serialization,
            )
        else:
            for _ in tensors:
                pass

    def _plans(self) -> list[TensorPlan]:
        """The tensors of the files, in order."""
        dtype = self.dtype
        plans = [
            TensorPlan(name, tuple(shape), dtype)
            for entry in self.entries()
            for name, shape in zip(
                entry.theirs, entry.shapes(self._held[entry.ours].shape), strict=True
            )
        ]
        shapes = {plan.name: plan.shape for plan in plans}
        return (
            plans
            + [TensorPlan(alias, shapes[name], dtype) for alias, name in self._copies().items()]
            + [TensorPlan(name, shape, dtype) for name, shape in self.unused_table().items()]
        )

    def _to_write(self) -> Iterator[Tensor]:
        """The tensors of the files, on the first rank; all ranks must exhaust it."""
        copies = {name: torch.empty(0) for name in self._copies().values()}
        for name, tensor in self.gathered(self.parts(), everywhere=False):
            on_cpu = tensor.to("cpu", self.dtype)
            if name in copies:
                copies[name] = on_cpu.clone()
            yield on_cpu
        yield from copies.values()
        for shape in self.unused_table().values():
            yield torch.zeros(shape, dtype=self.dtype)

    def _copies(self) -> dict[str, str]:
        """Second names that are written: those that releases of today do not tie by themselves."""
        return {} if self.config.tie_word_embeddings else self.aliases()

    def _warn_of_positions(self) -> None:
        if self.native_config.model.has_distances:
            warnings.warn(
                f"position_embedding_type {self.config.position_embedding_type}: transformers 4.34 "
                "reads it; current releases (5.x) load the model without a word, leave these "
                "positions out, and compute something else",
                stacklevel=3,
            )

    # --- what users ask a model ------------------------------------------------------------------

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Numbers of the whole model, each counted once; all ranks must call it."""
        parts = self.parts()
        if only_trainable:
            parts = {key: part for key, part in parts.items() if part.tensor.requires_grad}
        held = held_by_stages(parts.values(), self.state)
        return sum(torch.Size(each.shape).numel() for each in held.values())

    def get_input_embeddings(self) -> nn.Module | None:
        """The module whose `weight` [v / t, h] looks tokens up; None on a stage without it."""
        return self._module_of(WORD_EMBEDDINGS) if self.stage.is_first else None

    def get_output_embeddings(self) -> nn.Module | None:
        """The module whose `weight` [v / t, h] scores tokens; None where there is none."""
        if "lm" not in self.heads or not self.stage.is_last:
            return None
        return self._module_of(_OUTPUT_LAYER) or self._module_of(WORD_EMBEDDINGS)

    def _module_of(self, key: str) -> nn.Module | None:
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                if spec_of(parameter).key == key:
                    return module
        return None

    def tie_weights(self) -> None:
        """Nothing: the network has tied tensors once, or keeps the copies on two stages equal."""

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Recompute the layers' activations in the backward pass, in place of holding them."""
        self._set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Hold the layers' activations until the backward pass."""
        self._set_gradient_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed."""
        return self.gradient_checkpointing

    def _set_gradient_checkpointing(self, value: bool) -> None:
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.gradient_checkpointing = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Module | None:
        """Give the vocabulary another size; new tokens get initial values, the others keep theirs.

        Parameters stay the same objects with new values; an optimizer's state of them does not fit
        any more.

        Returns:
            the input embeddings.

        Raises:
            ConfigError: the model is spread over several ranks.
        """
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        size += -size % (pad_to_multiple_of or 1)
        if size != self.config.vocab_size:
            if self.state.model.size > 1:
                raise ConfigError(
                    f"resize_token_embeddings({size}): found {self.state.model.size} ranks, "
                    "expected one: resize and save in one process, then load"
                )
            self._resize(size)
        return self.get_input_embeddings()

    @torch.no_grad()
    def _resize(self, size: int) -> None:
        kept = min(size, self.config.vocab_size)
        before = self.native_config
        after = replace(before, model=replace(before.model, vocab_size=size))
        self._initial_seed = None  # new tokens are drawn anew each time
        for key, part in self.parts().items():
            if key in (WORD_EMBEDDINGS, _OUTPUT_LAYER, _LM_BIAS):
                parameter, old = part.tensor, part.tensor.detach().clone()
                shape = (size, *part.spec.shape[1:])
                parameter.grad = None
                parameter.data = old.new_zeros(shape)
                parameter.shard_spec = replace(part.spec, shape=shape, padded=size)  # type: ignore[attr-defined]
                self.init_parameter(parameter)  # type: ignore[arg-type]
                parameter[:kept] = old[:kept]
        for module in self.modules():
            for name, value in vars(module).items():
                if isinstance(value, Config) and value == before:
                    setattr(module, name, after)
            if isinstance(module, PreTrainedModel):
                module._held = held_by_stages(module.parts().values(), module.state)
        self.config.vocab_size = size


@contextmanager
def _opened(
    class_name: str, where: str | Path, from_tf: bool, hub: Mapping[str, Any]
) -> Iterator[TensorSource]:
    """The tensors in a model's files."""
    if from_tf:
        yield TensorFlowCheckpoint.open(where, class_name)
        return
    directory = locate_weights(where, class_name, **hub)
    if any(directory.glob("*.safetensors")):
        requires_backends(class_name, "safetensors")
    with HuggingFaceFiles(directory) as source:
        yield source


def _chosen_dtype(
    asked: torch.dtype | str | None, config: BertFamilyConfig, source: TensorSource
) -> torch.dtype:
    """The number format of a loaded model's parameters."""
    if asked is None:
        return torch.get_default_dtype()
    if asked == "auto":
        stored = (dtype for dtype in source.dtypes.values() if dtype.is_floating_point)
        return config.torch_dtype or next(stored, torch.get_default_dtype())
    named = asked if isinstance(asked, torch.dtype) else getattr(torch, asked, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ConfigError(f'torch_dtype: found {asked!r}, expected a floating-point type or "auto"')
    return named


def _warn(class_name: str, info: Mapping[str, list[Any]]) -> None:
    """Say what of the files was not used, and what of the model was not in the files."""
    if info["unexpected_keys"]:
        logger.warning(
            "%s has no place for these tensors of the files: %s",
            class_name,
            ", ".join(info["unexpected_keys"]),
        )
    anew = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if anew:
        logger.warning(
            "%s: these tensors are not in the files, or have another shape there, and were newly "
            "initialised; train the model before you use it: %s",
            class_name,
            ", ".join(anew),
        )
