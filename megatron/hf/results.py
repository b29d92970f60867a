"""What one stage has made, as tensors that travel and the form that they are put back into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from megatron.model.module import conversion_helper


@dataclass(frozen=True)
class Results:
    """What one stage has made: tensors, and in which places."""

    named: Mapping[str, torch.Tensor | None]
    caches: list[tuple[torch.Tensor, ...]] | None
    hidden_states: list[torch.Tensor] | None
    attentions: list[torch.Tensor] | None
    cross_attentions: list[torch.Tensor] | None

    def flattened(self) -> tuple[list[torch.Tensor], Any]:
        """All tensors, and the form that they are put back into: their numbers in their places."""
        tensors: list[torch.Tensor] = []

        def number(tensor: torch.Tensor) -> Any:
            tensors.append(tensor)
            return len(tensors) - 1

        parts = [getattr(self, field.name) for field in fields(self)]
        return tensors, conversion_helper(parts, number)

    @classmethod
    def of(cls, tensors: list[torch.Tensor], form: Any) -> Results:
        """The results with these tensors in the places of a form."""
        return cls(*(_filled(part, tensors) for part in form))


def _filled(form: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(form, int):
        return tensors[form]
    if isinstance(form, dict):
        return {key: _filled(part, tensors) for key, part in form.items()}
    if isinstance(form, list | tuple):
        return type(form)(_filled(part, tensors) for part in form)
    return form


def joined(parts: Iterable[list[Any] | None]) -> tuple[Any, ...] | None:
    """The stages' parts, one behind the other; None where nothing was asked for."""
    together = [part for part in parts if part is not None]
    return tuple(item for part in together for item in part) if together else None
