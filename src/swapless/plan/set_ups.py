"""A plan as a result: ways to run a checkpoint, each with its figures, and which are recommended."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from swapless.plan.speed import Speed
from swapless.plan.timing import Expectation
from swapless.runtime.budget import Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class SetUp:
    """One way to run a checkpoint.

    Parameters
    ----------
    bits, dense_bits : int
        Of experts, and of all other weights.
    packed : bool
        Whether it is a packed store, or would have to become one first.
    policy : str
        Who goes when a slot is needed.
    prefetch : str or None
        What is read ahead.
    default : bool
        Whether that is what ``swapless run`` does of itself.
    budget : Budget or None
        Where the bytes go; None where the memory is not enough.
    needs_bytes : int
        The smallest budget that works.
    hit_rate : float or None
        Expected share of requests whose expert is resident.
    speed : Speed or None
        Expected time of a token and its floor.
    expected : Expectation or None
        What that was worked out from.
    perplexity_ratio : float or None
        Perplexity over that of the original; 1 where no weight is changed, None where nobody measured it.
    disk_bytes : int
        What its files take.
    commands : tuple of str
        What to type.
    """

    bits: int
    dense_bits: int
    packed: bool
    policy: str
    prefetch: str | None
    default: bool
    budget: Budget | None
    needs_bytes: int
    hit_rate: float | None
    speed: Speed | None
    expected: Expectation | None
    perplexity_ratio: float | None
    disk_bytes: int
    commands: tuple[str, ...]

    @property
    def lossless(self) -> bool:
        """Whether every weight is what the checkpoint says."""
        return self.bits == self.dense_bits == 16

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = {
            item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("budget", "speed", "expected")
        }
        figures = ("token_s", "floor_s", "compute_s", "bytes_a_token", "tokens_per_s", "most_tokens_per_s")
        found |= {name: getattr(self.speed, name) if self.speed else None for name in figures}
        return found | {
            "lossless": self.lossless,
            "slots": self.budget.slots if self.budget else None,
            "resident_share": self.budget.resident_share if self.budget else None,
            "budget": self.budget.to_dict() if self.budget else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All set-ups of a checkpoint under one budget, and which are recommended.

    ``lossless`` is what ``swapless run`` does with this budget and no further options, None where that does not fit; ``best``
    is the fastest, where a set-up with fewer bits must be 10 % faster than one with more.
    """

    memory_bytes: int
    context_tokens: int
    hits_from: str
    reads_from: str
    set_ups: tuple[SetUp, ...]
    lossless: SetUp | None
    best: SetUp

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the recommended ones as places in ``set_ups``."""
        found: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        found["set_ups"] = [row.to_dict() for row in self.set_ups]
        places = {"lossless": None if self.lossless is None else self.set_ups.index(self.lossless)}
        return found | places | {"best": self.set_ups.index(self.best)}
