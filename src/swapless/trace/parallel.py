"""Independent pieces of compiled work on all cores: threads, because the kernels release the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from swapless.processors import processors

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[float], None]
"""Called with the share of the work done since the last call."""


def nothing(share: float) -> None:
    """Progress that nobody watches."""


def spread(
    work: Callable[[Item], Result], items: Iterable[Item], *, threads: int | None = None
) -> Iterator[tuple[Item, Result]]:
    """Each item with its result, as they finish; at most two items a thread are in flight, so memory stays bounded.

    The order of finishing varies; sum integers, or place results by their item, so that it never shows in a result.
    """
    workers = threads or processors()
    source = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        running: dict[Future[Any], Item] = {}
        try:
            while True:
                while len(running) < 2 * workers:
                    try:
                        item = next(source)
                    except StopIteration:
                        break
                    running[pool.submit(work, item)] = item
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        finally:
            for future in running:
                future.cancel()
