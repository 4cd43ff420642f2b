"""One thread, since the number of threads changes the last bits; and the sweep's own lines in pytest's summary."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SWEPT = pytest.StashKey[dict[str, list[str]]]()
"""Family to the layouts that agreed in every bit."""


SWEPT_PACKED = pytest.StashKey[dict[str, list[int]]]()
"""Family to the bits in which its packed store stayed within the bounds."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SWEPT], config.stash[SWEPT_PACKED] = {}, {}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def swept(request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """Where the sweep notes what agreed."""
    return request.config.stash[SWEPT]


@pytest.fixture(scope="session")
def swept_packed(request: pytest.FixtureRequest) -> dict[str, list[int]]:
    """Where the packed sweep notes what stayed within the bounds."""
    return request.config.stash[SWEPT_PACKED]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    swept, packed = config.stash.get(SWEPT, {}), config.stash.get(SWEPT_PACKED, {})
    if packed:
        both = sum(len(bits) == 2 for bits in packed.values())
        terminalreporter.write_sep("-", f"{both} families packed in 8 and 4 bits stayed within the bounds")
    if not swept:
        return
    from tests.families.tiny import NOT_RUN

    both = sum(len(layouts) == 2 for layouts in swept.values())
    terminalreporter.write_sep("-", "families against eager transformers")
    terminalreporter.write_line(f"{both} families bit-identical on both layouts; not run, and why:")
    for name, reason in NOT_RUN.items():
        terminalreporter.write_line(f"  {name}: {reason}")
