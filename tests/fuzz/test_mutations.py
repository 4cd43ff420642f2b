"""The tools of the fuzz suites do what the suites rely on."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import pytest

from swapless.errors import UsageError
from tests.fuzz.mutations import bounded, byte_mutations, json_mutations


def _value(document: Any) -> Any:
    return {"doubled": document * 2}


def _ends(how: str) -> None:
    if how == "typed":
        raise UsageError("A wrong argument.")
    if how == "foreign":
        raise KeyError("missing")
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "memory":
        bytearray(4 << 30)[:: 1 << 12] = b"x" * (1 << 20)
    time.sleep(60)


@pytest.mark.slow
def test_a_value_comes_back() -> None:
    outcome = bounded(_value, 21)
    assert (outcome.kind, outcome.value) == ("value", {"doubled": 42}), outcome


@pytest.mark.slow
@pytest.mark.parametrize("how", ["typed", "foreign", "crash", "memory", "slow"])
def test_the_end_of_a_process_is_named(how: str) -> None:
    outcome = bounded(_ends, how, seconds=1.0 if how == "slow" else 20.0)
    assert outcome.kind == how, outcome
    assert outcome.held == (how == "typed")


def test_mutations_are_the_same_for_a_seed_and_differ_from_the_original() -> None:
    document = {"sizes": {"experts": 8, "layers": 3}, "names": ["a", "b"], "scale": 0.5}
    made = json_mutations(document, 60, seed=3)
    assert made == json_mutations(document, 60, seed=3) and len(made) == 60
    text = json.dumps(document).encode()
    assert sum(mutation.raw == text for mutation in made) <= 2
    raw = bytes(range(256)) * 4
    changed = byte_mutations(raw, 40, seed=3)
    assert changed == byte_mutations(raw, 40, seed=3) and all(
        mutation.raw != raw for mutation in changed if "zero" not in mutation.name
    )
