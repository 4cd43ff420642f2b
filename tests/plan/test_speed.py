"""Time of a token from hits and misses, against the timeline and by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from swapless.cache.devices import DeviceProfile
from swapless.cache.replay import replay
from swapless.cache.timeline import BlockTime, timeline
from swapless.plan.speed import Costs, Rehearsal, binomial, speed, speed_ahead
from tests.cache.made import made_trace


def costs(**figures) -> Costs:
    given = {"num_moe_layers": 3, "top_k": 2, "other_s": 6.0, "expert_s": 0.5, "lone_expert_s": 0.5}
    return Costs(**given | {"read_bytes": 4, "parts": 1, "bytes_per_s": {1: 2.0}} | figures)


@pytest.mark.slow
@pytest.mark.parametrize("bytes_per_s", [0.5, 2.0, 4.0, 100.0])
def test_a_replay_s_misses_take_what_the_timeline_says(bytes_per_s):
    trace = made_trace(scores=False)
    found = replay(trace, "lru", 3)
    missed = (found.tally.requests - found.tally.hits).reshape(-1)
    misses = np.bincount(missed, minlength=3) / len(missed)
    block = BlockTime(attention_s=1.5, shared_s=0.5, expert_s=0.5)
    device = DeviceProfile(name="made", bytes_per_s=bytes_per_s)
    slow = timeline(trace, "lru", 3, device, block=block, expert_bytes=4)
    # The shared expert is computed while reads are under way; a plan does not know of it and takes it as before them.
    plain = timeline(trace, "lru", 3, device, block=BlockTime(attention_s=2.0, shared_s=0, expert_s=0.5), expert_bytes=4)
    ours = speed(costs(bytes_per_s={1: bytes_per_s}), misses)
    assert ours.tokens_per_s == pytest.approx(plain.tokens_per_s)
    assert ours.tokens_per_s <= slow.tokens_per_s * (1 + 1e-9)
    assert ours.bytes_a_token == pytest.approx(plain.row()["bytes_moved_per_token"])


def test_by_hand():
    # A layer of two misses: reads end at 2 and 4 s, the second is computed till 4.5; 2 s of all else before.
    found = speed(costs(), np.array([0.0, 0.0, 1.0]))
    assert found.token_s == pytest.approx(3 * (2 + 4.5))
    assert found.compute_s == pytest.approx(3 * (2 + 1))
    assert found.floor_s == pytest.approx(3 * 4), "12 s of bytes are more than 9 s of compute"
    assert speed(costs(), np.array([1.0, 0, 0])).token_s == pytest.approx(9)


def test_what_has_landed_is_computed_in_one_call():
    # One expert takes 2 s by itself, and each more in the same call 1 s: (2 + 1) / 2 = 1.5 s an expert where both are there.
    given = costs(expert_s=1.5, lone_expert_s=2.0, top_k=2)
    assert [given.together_s(experts) for experts in range(4)] == pytest.approx([0, 2, 3, 4])
    # A read takes 2 s. A resident is computed till 2 s, when the one miss has just landed.
    assert given.layer_s(1, 1) == pytest.approx(4)
    # A read takes 0.5 s: three residents take 4 s, and both misses wait for the same call then.
    assert costs(expert_s=1.5, lone_expert_s=2.0, bytes_per_s={1: 8.0}).layer_s(3, 2) == pytest.approx(7)
    # Read by read where reading is slower than computing: 2 + 2 = 4 s for the last byte, and one call more.
    assert given.layer_s(0, 2) == pytest.approx(6)


def test_more_reads_in_flight_are_faster_only_where_there_are_so_many():
    deep = costs(bytes_per_s={1: 2.0, 2: 4.0})
    assert deep.reading_s(1) == 2.0 and deep.reading_s(2) == 1.0
    assert costs(bytes_per_s={1: 2.0, 2: 4.0}, parts=2).reading_s(1) == 1.0


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 1.0])
def test_a_hit_rate_spread_over_the_requests_of_a_layer(rate):
    misses = binomial(8, rate)
    assert misses.sum() == pytest.approx(1)
    assert misses @ np.arange(9) == pytest.approx(8 * (1 - rate))


@pytest.mark.parametrize("bytes_per_s", [0.2, 1.0, 2.0, 4.0, 50.0])
@pytest.mark.parametrize("rate", [0.0, 0.4, 0.9])
def test_reading_ahead_never_beats_the_floor_nor_doubles_the_speed(bytes_per_s, rate):
    given, misses = costs(bytes_per_s={1: bytes_per_s}), binomial(2, rate)
    without, ahead = speed(given, misses), speed_ahead(given, misses)
    assert ahead.token_s >= ahead.floor_s
    assert without.token_s / 2 - 1e-9 <= ahead.token_s <= without.token_s + 1e-9 or ahead.token_s == ahead.floor_s
    assert ahead.bytes_a_token >= without.bytes_a_token


def test_reading_ahead_helps_where_the_link_is_idle():
    given, misses = costs(bytes_per_s={1: 4.0}), binomial(2, 0.5)
    assert speed_ahead(given, misses).token_s < speed(given, misses).token_s
    assert speed_ahead(given, binomial(2, 1.0)).token_s == speed(given, binomial(2, 1.0)).token_s


def test_reading_ahead_has_its_price():
    misses = binomial(2, 0.5)
    free, asks = (speed_ahead(costs(bytes_per_s={1: 4.0}, ahead_s=own), misses).token_s for own in (0.0, 0.25))
    assert asks == pytest.approx(free + 0.25)
    dear = costs(bytes_per_s={1: 4.0}, ahead_s=100.0)
    assert speed_ahead(dear, misses).token_s == speed(dear, misses).token_s, "a run goes without then"


def test_the_floor_is_the_fastest_that_was_timed():
    assert speed(costs(bytes_per_s={1: 100.0}, least_compute_s=8.0), binomial(2, 0.5)).floor_s == 8
    assert speed(costs(least_compute_s=8.0), np.array([0.0, 0.0, 1.0])).floor_s == 12, "the bytes are more"


def test_a_rehearsal_is_what_is_expected_and_costs_say_what_differs():
    given, misses = costs(), np.array([0.0, 1.0, 0.0])
    played = Rehearsal(token_s=20.0, misses=misses, bytes_per_s=2.0)
    assert speed(given, misses).token_s == pytest.approx(3 * (2 + 2.5)), "2 s of reading, 0.5 of what was read"
    assert speed(given, misses, played).token_s == pytest.approx(20)
    # Half of the bandwidth: each of the three reads takes 2 s more.
    assert speed(given.at(1.0), misses, played).token_s == pytest.approx(20 + 3 * 2)
    # Two misses instead of one: 4.5 instead of 2.5 s.
    assert speed(given, np.array([0, 0, 1.0]), played).token_s == pytest.approx(20 + 3 * 2)
    assert speed(given, misses, replace(played, token_s=0.1)).token_s == speed(given, misses).floor_s, "never below the floor"


def test_a_rehearsal_of_reading_ahead_is_held_against_one_without():
    given, misses = costs(bytes_per_s={1: 4.0}), binomial(2, 0.5)
    slow, fast = (Rehearsal(token_s=seconds, misses=misses, bytes_per_s=4.0) for seconds in (30.0, 25.0))
    assert speed_ahead(given, misses, rehearsal=fast, without=slow).token_s == pytest.approx(25)
    assert speed_ahead(given, misses, rehearsal=slow, without=fast).token_s == pytest.approx(25), "a run goes without then"
    assert speed_ahead(given, misses, rehearsal=slow, without=slow).token_s == pytest.approx(30)


def test_another_bandwidth_scales_all_of_them():
    found = costs(bytes_per_s={1: 2.0, 2: 4.0}, link_bytes_per_s=5.0).at(8.0)
    assert found.bytes_per_s == {1: 4.0, 2: 8.0} and found.link_bytes_per_s == 10.0
