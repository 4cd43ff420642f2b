"""The byte budget: what every part of the process may hold, and how many slots are left for experts.

The budget is a cap on the whole process, so everything else is subtracted from it first, by measurement where it exists
already (interpreter, libraries, non-expert weights), where it was tried out (KV cache and values of forward calls) and by
calculation where it is still to come (buffers). What a long prompt holds beyond a decode step is lent by slots while it runs.
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

VIEWS_BYTES = 2560
"""What the interpreter holds of a slot: its memory seen as parameters."""

SLACK_BYTES = 12 << 20
"""Left free: allocator fragments, the interpreter's own growth while generating, text and tokens of the user."""

_TRIALS_DIFFER = 32
"""One part in so many of what a prompt holds is left free besides: two trials of the same prompt differ by that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Where the bytes go. ``parts`` sum to at most ``total_bytes``; ``floor_bytes`` is the smallest total that works.

    ``slots`` counts expert slots of the cache; ``staging_slots`` serve prefill, ``ahead_slots`` what is read ahead;
    ``token_cycle_bytes`` is what one decoded token asks for
    (L * K experts), below which a cache can keep nothing from one token to the next. ``prompt_bytes`` is what a prompt of
    the whole context holds at once: ``parts["activations"]`` and ``parts["prompt"]`` are there for it, the rest is lent by
    slots while it runs. ``capped`` says that a total was asked for, to which the process is held; of a share it is what a
    prompt of one sequence takes, and slots lend nothing.
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
    prompt_bytes: int = 0
    capped: bool = True
    warnings: tuple[str, ...] = ()

    @property
    def resident_share(self) -> float:
        """Slots over all experts of the model, in (0, 1]."""
        return self.slots / self.num_experts_total

    @property
    def staging_blocks(self) -> int:
        """Where all experts have a slot, staging costs nothing but for prompts that some of the slots lend memory to."""
        return self.staging_slots or min(STAGING_SLOTS, self.num_experts_total)

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
    prompt_bytes: int = 0,
    least_bytes: int = 0,
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
    prompt_bytes : int
        What a prompt of the whole context holds at once; of the fixed parts ``"activations"`` are there for it, and slots
        lend the rest.
    least_bytes : int
        The floor is no lower than this.

    Raises
    ------
    BudgetError
        The budget is below its floor: the fixed parts, and either one slot, the staging slots and those for reading ahead, or
        the staging slots and what a prompt holds, whichever is more.
    """
    fixed = {"slack": SLACK_BYTES + prompt_bytes // _TRIALS_DIFFER} | dict(fixed_parts)
    fixed_bytes = sum(fixed.values())
    staging = min(STAGING_SLOTS, num_experts_total)
    needed = staging + (0 if ahead_if_worth else ahead_slots)
    lent = max(0, prompt_bytes - fixed.get("activations", 0))
    cost = slot_bytes + VIEWS_BYTES
    least = max((1 + needed) * cost, staging * cost + lent)
    floor = max(fixed_bytes + min(least, num_experts_total * cost + lent), least_bytes)
    capped = total_bytes is not None
    if total_bytes is None:
        assert resident_share is not None, "either a budget or a share is given"
        slots = max(1, int(resident_share * num_experts_total + 1e-9))
    else:
        # All at once only where a prompt leaves them all: whoever lends slots reads experts again, through staging.
        slots = (total_bytes - fixed_bytes - lent) // cost
        if slots < num_experts_total:
            slots = min(num_experts_total, (total_bytes - fixed_bytes) // cost - staging - ahead_slots)
        else:
            slots, staging, ahead_slots = num_experts_total, 0, 0
    if total_bytes is None and slots >= num_experts_total:
        slots, staging, ahead_slots = num_experts_total, 0, 0
    elif slots >= num_experts_total or (ahead_if_worth and slots < AHEAD_WORTH * ahead_slots):
        slots = min(num_experts_total, slots + (0 if total_bytes is None else ahead_slots))
        ahead_slots = 0
    held = (slots + staging + ahead_slots) * cost
    prompt = max(0, lent + staging * cost - held) if staging and capped else lent
    if total_bytes is None:
        total_bytes = max(fixed_bytes + held + prompt, least_bytes)
    if slots < 1 or total_bytes < floor:
        parts = ", ".join(f"{name} {format_size(size)}" for name, size in fixed.items() if size)
        raise BudgetError(
            message(
                "The memory budget is too small for this model.",
                got=f"{format_size(total_bytes)} ({total_bytes} bytes)",
                allowed=f"at least {format_size(floor)} ({floor} bytes): {parts}, "
                f"and {1 + needed} experts of {format_size(slot_bytes)}"
                f" or a prompt of {context_tokens} tokens, {format_size(lent)} more",
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
        parts=fixed
        | {
            "prompt": prompt,
            "views": held - (slots + staging + ahead_slots) * slot_bytes,
            "staging": staging * slot_bytes,
            "ahead": ahead_slots * slot_bytes,
            "slots": slots * slot_bytes,
        },
        floor_bytes=floor,
        slots=slots,
        staging_slots=staging,
        ahead_slots=ahead_slots,
        slot_bytes=slot_bytes,
        expert_bytes=expert_bytes,
        num_experts_total=num_experts_total,
        token_cycle_bytes=experts_a_token * expert_bytes,
        context_tokens=context_tokens,
        prompt_bytes=prompt_bytes,
        capped=capped,
        warnings=tuple(warnings),
    )
