"""What a run did, counted where it happened and never estimated."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counts and times since the load or the last reset.

    ``requests`` and ``hits`` are of decode alone: one a distinct (step, MoE layer, expert), a hit if the expert was resident
    before the step reached that layer. Prefill is given as bytes and reads, since one read serves many tokens. ``read_s`` is
    the time the reader threads were busy (their sum), ``stall_s`` the time the computation waited for them, ``compute_s``
    the rest of the steps' time. Fields that begin with ``decode_`` leave prefill out.

    ``prefill_tokens`` and ``decode_tokens`` are those that became text: neither padding nor tokens computed again for want of
    a cache. Nor are ``taken_back_tokens`` among them: drafts that were not accepted (or not yet), beams that were given up,
    and what was run after a sequence of a batch had ended.

    Of the experts read ahead, ``prefetch_useful`` were there when asked for, ``prefetch_late`` still under way, and
    ``prefetch_wasted`` not asked for. They are no hits: ``hits`` is what the cache held. ``prefetch_tokens`` are the decode
    steps with it on, and ``prefetch_recall`` gives, by MoE layers of lead, the share of their requests that were foreseen.
    ``prefetch_own_s`` is what foreseeing itself took in decode; it is part of ``compute_s`` and of every token's time.

    Reading ahead is tried in turns with and without: ``prefetch_with_s`` and ``prefetch_without_s`` are medians of a token in
    the last whole trial (None before the first), ``prefetch_on`` says whether it is on now, and ``prefetch_times_off`` how
    many trials ended with it off because it cost more than it saved.
    """

    requests: int = 0
    hits: int = 0
    bytes_read: int = 0
    reads: int = 0
    decode_bytes_read: int = 0
    decode_reads: int = 0
    read_s: float = 0.0
    stall_s: float = 0.0
    compute_s: float = 0.0
    decode_stall_s: float = 0.0
    decode_s: float = 0.0
    prefill_s: float = 0.0
    first_token_s: float | None = None
    prefill_tokens: int = 0
    decode_tokens: int = 0
    taken_back_tokens: int = 0
    steps: int = 0
    waves: int = 0
    prefetch_reads: int = 0
    prefetch_useful: int = 0
    prefetch_late: int = 0
    prefetch_wasted: int = 0
    prefetch_tokens: int = 0
    prefetch_on: bool = False
    prefetch_recall: dict[int, float] = field(default_factory=dict)
    prefetch_own_s: float = 0.0
    prefetch_with_s: float | None = None
    prefetch_without_s: float | None = None
    prefetch_times_off: int = 0
    peak_memory_bytes: int = 0
    peak_memory_source: str = "unknown"

    @property
    def hit_rate(self) -> float | None:
        """Hits over requests in decode, None before the first."""
        return self.hits / self.requests if self.requests else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Decoded tokens over the time of their steps, None before the first."""
        return self.decode_tokens / self.decode_s if self.decode_s else None

    @property
    def prefetch_own_s_per_token(self) -> float | None:
        """Time that foreseeing took a decode step with it on, None before the first."""
        return self.prefetch_own_s / self.prefetch_tokens if self.prefetch_tokens else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the derived rates included."""
        rates = ("hit_rate", "decode_tokens_per_s", "prefetch_own_s_per_token")
        return asdict(self) | {name: getattr(self, name) for name in rates}
