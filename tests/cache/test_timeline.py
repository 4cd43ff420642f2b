"""Time on a device, against what can be worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from swapless.cache.devices import DeviceProfile, device_profile, device_profiles
from swapless.cache.replay import replay
from swapless.cache.timeline import BlockTime, timeline
from swapless.errors import DeviceProfileError, UnknownNameError, UsageError
from tests.cache.made import made_trace

BLOCK = BlockTime(attention_s=2.0, shared_s=1.0, expert_s=0.5)


def device(**figures):
    return DeviceProfile(name="made", **{"bytes_per_s": 1.0, "fixed_s": 0.0, "queue_depth": 1, **figures})


@pytest.fixture(scope="module")
def trace():
    return made_trace(scores=False)


def one_token(trace):
    return trace.rows(slice(0, 1))


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


def test_reads_and_bytes_are_those_of_the_replay(trace):
    counted = replay(trace, "lfu", 3, warmup_tokens=5, expert_bytes=10)
    found = timeline(trace, "lfu", 3, device(), block=BLOCK, warmup_tokens=5, expert_bytes=10)
    assert found.row()["demand_reads"] == counted.requests - counted.hits
    assert found.row()["bytes_moved_per_token"] == pytest.approx(counted.bytes_read_per_token)
    assert found.seconds >= (counted.requests - counted.hits) * 10 - 1e-6


def test_perfect_foresight_hides_what_idle_time_can_hide(trace):
    known = np.zeros((len(trace), 3, 8), np.float32)
    np.put_along_axis(known, trace.expert_ids.astype(np.int64), 1.0, axis=2)
    without = timeline(trace, "lru", 3, device(), block=BLOCK, expert_bytes=2)
    ahead = timeline(trace, "lru", 3, device(), block=BLOCK, expert_bytes=2, predicted=known)
    row = ahead.row()
    assert ahead.seconds < without.seconds
    assert row["prefetch_wasted"] == 0 and row["prefetch_useful"] > 0 and row["prefetch_late"] > 0
    assert row["demand_reads"] + row["prefetch_reads"] == without.row()["demand_reads"]
    # Overlap turns the sum of compute and reads into the larger of the two at best.
    assert ahead.seconds > max(ahead.times.compute_s.sum(), row["bytes_moved_per_token"] * len(trace)) - 1e-6
    assert without.seconds < 2 * ahead.seconds


def test_bad_foresight_is_charged(trace):
    wrong = np.ones((len(trace), 3, 8), np.float32)
    np.put_along_axis(wrong, trace.expert_ids.astype(np.int64), 0.0, axis=2)
    row = timeline(trace, "lru", 3, device(), block=BLOCK, expert_bytes=1, predicted=wrong).row()
    assert row["prefetch_useful"] == row["prefetch_late"] == 0
    assert row["prefetch_wasted"] == row["prefetch_reads"] > 0


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
    with pytest.raises(UsageError, match="shape"):
        timeline(trace, "lru", 3, device(), predicted=np.zeros((1, 3, 8), np.float32))
    with pytest.raises(UsageError, match="at least 1"):
        timeline(trace, "lru", 3, device(), lead=0)
    for name in ("expert_s", "landing_s"):
        with pytest.raises(UsageError, match="at least 0"):
            BlockTime(**{name: -1.0})


def test_rows_are_json(trace):
    json.dumps(timeline(trace, "lru", 3, device(), expert_bytes=1).row())
