"""The byte budget: what every part of the process may hold, and how many slots are left for experts.

The budget is a cap on the whole process, so everything else is subtracted from it first, by measurement where it exists
already (interpreter, libraries, non-expert weights) and by calculation where it is still to come (KV cache of the whole
context, activations of a prefill that fills it, buffers).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from swapless.errors import BudgetError, message
from swapless.units import format_size

STAGING_SLOTS = 4
"""Slots through which prefill streams experts that get no place of their own: two being read, one computed, one ready."""

AHEAD_WORTH = 8
"""Slots that the cache must keep for each one set aside for reading ahead, where that is left to the budget."""

_SLACK_BYTES = 24 << 20
"""Left free: allocator fragments, the trace of the run, the interpreter's own growth while generating."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Where the bytes go. ``parts`` sum to at most ``total_bytes``; ``floor_bytes`` is the smallest total that works.

    ``slots`` counts expert slots of the cache; ``staging_slots`` serve prefill, ``ahead_slots`` what is read ahead;
    ``token_cycle_bytes`` is what one decoded token asks for
    (L * K experts), below which a cache can keep nothing from one token to the next.
    """

    total_bytes: int
    parts: Mapping[str, int]
    floor_bytes: int
    slots: int
    staging_slots: int
    ahead_slots: int
    slot_bytes: int
    expert_bytes: int
    num_experts_total: int
    token_cycle_bytes: int
    context_tokens: int
    warnings: tuple[str, ...] = ()

    @property
    def resident_share(self) -> float:
        """Slots over all experts of the model, in (0, 1]."""
        return self.slots / self.num_experts_total

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"parts": dict(self.parts), "resident_share": self.resident_share}


def plan_budget(
    *,
    total_bytes: int | None,
    resident_share: float | None,
    fixed_parts: Mapping[str, int],
    slot_bytes: int,
    expert_bytes: int,
    num_experts_total: int,
    experts_a_token: int,
    context_tokens: int,
    ahead_slots: int = 0,
    ahead_if_worth: bool = False,
) -> Budget:
    """Divide a budget, or find the one that a resident share needs.

    Parameters
    ----------
    total_bytes : int or None
        The cap; None where ``resident_share`` decides.
    resident_share : float or None
        Share of all experts to keep in slots, in (0, 1].
    fixed_parts : mapping of str to int
        Bytes of everything but slots and staging, by name.
    slot_bytes, expert_bytes : int
        Bytes of a slot, and of an expert without padding.
    num_experts_total, experts_a_token : int
        L * E and L * K.
    context_tokens : int
        The context that the parts were calculated for.
    ahead_slots : int
        Slots beside the cache for what is read ahead; none are needed where every expert is resident.
    ahead_if_worth : bool
        Set none aside where the cache would be left with fewer than ``AHEAD_WORTH`` times as many.

    Raises
    ------
    BudgetError
        The budget is below its floor: the fixed parts, one slot, the staging slots and those for reading ahead.
    """
    fixed = dict(fixed_parts) | {"slack": _SLACK_BYTES}
    fixed_bytes = sum(fixed.values())
    staging = min(STAGING_SLOTS, num_experts_total)
    needed = staging + (0 if ahead_if_worth else ahead_slots)
    floor = fixed_bytes + (1 + needed) * slot_bytes
    if total_bytes is None:
        assert resident_share is not None, "either a budget or a share is given"
        slots = max(1, int(resident_share * num_experts_total + 1e-9))
    else:
        slots = (total_bytes - fixed_bytes) // slot_bytes
        if slots < num_experts_total:
            slots -= staging + ahead_slots
    if slots >= num_experts_total:
        slots, staging, ahead_slots = num_experts_total, 0, 0
    elif ahead_if_worth and slots < AHEAD_WORTH * ahead_slots:
        slots += 0 if total_bytes is None else ahead_slots
        ahead_slots = 0
    if total_bytes is None:
        total_bytes = fixed_bytes + (slots + staging + ahead_slots) * slot_bytes
    if slots < 1:
        parts = ", ".join(f"{name} {format_size(size)}" for name, size in fixed.items())
        raise BudgetError(
            message(
                "The memory budget is too small for this model.",
                got=f"{format_size(total_bytes)} ({total_bytes} bytes)",
                allowed=f"at least {format_size(floor)} ({floor} bytes): {parts}, "
                f"and {1 + needed} experts of {format_size(slot_bytes)}",
                step="Raise --memory, or lower --context.",
            )
        )
    warnings = []
    if slots < experts_a_token:
        warnings.append(
            f"{slots} slots are fewer than the {experts_a_token} experts that one token asks for "
            f"({format_size(experts_a_token * expert_bytes)} a token): nearly every one is read again for every token."
        )
    return Budget(
        total_bytes=total_bytes,
        parts=fixed | {"staging": staging * slot_bytes, "ahead": ahead_slots * slot_bytes, "slots": slots * slot_bytes},
        floor_bytes=floor,
        slots=slots,
        staging_slots=staging,
        ahead_slots=ahead_slots,
        slot_bytes=slot_bytes,
        expert_bytes=expert_bytes,
        num_experts_total=num_experts_total,
        token_cycle_bytes=experts_a_token * expert_bytes,
        context_tokens=context_tokens,
        warnings=tuple(warnings),
    )
