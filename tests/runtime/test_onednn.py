"""The code that oneDNN keeps of products is bounded, whoever computes the first one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fresh import numbers_of

SHAPES = 500
PROGRAM = f"""
import torch
import swapless
import torch.nn.functional as F

def anonymous_mib():
    resident, shared = open("/proc/self/statm").read().split()[1:3]
    return (int(resident) - int(shared)) * 4096 / 2**20

torch.set_num_threads(1)
weight, rows = torch.zeros(96, 64, dtype=torch.bfloat16), torch.zeros({SHAPES}, 64, dtype=torch.bfloat16)
F.linear(rows[:1], weight)
before = anonymous_mib()
for count in range(2, {SHAPES} // 2):
    F.linear(rows[:count], weight)
half = anonymous_mib()
for count in range({SHAPES} // 2, {SHAPES}):
    F.linear(rows[:count], weight)
print(half - before, anonymous_mib() - half)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is told by Linux's /proc")
def test_products_of_many_shapes_take_no_more_memory_than_those_of_some() -> None:
    own = {
        name: value
        for name, value in os.environ.items()
        if name not in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, env=own)
    assert done.returncode == 0, done.stderr
    first, more = map(float, done.stdout.split())
    assert first < 100, "64 shapes and no more"
    assert more < 24, "what is new takes the place of what is old"


FORESEEN = """
import torch
import torch.nn.functional as F

import swapless
from swapless.runtime.allocator import pages_of_their_own
from swapless.runtime.memory import MemoryMeter
from swapless.runtime.product_code import product_code_bytes

torch.set_num_threads(1)
foreseen = product_code_bytes(torch.bfloat16, 1024, 256, 4096)
weight, values = torch.zeros(1024, 256, dtype=torch.bfloat16), torch.zeros(1000, 256, dtype=torch.bfloat16)
pages_of_their_own(True)
meter = MemoryMeter()
with torch.no_grad():
    F.linear(values, weight)
    before = meter.anonymous_bytes()
    for rows in range(500, 1000):
        F.linear(values[:rows], weight)
print(foreseen, meter.anonymous_bytes() - before)
"""


@pytest.mark.slow
def test_a_budget_holds_what_products_of_many_shapes_come_to() -> None:
    foreseen, held = numbers_of(FORESEEN)
    assert held <= foreseen + (8 << 20), "some were there already"
    assert foreseen <= 2 * held + (16 << 20)


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from swapless import onednn

    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.setenv("LRU_CACHE_CAPACITY", str(onednn.FEW))
    onednn.keep_few()
    assert onednn.kept() == 7
    onednn.keep_many()
    assert onednn.kept() == 7 and os.environ["LRU_CACHE_CAPACITY"] == "1024"
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    assert onednn.kept() == 1024, "what oneDNN takes by itself"
