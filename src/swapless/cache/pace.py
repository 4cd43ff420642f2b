"""How reads slow the compute that goes on beside them: one rule for the timeline and for what a plan expects."""

from __future__ import annotations

from swapless.cache.compiled import compiled


@compiled
def computed(begun: float, work_s: float, reading_until: float, pace: float) -> float:
    """When ``work_s`` seconds of work begun at ``begun`` are done, if reads slow them to ``pace`` until ``reading_until``."""
    beside = max(reading_until - begun, 0.0)
    if work_s <= beside * pace:
        return begun + work_s / pace
    return begun + beside + (work_s - beside * pace)
