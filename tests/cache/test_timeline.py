"""Time on a device, against what can be worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from swapless.cache.capacity import pools_for
from swapless.cache.devices import DeviceProfile, device_profile, device_profiles
from swapless.cache.foresight import Foresight, clairvoyant
from swapless.cache.replay import replay
from swapless.cache.timeline import BlockTime, staging_room, timeline
from swapless.errors import DeviceProfileError, UnknownNameError, UsageError
from swapless.trace import Trace
from tests.cache.made import made_trace
from tests.cache.timeline_twin import slow_timeline

BLOCK = BlockTime(attention_s=2.0, shared_s=1.0, expert_s=0.5)


def device(**figures):
    return DeviceProfile(name="made", **{"bytes_per_s": 1.0, "fixed_s": 0.0, "queue_depth": 1, **figures})


@pytest.fixture(scope="module")
def trace():
    return made_trace(scores=False)


def one_token(trace):
    return trace.rows(slice(0, 1))


@pytest.mark.slow
def test_a_link_that_costs_nothing_leaves_compute(trace):
    found = timeline(trace, "lru", 3, device(bytes_per_s=1e30), block=BLOCK, expert_bytes=4)
    assert found.seconds == pytest.approx(len(trace) * 3 * (2 + 1 + 2 * 0.5))
    assert found.row()["stall_s_per_token"] == pytest.approx(0, abs=1e-9)


def test_one_block_by_hand(trace):
    # Two misses of 4 s each. They are issued after attention (2 s); the shared expert (1 s) runs beside; each expert 0.5 s.
    # Depth 1, fixed 1 s: landings 2 + 1 + 4 = 7 and 7 + 1 + 4 = 12. Depth 2: 7 and 11.
    first = one_token(trace)
    for depth, second in ((1, 12.0), (2, 11.0)):
        found = timeline(first, "lru", 3, device(fixed_s=1.0, queue_depth=depth), block=BLOCK, expert_bytes=4)
        assert found.times.end_s[0] == pytest.approx(3 * (second + 0.5))
        assert found.times.stall_s[0] == pytest.approx(3 * (second + 0.5 - 4.0))


def test_landing_costs_compute_not_the_link(trace):
    # As above at depth 1: landings at 7 and 12. The first is taken in while the second is read, then 2 + 0.5 s for that.
    landing = BlockTime(attention_s=2.0, shared_s=1.0, expert_s=0.5, landing_s=2.0)
    found = timeline(one_token(trace), "lru", 3, device(fixed_s=1.0), block=landing, expert_bytes=4)
    assert found.times.end_s[0] == pytest.approx(3 * 14.5)
    assert found.times.stall_s[0] == pytest.approx(3 * (14.5 - 4.0))


def test_compute_is_slower_beside_reads(trace):
    # As above, at half the pace until 12: the shared expert takes 2 s, the first expert from 7 to 8, the second is alone.
    block = replace(BLOCK, pace_beside_reads=0.5)
    found = timeline(one_token(trace), "lru", 3, device(fixed_s=1.0), block=block, expert_bytes=4)
    assert found.times.end_s[0] == pytest.approx(3 * 12.5)
    # Shared work of 6 s: 5 of the 10 s until 12 at half the pace, the last second alone; then two experts.
    found = timeline(one_token(trace), "lru", 3, device(fixed_s=1.0), block=replace(block, shared_s=6.0), expert_bytes=4)
    assert found.times.end_s[0] == pytest.approx(3 * 14.0)
    assert found.times.stall_s[0] == pytest.approx(3 * (14.0 - 9.0))


def test_reads_are_slower_beside_compute(trace):
    # As above at full pace, reads at half while the shared expert (1 s) and the first expert (0.5 s) are computed: landings at
    # 7.5 and 12.5 + 0.25 = 12.75.
    block = replace(BLOCK, reading_beside_compute=0.5)
    found = timeline(one_token(trace), "lru", 3, device(fixed_s=1.0), block=block, expert_bytes=4)
    assert found.times.end_s[0] == pytest.approx(3 * (12.75 + 0.5))
    both = replace(block, pace_beside_reads=0.5, shared_s=2.0)
    # Shared work of 2 s takes 4 s, until 6, in which reads lose 2 s: landings at 9 and 14. The first expert takes 1 s: 14.5.
    found = timeline(one_token(trace), "lru", 3, device(fixed_s=1.0), block=both, expert_bytes=4)
    assert found.times.end_s[0] == pytest.approx(3 * (14.5 + 0.5))


def test_reads_and_bytes_are_those_of_the_replay(trace):
    counted = replay(trace, "lfu", 3, warmup_tokens=5, expert_bytes=10)
    found = timeline(trace, "lfu", 3, device(), block=BLOCK, warmup_tokens=5, expert_bytes=10)
    assert found.row()["demand_reads"] == counted.requests - counted.hits
    assert found.row()["bytes_moved_per_token"] == pytest.approx(counted.bytes_read_per_token)
    assert found.seconds >= (counted.requests - counted.hits) * 10 - 1e-6


def foresight(trace, *, right=0.8, seed=0, **more):
    """Levels of a predictor that is right more often the surer it is."""
    rng = np.random.default_rng(seed)
    hot = clairvoyant(trace, 1).levels > 0
    levels = np.where(rng.random(hot.shape) < right, hot, rng.random(hot.shape) < 0.2) * rng.integers(1, 4, hot.shape)
    return Foresight(predictor="made", levels=levels.astype(np.uint8), **{"lead": 1, **more})


@pytest.mark.parametrize("figures", [{}, {"bytes_per_s": 8.0}, {"bytes_per_s": 0.5, "fixed_s": 0.3, "queue_depth": 2}], ids=str)
@pytest.mark.parametrize(
    "more",
    [
        None,
        {},
        {"right": 0.3},
        {"lead": 2, "token_s": 0.7},
        {"lead": "token", "width": 3, "staging_experts": 5},
        {"right": 1.0, "lead": 3, "staging_experts": 1},
        {"staging_experts": 0},
    ],
    ids=str,
)
def test_the_slow_twin_says_the_same(trace, figures, more):
    block = replace(BLOCK, landing_s=0.4, pace_beside_reads=0.6, reading_beside_compute=0.7)
    given = None if more is None else foresight(trace, **more)
    for kind, capacity in (("layer", 3), ("shared", 9)):
        pools = pools_for(capacity, 3, 8, 2, kind)
        found = timeline(trace, "lru", pools, device(**figures), block=block, expert_bytes=2, foresight=given).times
        room = given and staging_room(given, trace, device(**figures), block=block, expert_bytes=2)
        slow = slow_timeline(trace, pools, device(**figures), block, 2, given, room)
        fast = zip(found.compute_s, found.stall_s, found.reads, found.useful, found.late, found.wasted)
        for one, other in zip(fast, slow, strict=True):
            assert one == pytest.approx(other, abs=1e-6)
        assert (found.ahead == found.useful + found.late + found.wasted).all()


def test_perfect_foresight_hides_what_idle_time_can_hide(trace):
    without = timeline(trace, "lru", 3, device(), block=BLOCK, expert_bytes=2)
    for lead in (1, 2, "token"):
        ahead = timeline(trace, "lru", 3, device(), block=BLOCK, expert_bytes=2, foresight=clairvoyant(trace, lead))
        row = ahead.row()
        assert ahead.seconds < without.seconds
        assert row["prefetch_wasted"] == 0 and row["prefetch_useful"] > 0 and row["prefetch_late"] > 0
        assert row["demand_reads"] + row["prefetch_reads"] == without.row()["demand_reads"]
        # Overlap turns the sum of compute and reads into the larger of the two at best.
        assert ahead.seconds > max(ahead.times.compute_s.sum(), row["bytes_moved_per_token"] * len(trace)) - 1e-6
        assert without.seconds < 2 * ahead.seconds


def test_bad_foresight_is_found_out_before_it_costs_anything(trace):
    """Experts that are never chosen, foreseen with certainty: where the link is slow, none is ever read."""
    wrong = np.where(clairvoyant(trace, 1).levels, 0, 255).astype(np.uint8)
    given = Foresight(predictor="wrong", lead=1, levels=wrong)
    row = timeline(trace, "lru", 3, device(), block=BLOCK, expert_bytes=8, foresight=given).row()
    assert row["prefetch_reads"] == 0


def test_a_read_ahead_begins_where_it_should_save_more_than_it_wastes(trace):
    """One MoE layer ahead of an idle link, 1 s of it before the next demand read: p against the share left over, by hand."""
    ids = np.tile(np.array([[[0, 1]]], np.int16), (200, 3, 1))
    ids[::2, 1:] += 2  # every expert of the later layers is wanted every other token
    half = Trace.from_arrays(trace.header, expert_ids=ids)
    given = Foresight(predictor="half", lead=1, levels=np.full((200, 3, 8), 7, np.uint8), width=2)
    block = BlockTime(attention_s=1.0, shared_s=0.0, expert_s=0.0)

    def read_ahead(seconds):
        # C = K: what is resident is what the last token chose, and what is wanted now is always among the six others.
        found = timeline(half, "lru", 2, device(bytes_per_s=1 / seconds), block=block, expert_bytes=1, foresight=given)
        return int(found.times.ahead[100:].sum())

    # Six experts of each MoE layer are not resident; two of them are wanted in layers 1 and 2, none in layer 0: of 18, 4.
    share = 4 / 18
    assert read_ahead(1.0 / (1 - share) - 0.1) > 0
    assert read_ahead(1.0 / (1 - share) + 0.1) == 0


def test_what_predicting_takes_is_compute(trace):
    plain = timeline(trace, "lru", 3, device(), block=BLOCK, expert_bytes=2)
    idle = {"levels": np.zeros((len(trace), 3, 8), np.uint8), "predictor": "blank", "token_s": 0.6}
    for lead, passes in ((1, 3), (2, 2), ("token", 1)):
        given = Foresight(lead=lead, **idle)
        assert given.passes() == passes
        found = timeline(trace, "lru", 3, device(), block=BLOCK, expert_bytes=2, foresight=given)
        assert found.times.compute_s.sum() == pytest.approx(plain.times.compute_s.sum() + 0.6 * len(trace))
        assert plain.seconds < found.seconds <= plain.seconds + 0.6 * len(trace) + 1e-6
        assert found.row()["predictor_s_per_token"] == 0.6


def test_room_is_what_the_link_can_use(trace):
    """A block computes 4 s (attention 2, shared 1, K = 2 experts of 0.5)."""
    for read_s, lead, room in ((8, 1, 2), (8, 2, 4), (4, 3, 4), (1e-6, 1, 2), (1e-6, "token", 4)):
        given = clairvoyant(trace, lead)
        assert staging_room(given, trace, device(bytes_per_s=1 / read_s), block=BLOCK, expert_bytes=1) == room
    wide = made_trace(scores=False, experts=12, top_k=6)  # computes 6 s
    for read_s, room in ((7, 2), (5, 3), (2, 4), (0.1, 6)):
        assert staging_room(clairvoyant(wide, 1), wide, device(bytes_per_s=1 / read_s), block=BLOCK, expert_bytes=1) == room
    assert staging_room(clairvoyant(wide, 1, staging_experts=9), wide, device(), expert_bytes=1) == 9


def test_room_comes_out_of_the_slots():
    pools, taken = pools_for(0.5, 3, 8, 2).less(4, 2)
    assert (pools.pool_slots, taken, pools.capacity_experts) == ([3, 3, 2], 4, 4)
    assert pools_for(3, 3, 8, 2).less(10, 2)[1] == 3  # K a layer stay
    pools, taken = pools_for(9, 3, 8, 2, "shared").less(4, 2)
    assert (pools.pool_slots, taken) == ([5], 4)


def test_every_profile_has_a_source():
    for profile in device_profiles().values():
        assert profile.source
    assert device_profile("nvme gen4").bytes_per_s == 5e9
    with pytest.raises(UnknownNameError, match="Did you mean 'NVMe Gen4'"):
        device_profile("NVMe Gn4")


@pytest.mark.parametrize("figures", [{"bytes_per_s": 0}, {"bytes_per_s": math.inf}, {"fixed_s": -1}, {"queue_depth": 0}])
def test_a_profile_that_cannot_be_is_refused(figures):
    with pytest.raises(DeviceProfileError, match=next(iter(figures))):
        device(**figures)


def test_wrong_arguments_are_refused(trace):
    for levels in (np.zeros((1, 3, 8), np.uint8), np.zeros((len(trace), 3, 8), np.float32)):
        with pytest.raises(UsageError, match="shape or type"):
            timeline(trace, "lru", 3, device(), foresight=Foresight(predictor="made", lead=1, levels=levels))
    for wrong in ({"lead": 0}, {"width": 0}, {"staging_experts": -1}, {"token_s": -1.0}):
        with pytest.raises(UsageError, match=f"{next(iter(wrong))} .* at least"):
            foresight(trace, **wrong)
    for name in ("pace_beside_reads", "reading_beside_compute"):
        for share in (0.0, 1.5):
            with pytest.raises(UsageError, match="above 0 and at most 1"):
                BlockTime(**{name: share})
    for name in ("expert_s", "landing_s"):
        with pytest.raises(UsageError, match="at least 0"):
            BlockTime(**{name: -1.0})


def test_rows_are_json(trace):
    json.dumps(timeline(trace, "lru", 3, device(), expert_bytes=1).row())
