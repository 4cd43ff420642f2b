"""What compiled code is given: every shape and range that it trusts is refused where it is wrong, and only there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from swapless.arrays import want, want_ids, want_offsets
from swapless.errors import UsageError

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        ([1, 2], "wrong type"),
        (None, "wrong type"),
        (np.zeros((2, 3), np.int64), "wrong type"),
        (np.zeros((2, 3), ">i2"), "wrong type"),
        (np.zeros((2, 3), object), "wrong type"),
        (np.zeros(6, np.int16), "wrong shape"),
        (np.zeros((2, 4), np.int16), "wrong shape"),
        (np.zeros((0, 2), np.int16), "wrong shape"),
    ],
)
def test_another_type_or_shape_is_refused(array, problem):
    with pytest.raises(UsageError, match=f"ids has the {problem}"):
        want(array, "ids", np.int16, (None, 3))


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (1, 3)])
def test_what_fits_is_handed_back_as_it_is(shape):
    array = np.zeros(shape, np.float32)
    assert want(array, "x", (np.int16, np.float32), (None, 3)) is array


def plain_wrong(ids: np.ndarray, num_experts: int) -> bool:
    """The rule, from the definition."""
    for row in ids.reshape(-1, ids.shape[-1]).tolist() if ids.size else []:
        named = [expert for expert in row if expert != -1]
        if len(set(named)) != len(named) or any(not 0 <= expert < num_experts for expert in named):
            return True
    return False


@settings(max_examples=60, deadline=None)
@given(
    ids=npst.arrays(np.int16, npst.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=3), elements=st.integers(-2, 4)),
    num_experts=st.integers(0, 4),
)
def test_ids_are_refused_exactly_where_they_cannot_be(ids, num_experts):
    if plain_wrong(ids, num_experts):
        with pytest.raises(UsageError, match="index"):
            want_ids(ids, num_experts)
    else:
        assert want_ids(ids, num_experts) is ids


def test_the_place_and_the_value_are_named():
    ids = np.zeros((2, 3, 2), np.int32)
    ids[..., 1] = 1
    ids[1, 2, 1] = 4
    with pytest.raises(UsageError, match=r"out of range.*\[1, 2, 1\].*Got: 4.*0 to 3"):
        want_ids(ids, 4)
    ids[1, 2, 1] = 0
    with pytest.raises(UsageError, match=r"twice.*\[1, 2, 1\].*Got: 0"):
        want_ids(ids, 4)
    assert want_ids(ids, 4, distinct=False) is ids


@pytest.mark.parametrize("ids", [np.zeros((2, 2)), np.zeros(2, np.uint16), np.zeros((), np.int16)])
def test_ids_are_signed_integers_with_an_axis(ids):
    with pytest.raises(UsageError):
        want_ids(ids, 4)


@pytest.mark.parametrize("offsets", [[], [-1, 2], [0, 5], [0, 3, 2, 4], [4, 0]])
def test_offsets_that_do_not_cut_are_refused(offsets):
    with pytest.raises(UsageError, match="parts"):
        want_offsets(np.array(offsets, np.int64), 4)


@pytest.mark.parametrize("offsets", [[0], [0, 4], [0, 0, 4, 4], [1, 3]])
def test_offsets_that_cut_are_not(offsets):
    assert want_offsets(np.array(offsets, np.int64), 4).tolist() == offsets


@pytest.mark.slow
def test_no_loop_leaves_its_arrays():
    """The smallest shapes, and twins on random traces, with every index of compiled code asked whether it lies within."""
    names = ("cache/test_edges", "cache/test_contract", "predict/test_edges", "locality/test_exact", "oracle/test_scans")
    files = [str(TESTS / f"{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, cwd=TESTS.parent, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
def test_an_index_outside_would_be_found():
    script = """
import numpy as np
from swapless.cache.ring import renew
ring = np.arange(4, dtype=np.uint32)
renew(ring, ring, np.uint64(70), np.uint64(1))
"""
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=environment)
    assert "IndexError" in done.stderr
