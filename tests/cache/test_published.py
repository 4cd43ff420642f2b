"""Figures of independent implementations, met exactly on the handed traces."""

from __future__ import annotations

import pytest

from swapless.cache.replay import replay
from swapless.trace import read_trace

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def deepseek(data_dir):
    trace = read_trace(data_dir / "traces" / "deepseek-v2-lite.puffin.parquet")
    return trace.rows(trace.document >= 999)


@pytest.mark.parametrize(
    ("policy", "options", "wanted", "within"),
    [
        ("lru", {}, {8: 0.3101, 16: 0.4759, 32: 0.7180}, 5e-5),
        ("lfu", {}, {8: 0.333, 16: 0.507, 32: 0.743}, 1e-3),
        ("belady", {}, {8: 0.4165, 16: 0.6695, 32: 0.8721}, 5e-5),
        ("lru", {"request_model": "single"}, {8: 0.266, 16: 0.449, 32: 0.706}, 5e-4),
        ("lru", {"request_model": "single", "pool": "shared"}, {166: 0.265, 416: 0.447, 832: 0.706}, 5e-4),
    ],
)
def test_deepseek(deepseek, policy, options, wanted, within):
    for capacity, rate in wanted.items():
        assert replay(deepseek, policy, capacity, **options).hit_rate == pytest.approx(rate, abs=within)


def test_gpt_oss(data_dir):
    trace = read_trace(data_dir / "traces" / "gpt-oss-20b.decode.parquet")
    for policy, wanted in (("lru", {8: 0.6518, 16: 0.8978}), ("belady", {8: 0.7735, 16: 0.9508})):
        for capacity, rate in wanted.items():
            assert replay(trace, policy, capacity).hit_rate == pytest.approx(rate, abs=5e-5)
