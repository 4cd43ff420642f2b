"""Local routing consistency: published measures as pure functions from a trace to a small result, one file each.

Importing this package does not import numba; a measure does when it is first called.
"""

from __future__ import annotations

from swapless.locality.balance import BalanceResult, balance
from swapless.locality.chance import floor_srp, shuffled_trace, uniform_srp, uniform_trace
from swapless.locality.reuse import ReuseResult, reuse
from swapless.locality.sch import sch_lookahead, sch_static
from swapless.locality.specialization import domain_specialization, vocabulary_specialization
from swapless.locality.srp import SrpResult, srp

__all__ = [
    "BalanceResult",
    "ReuseResult",
    "SrpResult",
    "balance",
    "domain_specialization",
    "floor_srp",
    "reuse",
    "sch_lookahead",
    "sch_static",
    "shuffled_trace",
    "srp",
    "uniform_srp",
    "uniform_trace",
    "vocabulary_specialization",
]
