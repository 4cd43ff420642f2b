"""What a trace says about itself: the model's shape and where the rows come from, kept as JSON beside the rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

from swapless.errors import TraceFormatError, TraceValueError, message
from swapless.untrusted import parse_json, shown

FORMAT_VERSION = 1
MAX_EXPERTS = 32767
"""Largest E: expert ids are stored as int16."""

MAX_PLACES = 1 << 26
"""Most experts of all MoE layers together; the largest model has some 25,000."""

_REQUIRED = ("format_version", "model_id", "num_experts", "top_k", "moe_blocks")
_TEXTS = ("model_id", "revision", "model_type", "expert_order", "source", "licence", "notes")
_COUNTS = ("num_shared_experts", "hidden_size", "moe_intermediate_size", "expert_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceHeader:
    """The model behind a trace, and the trace's origin.

    Parameters
    ----------
    model_id : str or None
        Model the routing comes from; None only for an import that does not say.
    num_experts : int
        E, routed experts a MoE layer.
    top_k : int
        K, places for expert ids a token and MoE layer.
    moe_blocks : tuple of int
        For each MoE layer its block index in the checkpoint, ascending; its length is L.
    revision, model_type, expert_order, source, licence, notes : str, optional
        ``expert_order`` says how the K ids of a token are ordered, ``source`` how the rows were made.
    num_shared_experts, hidden_size, moe_intermediate_size : int, optional
        Further shape, as the checkpoint's configuration has it.
    expert_bytes : int, optional
        What one expert takes where it was read from; a packed or quantised one takes less than its shape says.
    extra : dict
        Unknown keys of a file that was read; written back unchanged.

    Raises
    ------
    TraceValueError
        A shape that cannot be, such as K above E or blocks that do not ascend.

    Examples
    --------
    >>> TraceHeader(model_id=None, num_experts=8, top_k=2, moe_blocks=(1, 3)).num_moe_layers
    2
    """

    model_id: str | None
    num_experts: int
    top_k: int
    moe_blocks: tuple[int, ...]
    revision: str | None = None
    model_type: str | None = None
    num_shared_experts: int | None = None
    hidden_size: int | None = None
    moe_intermediate_size: int | None = None
    expert_bytes: int | None = None
    expert_order: str | None = None
    source: str | None = None
    licence: str | None = None
    notes: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "moe_blocks", tuple(self.moe_blocks))
        for name in _TEXTS:
            _check(getattr(self, name) is None or isinstance(getattr(self, name), str), name, getattr(self, name), "a text")
        for name in _COUNTS:
            value = getattr(self, name)
            _check(value is None or (_is_int(value) and value >= 0), name, value, "an int of at least 0")
        _check(_is_int(self.num_experts), "num_experts", self.num_experts, "an int")
        _check(1 <= self.num_experts <= MAX_EXPERTS, "num_experts", self.num_experts, f"1 to {MAX_EXPERTS}")
        _check(_is_int(self.top_k), "top_k", self.top_k, "an int")
        _check(1 <= self.top_k <= self.num_experts, "top_k", self.top_k, f"1 to {self.num_experts} (E)")
        blocks = self.moe_blocks
        ascending = all(_is_int(block) and block >= 0 for block in blocks) and all(a < b for a, b in pairwise(blocks))
        _check(len(blocks) * self.num_experts <= MAX_PLACES, "moe_blocks", len(blocks), f"at most {MAX_PLACES} experts in all")
        _check(bool(blocks) and ascending, "moe_blocks", list(blocks), "at least one block index, ascending")

    @property
    def num_moe_layers(self) -> int:
        """L, the number of MoE layers."""
        return len(self.moe_blocks)

    def to_json(self) -> str:
        """The header as the JSON text that a file carries; keys without a value are left out."""
        known: dict[str, Any] = {"format_version": FORMAT_VERSION, "model_id": self.model_id}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in ("model_id", "extra") and value is not None:
                known[item.name] = list(value) if isinstance(value, tuple) else value
        return json.dumps({**known, **self.extra}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> TraceHeader:
        """Header of a file.

        Raises
        ------
        TraceFormatError
            Not a JSON object, a required key missing, a key of the wrong kind, or an unknown ``format_version``.
        """
        values = parse_json(text, where="its metadata", error=TraceFormatError, what="trace header")
        if not isinstance(values, dict):
            raise TraceFormatError(message("The trace header must be a JSON object.", got=type(values).__name__))
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise TraceFormatError(message("The trace header lacks required keys.", got=", ".join(missing)))
        version = values.pop("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            what = "Unknown format_version of a trace."
            raise TraceFormatError(message(what, got=shown(version), allowed=FORMAT_VERSION, step="Update swapless."))
        if not isinstance(values["moe_blocks"], list):
            raise TraceFormatError(message("moe_blocks must be a list.", got=shown(values["moe_blocks"])))
        known = {item.name for item in fields(cls)} - {"extra"}
        extra = {name: values.pop(name) for name in list(values) if name not in known}
        try:
            return cls(**values, extra=extra)
        except TraceValueError as error:
            raise TraceFormatError(str(error)) from error


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(fine: bool, name: str, got: object, allowed: str) -> None:
    if not fine:
        raise TraceValueError(message(f"{name} of a trace header is wrong.", got=shown(got), allowed=allowed))
