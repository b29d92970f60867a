"""What all models of the family can do beside computing: be configured, initialised, loaded, saved.

    model = MegatronBertForMaskedLM.from_pretrained(directory, tensor_model_parallel_size=2)
    model.save_pretrained(elsewhere)

A model is built without memory, on the meta device, and gets its values once, when all of its
modules exist: initial ones from `post_init`, those of files from `from_pretrained`. Either is a
function of the tensors' global names, so that every layout starts from the same model.

To its user a model consists of tensors by Hugging Face's names. `entries` maps them to the
parameters, which know by their `shard_spec` what they are and how they are split; everything here
goes through these two.

Letters: v vocabulary, h hidden, t tensor size.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.checkpoint.hf_bert import bert_entries
from megatron.checkpoint.hf_files import HuggingFaceFiles
from megatron.checkpoint.hf_models import model_config_of
from megatron.checkpoint.name_map import Entry
from megatron.checkpoint.safetensors_writer import TensorPlan
from megatron.checkpoint.tensor_source import TensorSource
from megatron.config import Config
from megatron.errors import ConfigError
from megatron.hf.configuration import BertFamilyConfig
from megatron.hf.gathering import Part, held_by_stages, true_part, whole_tensors
from megatron.hf.hub import locate_weights
from megatron.hf.loading import BUFFERS, Found, Naming, find, read_into, size_error, without
from megatron.hf.parallel import native_config, parallel_state, stage_of
from megatron.hf.saving import number_of_bytes, write_model
from megatron.hf.tf_weights import TensorFlowCheckpoint, load_tf_weights
from megatron.mpu import ParallelState, ShardSpec
from megatron.mpu.init import InitMethod, create_parameter, normal, ones, zeros
from megatron.mpu.watchdog import waiting

logger = logging.getLogger(__name__)

_META = torch.device("meta")
_WORD_EMBEDDINGS = "language_model.embedding.word_embeddings.weight"
_OUTPUT_LAYER = "language_model.output_layer.weight"
_LM_BIAS = "lm_head.bias"
# The ranks of the models that are built now, where they are not told.
_building: ContextVar[ParallelState | None] = ContextVar("_building", default=None)


class PreTrainedModel(nn.Module):
    """A network of the BERT families, or the part of it that this rank holds.

    A subclass makes its modules in its constructor and calls `post_init` last. Parameters without
    a `shard_spec`, as those of PyTorch's own layers, are taken to be whole on all tensor ranks.

    Args:
        parallel_state: the ranks that the model is spread over; this process alone by default.

    Attributes:
        heads: those of the class, as `bert_entries` calls them.

    Raises:
        ConfigError, CheckpointError: the configuration cannot be built; both are ValueErrors.
    """

    config_class: ClassVar[type[BertFamilyConfig]] = BertFamilyConfig
    base_model_prefix: ClassVar[str] = "bert"
    heads: ClassVar[tuple[str, ...]] = ()
    supports_gradient_checkpointing: ClassVar[bool] = True
    # Patterns of names that a load says nothing about.
    _keys_to_ignore_on_load_missing: ClassVar[Sequence[str]] = (r"embeddings\.position_ids",)
    _keys_to_ignore_on_load_unexpected: ClassVar[Sequence[str]] = ()

    load_tf_weights = load_tf_weights

    config: BertFamilyConfig
    state: ParallelState
    native_config: Config
    gradient_checkpointing: bool

    def __init__(
        self, config: BertFamilyConfig, *, parallel_state: ParallelState | None = None
    ) -> None:
        super().__init__()
        config.check()
        state = parallel_state or _building.get() or ParallelState.single()
        model = model_config_of(config.to_dict())
        self.config = config
        self._device = state.device
        # Modules of a model that is being built share its state, which has no memory yet.
        self.state = state if state.device == _META else _without_memory(state)
        self.stage = stage_of(model.num_layers, state)
        self.native_config = native_config(model, state)
        self.gradient_checkpointing = False
        self._initial_seed: int | None = None

    def post_init(self) -> None:
        """Give the parameters their initial values; the last thing a constructor does.

        All ranks must call it. Within the constructor of a larger model, and of one that is loaded
        from files, it leaves the values to that.
        """
        for name, parameter in self.named_parameters():
            if not hasattr(parameter, "shard_spec"):
                parameter.shard_spec = ShardSpec(name, tuple(parameter.shape))  # type: ignore[attr-defined]
        self._held = held_by_stages(self._parts().values(), self.state)
        if self._device == _META:
            return
        self._materialise(self._device, torch.get_default_dtype())
        for module in self.modules():
            self._init_weights(module)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the initial values of a module's own parameters."""
        for parameter in module.parameters(recurse=False):
            self._init_parameter(parameter)

    @torch.no_grad()
    def _init_parameter(self, parameter: nn.Parameter) -> None:
        """N(0, initializer_range) in matrices, zeros in biases, ones in norms' weights.

        Drawn from a seed that PyTorch's default generator, so `torch.manual_seed`, determines.
        """
        spec = _spec(parameter)
        if not spec.shape:
            return  # a number of a user's own, which has its value
        method: InitMethod = zeros if spec.key.endswith("bias") else ones
        if len(spec.shape) > 1:
            method = normal(self.config.initializer_range, self._seed_of_values())
        fresh = create_parameter(
            spec, self.state.tensor, method, dtype=parameter.dtype, device=parameter.device
        )
        parameter.copy_(fresh)
        if spec.key == _WORD_EMBEDDINGS and self.config.pads_with_zeros:
            self._row_of_padding(Part(spec, parameter)).zero_()

    def _row_of_padding(self, part: Part) -> Tensor:
        """[0 or 1, h]: the padding token's row, where this rank holds it."""
        axis, row = self.state.tensor, self.config.pad_token_id
        first = axis.rank * part.tensor.size(0)
        if row is None or not first <= row < first + part.tensor.size(0):
            return part.tensor[:0]
        return part.tensor[row - first : row - first + 1]

    def _seed_of_values(self) -> int:
        """The seed of the initial values, the same on all ranks."""
        if self._initial_seed is None:
            seed = torch.randint(2**62, ()).to(self.state.device)
            if self.state.world_size > 1:
                with waiting("rank 0 to say the seed of initial values"):
                    dist.broadcast(seed, src=0)
            self._initial_seed = int(seed)
        return self._initial_seed

    def _materialise(self, device: torch.device, dtype: torch.dtype) -> None:
        """Give every parameter memory, filled with zeros, where it has none."""
        for parameter in self.parameters():
            if parameter.is_meta:
                fresh = nn.Parameter(
                    torch.zeros(parameter.shape, dtype=dtype, device=device),
                    requires_grad=parameter.requires_grad,
                )
                fresh.shard_spec = _spec(parameter)  # type: ignore[attr-defined]
                hooks = parameter._backward_hooks
                # It stays the same object, for whoever has it or has tied something to it.
                torch.utils.swap_tensors(parameter, fresh)
                parameter._backward_hooks = hooks
            else:
                parameter.data = parameter.data.to(device, dtype)
        object.__setattr__(self.state, "device", device)

    # --- names -----------------------------------------------------------------------------------

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

    def _aliases(self) -> dict[str, str]:
        """Second names of tensors, as `transformers` has them in a model's `state_dict`."""
        if "lm" not in self.heads:
            return {}
        table = f"{self.base_model_prefix}.embeddings.word_embeddings.weight"
        tied = {"cls.predictions.decoder.weight": table}
        return {
            **(tied if self.config.tie_word_embeddings else {}),
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }

    def _meaningful(self, names: Iterable[str]) -> list[str]:
        """The names but for those that may be there and mean nothing."""
        return [name for name in without(names, BUFFERS) if name not in self._unused_table()]

    def _naming(self) -> Naming:
        return Naming(
            self.entries(),
            {name: held.shape for name, held in self._held.items()},
            self._aliases(),
            # Where releases of today tie nothing, it is the one that is computed with.
            {"cls.predictions.decoder.bias"},
            f"{self.base_model_prefix}.",
            self.base_model is not self,
        )

    def _parts(self) -> dict[str, Part]:
        """This rank's parameters by the names of their values; of a copy the owner's."""
        return {
            _spec(parameter).key: Part(_spec(parameter), parameter)
            for parameter in self.parameters()
        }

    def _own_tensors(self, parts: Mapping[str, Part]) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face's names and tensors of parts of ours; a copy goes by its second name."""
        aliases = {name: alias for alias, name in self._aliases().items()}
        for entry in self.entries():
            if entry.ours in parts:
                part = parts[entry.ours]
                names: Sequence[str] = entry.theirs
                if part.spec.tied_to is not None:
                    names = [aliases[name] for name in names]
                yield from zip(names, entry.split(true_part(part, self.state)), strict=True)

    # --- tensors by name -------------------------------------------------------------------------

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
        parts = self._parts()
        if not keep_vars:
            parts = {key: replace(part, tensor=part.tensor.detach()) for key, part in parts.items()}
        found = dict(self._own_tensors(parts))
        for alias, name in self._aliases().items():
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
        aliases = self._aliases()
        expected = self.state_dict()
        given = dict(state_dict)
        for pair in (*aliases.items(), *((name, alias) for alias, name in aliases.items())):
            if pair[0] in given:
                given.setdefault(pair[1], given[pair[0]])
        missing = [name for name in expected if name not in given]
        known = {*expected, *aliases}
        unexpected = self._meaningful(name for name in state_dict if name not in known)
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
        parts = self._parts()
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
        for key, part in self._parts().items():
            gradient = getattr(part.tensor, "main_grad", part.tensor.grad)
            if gradient is not None:
                parts[key] = Part(part.spec, gradient)
        return parts

    def full_state_dict(self, *, gradients: bool = False) -> dict[str, Tensor]:
        """The whole tensors, or their gradients, of all stages, on every rank; all must call it.

        For models that fit into one process' memory.
        """
        parts = self._gradient_parts() if gradients else self._parts()
        found = {
            name: tensor.detach().clone() for name, tensor in self._gathered(parts, everywhere=True)
        }
        if not gradients:
            for alias, name in self._aliases().items():
                found[alias] = found[name]
        return found

    def _gathered(
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
        ranks = parallel_state or _ranks(tensor_model_parallel_size, pipeline_model_parallel_size)
        with _built_on(_without_memory(ranks)):
            model = cls(known, *model_args, **overrides)
        with _opened(cls.__name__, pretrained_model_name_or_path, from_tf, hub) as source:
            model._materialise(ranks.device, _chosen_dtype(torch_dtype, known, source))
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
        naming = self._naming()
        found = find(naming, source)
        if found.mismatched and not ignore_mismatched_sizes:
            raise size_error(type(self).__name__, found.mismatched)
        self._read(naming, source, found)
        info: dict[str, list[Any]] = {
            "missing_keys": without(found.missing, self._keys_to_ignore_on_load_missing),
            "unexpected_keys": without(
                self._meaningful(found.unexpected), self._keys_to_ignore_on_load_unexpected
            ),
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
            self._seed_of_values()  # which all ranks agree on, whoever needs it
        for key, part in self._parts().items():
            if not found.has(entries[key]):
                self._init_parameter(part.tensor)  # type: ignore[arg-type]
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
            + [TensorPlan(name, shape, dtype) for name, shape in self._unused_table().items()]
        )

    def _to_write(self) -> Iterator[Tensor]:
        """The tensors of the files, on the first rank; all ranks must exhaust it."""
        copies = {name: torch.empty(0) for name in self._copies().values()}
        for name, tensor in self._gathered(self._parts(), everywhere=False):
            on_cpu = tensor.to("cpu", self.dtype)
            if name in copies:
                copies[name] = on_cpu.clone()
            yield on_cpu
        yield from copies.values()
        for shape in self._unused_table().values():
            yield torch.zeros(shape, dtype=self.dtype)

    def _copies(self) -> dict[str, str]:
        """Second names that are written: those that releases of today do not tie by themselves."""
        return {} if self.config.tie_word_embeddings else self._aliases()

    def _unused_table(self) -> dict[str, tuple[int, int]]:
        """The table of absolute positions that `transformers` has beside relative ones, too."""
        if not self.native_config.model.has_distances:
            return {}
        prefix = "" if self.base_model is self else f"{self.base_model_prefix}."
        shape = (self.config.max_position_embeddings, self.config.hidden_size)
        return {f"{prefix}embeddings.position_embeddings.weight": shape}

    def _warn_of_positions(self) -> None:
        if self.native_config.model.has_distances:
            warnings.warn(
                f"position_embedding_type {self.config.position_embedding_type}: transformers 4.34 "
                "reads it; current releases (5.x) load the model without a word, leave these "
                "positions out, and compute something else",
                stacklevel=3,
            )

    # --- what users ask a model ------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the parameters."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Numbers of the whole model, each counted once; all ranks must call it."""
        parts = self._parts()
        if only_trainable:
            parts = {key: part for key, part in parts.items() if part.tensor.requires_grad}
        held = held_by_stages(parts.values(), self.state)
        return sum(torch.Size(each.shape).numel() for each in held.values())

    def get_input_embeddings(self) -> nn.Module | None:
        """The module whose `weight` [v / t, h] looks tokens up; None on a stage without it."""
        return self._module_of(_WORD_EMBEDDINGS) if self.stage.is_first else None

    def get_output_embeddings(self) -> nn.Module | None:
        """The module whose `weight` [v / t, h] scores tokens; None where there is none."""
        if "lm" not in self.heads or not self.stage.is_last:
            return None
        return self._module_of(_WORD_EMBEDDINGS) or self._module_of(_OUTPUT_LAYER)

    def _module_of(self, key: str) -> nn.Module | None:
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                if _spec(parameter).key == key:
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
        for key, part in self._parts().items():
            if key in (_WORD_EMBEDDINGS, _OUTPUT_LAYER, _LM_BIAS):
                parameter, old = part.tensor, part.tensor.detach().clone()
                shape = (size, *part.spec.shape[1:])
                parameter.grad = None
                parameter.data = old.new_zeros(shape)
                parameter.shard_spec = replace(part.spec, shape=shape, padded=size)  # type: ignore[attr-defined]
                self._init_parameter(parameter)  # type: ignore[arg-type]
                parameter[:kept] = old[:kept]
        for module in self.modules():
            for name, value in vars(module).items():
                if isinstance(value, Config) and value == before:
                    setattr(module, name, after)
            if isinstance(module, PreTrainedModel):
                module._held = held_by_stages(module._parts().values(), module.state)
        self.config.vocab_size = size


def _spec(parameter: Tensor) -> ShardSpec:
    spec = parameter.shard_spec  # type: ignore[attr-defined]
    assert isinstance(spec, ShardSpec)
    return spec


def _without_memory(state: ParallelState) -> ParallelState:
    """The same ranks and streams, with parameters that have shapes and no values."""
    twin = replace(state, device=_META)
    object.__setattr__(twin, "streams", state.streams)
    return twin


@contextmanager
def _built_on(state: ParallelState) -> Iterator[None]:
    token = _building.set(state)
    try:
        yield
    finally:
        _building.reset(token)


_ranks = parallel_state  # where an argument has its name


@contextmanager
def _opened(
    class_name: str, where: str | Path, from_tf: bool, hub: Mapping[str, Any]
) -> Iterator[TensorSource]:
    """The tensors in a model's files."""
    if from_tf:
        yield TensorFlowCheckpoint.open(where, class_name)
        return
    with HuggingFaceFiles(locate_weights(where, class_name, **hub)) as source:
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


def _named(what: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        listed = ", ".join(f'"{name}"' for name in names)
        yield f"{what} key(s) in state_dict: {listed}. "
