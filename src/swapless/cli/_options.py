"""Option types that more than one verb takes, so that a name means the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from swapless.errors import UnknownNameError, UsageError, message
from swapless.units import parse_share, parse_size

Value = TypeVar("Value")


def checked(parse: Callable[[str], Value], name: str) -> Callable[[str], Value]:
    """``parse`` as an option's parser: its usage errors become the command line's own (exit code 2)."""

    def parser(text: str) -> Value:
        try:
            return parse(text)
        except UsageError as error:
            raise typer.BadParameter(str(error)) from None

    parser.__name__ = name
    return parser


def _budget(text: str) -> int | str:
    return text if text == "auto" else parse_size(text)


def _policy(name: str) -> str:
    from swapless.cache import POLICIES

    if name not in POLICIES.names():
        raise UnknownNameError.of("policy", name, POLICIES.names())
    return name


def exclusive(**given: Any) -> None:
    """Refuse more than one of several options.

    Raises
    ------
    UsageError
        More than one is set.
    """
    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value not in (None, False)]
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)} exclude each other. Give one of them.")


def folder_of_page(html: Path | None) -> None:
    """Refuse a page whose folder does not exist, before anything is computed for it.

    Raises
    ------
    UsageError
        There is no such folder.
    """
    if html is not None and not html.absolute().parent.is_dir():
        raise UsageError(message("The folder of the page does not exist.", got=html.parent))


def set_threads(threads: int | None) -> None:
    """Let torch compute with so many threads; None leaves it as it is and does not import torch."""
    if threads:
        import torch

        torch.set_num_threads(threads)


Checkpoint = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder, or the id of one on the hub.")]
Memory = Annotated[
    Any,
    typer.Option(
        "--memory",
        metavar="SIZE",
        parser=checked(_budget, "SIZE"),
        help="What the whole process may hold, as 8GiB or 8GB, or 'auto' for what is free.",
    ),
]
MemorySize = Annotated[
    Any,
    typer.Option(
        "--memory", metavar="SIZE", parser=checked(parse_size, "SIZE"), help="What the whole process may hold, as 8GiB or 8GB."
    ),
]
Resident = Annotated[
    Any,
    typer.Option(
        "--resident",
        metavar="SHARE",
        parser=checked(parse_share, "SHARE"),
        help="Share of the experts to keep in memory, as 25% or 0.25, in place of --memory.",
    ),
]
Policy = Annotated[
    str,
    typer.Option(
        "--policy", metavar="NAME", parser=checked(_policy, "NAME"), help="Which expert to drop for a new one: lru, lfu, ..."
    ),
]
Prefetch = Annotated[
    str,
    typer.Option(
        metavar="auto|none|gate|FILE",
        help="Read ahead: 'gate' asks the next MoE layer's router in advance, 'gate:2' the next two, 'auto' where it leaves "
        "the cache its slots; a FILE of predict train.",
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the sampling.")]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="Threads to compute with.", show_default="all cores")]
Context = Annotated[int | None, typer.Option(min=1, metavar="TOKENS", help="Most tokens of prompt and answer together.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]
OutPath = Annotated[Path, typer.Option("--out", metavar="PATH", help="File to write.")]
