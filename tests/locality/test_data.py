"""Figures of the handed traces that are known from elsewhere."""

from __future__ import annotations

import subprocess
import sys

import pytest

from swapless.cache.curves import hit_rate_curves
from swapless.locality import reuse, sch_lookahead, srp
from swapless.trace import read_trace, select


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "documents", "lru", "belady"),
    [
        (
            "deepseek-v2-lite.puffin",
            "999-1998",
            {8: 0.3101, 16: 0.4759, 32: 0.7180},
            {8: 0.4165, 16: 0.6695, 32: 0.8721},
        ),
        ("gpt-oss-20b.decode", "0-9999", {8: 0.6518, 16: 0.8978}, {8: 0.7735, 16: 0.9508}),
    ],
)
def test_curves_of_an_engine_whose_cache_outlives_documents(data_dir, name, documents, lru, belady):
    trace = select(read_trace(data_dir / "traces" / f"{name}.parquet"), documents=documents)
    curves = hit_rate_curves(trace, ["lru", "belady"], requests="token", kept=True)
    for curve, known in zip(curves, (lru, belady)):
        mean = curve.rate("miss").mean(axis=0)
        assert {capacity: round(float(mean[capacity - 1]), 4) for capacity in known} == known


@pytest.mark.data
def test_deepseek_is_as_local_as_the_paper_finds_it(data_dir):
    """The paper's texts differ, so only within two points: SRP at 4..256 tokens, SCH 16 and overlap."""
    trace = read_trace(data_dir / "traces" / "deepseek-v2-lite.puffin.parquet")
    values = [float(result.model.value) for result in srp(trace, [4, 16, 64, 256])]
    assert values == pytest.approx([0.5321, 0.3792, 0.3068, 0.2692], abs=0.02)
    assert sch_lookahead(trace, 16, level="model")[0].rate()[0, 2 * 26 * 6 - 1] == pytest.approx(0.581, abs=0.02)
    again = reuse(trace)
    assert again.shared.sum() / again.could_share.sum() == pytest.approx(0.265, abs=0.002)


def test_importing_needs_no_compiler():
    heavy = "{'torch', 'transformers', 'numba'} & set(sys.modules)"
    code = f"import sys, swapless.trace, swapless.locality, swapless.cache.curves; print({heavy} or 'none')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "none\n"
