"""A checkpoint as the model sees it: its MoE layers, what their experts are made of, and where the bytes come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from swapless.store.checkpoint import SLOT_ALIGNMENT, ParameterSource


def aligned(offset: int) -> int:
    """The next offset in a slot at which a parameter may begin."""
    return -(-offset // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertParameter:
    """One parameter of one expert: its shape without the leading expert axis, and its place in the slot."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    slot_offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


class Origin(Protocol):
    """How one stacked expert parameter of one MoE layer comes out of the checkpoint."""

    def source(self, parameter: ExpertParameter, expert: int) -> ParameterSource:
        """Where the bytes of one expert are, and how they become the parameter."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeLayer:
    """One experts module: its path in the model, its ``block`` index, and what one of its experts is made of."""

    path: str
    block: int
    num_experts: int
    parameters: tuple[ExpertParameter, ...]
    origins: Mapping[str, Origin]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's parameters, without padding."""
        return sum(parameter.nbytes for parameter in self.parameters)

    @property
    def slot_bytes(self) -> int:
        """Bytes one expert takes in a slot, every parameter aligned."""
        last = self.parameters[-1]
        return aligned(last.slot_offset + last.nbytes)

    def sources(self, expert: int) -> list[ParameterSource]:
        """Where the parameters of one expert come from."""
        return [self.origins[parameter.name].source(parameter, expert) for parameter in self.parameters]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A checkpoint as the model sees it: its MoE layers, the keys of their experts, and the bytes of all else.

    ``linear_keys`` are those other keys that are weights of linear layers just as they are, with the layer's path;
    ``unused_keys`` those that the model has no place for.
    """

    moe_layers: tuple[MoeLayer, ...]
    top_k: int | None
    dtype: torch.dtype
    expert_keys: frozenset[str]
    linear_keys: Mapping[str, str]
    non_expert_bytes: int
    per_expert: bool
    unused_keys: tuple[str, ...] = ()
