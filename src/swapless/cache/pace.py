"""What compute and reads take from each other: one rule for the timeline and for what a plan expects.

While both are under way, compute keeps the share ``pace`` of its speed and reads the share ``reading`` of theirs; as soon as
one has nothing left to do, the other has all of its own again. Times are seconds. A landing is when a read is over if nothing
is computed from now on; :func:`landed` moves it by what is computed meanwhile.
"""

from __future__ import annotations

from swapless.cache.compiled import compiled


@compiled
def computed(begun: float, work_s: float, last_landing: float, pace: float, reading: float) -> float:
    """When ``work_s`` of work begun at ``begun`` is done."""
    beside = max(last_landing - begun, 0.0) / reading
    if work_s <= beside * pace:
        return begun + work_s / pace
    return begun + beside + (work_s - beside * pace)


@compiled
def landed(landing: float, begun: float, done: float, reading: float) -> float:
    """When a read lands that would at ``landing``, with compute going on from ``begun`` to ``done``."""
    if landing <= begun:
        return landing
    return min(begun + (landing - begun) / reading, landing + (1.0 - reading) * (done - begun))
