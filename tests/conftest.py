"""What every test shares: the cache folder, which is not the user's, and the folder of handed data."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores already
os.environ["SWAPLESS_CACHE_DIR"] = str(ROOT / "out" / "cache")


def pytest_configure() -> None:
    # A job begun in the background inherits "ignore Ctrl-C", for itself and all it starts; the tests of Ctrl-C need it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Training lets oneDNN keep a thousand products for the rest of its process, which budgets count: not in the next test."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        if os.environ.get(name) == "1024":
            os.environ[name] = "64"


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is marked slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked ``few(n)``, n sets of parameters spread over all stay; the others are slow tests."""
    sets: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few"):
            sets.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for mine in sets.values():
        (few,) = mine[0].iter_markers("few")
        kept = {number * len(mine) // few.args[0] for number in range(few.args[0])}
        for number, item in enumerate(mine):
            if number not in kept:
                item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def no_lines_of_progress() -> Iterator[None]:
    """What a busy machine makes of the time never shows among the lines that tests count; in processes of their own it may."""
    from swapless.cli import progress

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "LINE_EVERY_S", 1e6)
        yield


@pytest.fixture(scope="module")
def ample_memory() -> str:
    """A budget for ``--memory`` with room for the embedded model, however large the tests before made this process.

    What a process holds already counts in the budget, and a worker that has run a thousand tests holds more than 1 GiB.
    """
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 + 1024}MiB"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data", metavar="DIR", default=None, help="folder of the handed traces and texts, for the tests marked data"
    )


@pytest.fixture(scope="session")
def data_dir(request: pytest.FixtureRequest) -> Path:
    """The folder given as ``--data DIR``; a test marked ``data`` fails without it."""
    given = request.config.getoption("--data")
    if given is None:
        pytest.fail("This test reads the handed data: run make test-data DATA=DIR.")
    folder = Path(given).expanduser().resolve()
    if not (folder / "traces").is_dir():
        pytest.fail(f"No traces/ in the folder given as --data: {folder}.")
    return folder
