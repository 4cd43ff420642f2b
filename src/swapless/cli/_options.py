"""Option types that more than one verb takes, so that a name means the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from swapless.atomic import check_output
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


def _policies(begun: str) -> list[str]:
    """Names that the shell may complete."""
    from swapless.cache import POLICIES

    return [name for name in POLICIES.names() if name.startswith(begun)]


def _check(when: str) -> str:
    if when not in ("first", "always", "none"):
        raise UsageError(message("Unknown check.", got=repr(when), allowed="first, always, none"))
    return when


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


def output(option: str, path: Path | None, *, force: bool, inputs: Iterable[object] = ()) -> None:
    """Refuse a file that cannot or may not be written, before anything is computed for it.

    Parameters
    ----------
    option : str
        The option that names the file.
    path : Path or None
        The file; None is no file.
    force : bool
        Whether one that exists may be replaced.
    inputs : iterable of paths
        What the verb reads; None among them is left out.

    Raises
    ------
    UsageError
        Its folder does not exist, it is there already and ``force`` is not given, it is one of the inputs, or is no file.
    WriteError
        Nothing can be written there.
    """
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        folder = "The folder of the page" if option == "--html" else f"The folder for {option}"
        raise UsageError(message(f"{folder} does not exist.", got=path, step="Create it first."))
    check_output(path, force=force, inputs=inputs)


def input_file(what: str, path: Path | None) -> None:
    """Refuse an input that is no file, before anything is loaded: ``what`` as messages say it; None is no input.

    Raises
    ------
    UsageError
        There is no such file, or it is none.
    """
    if path is not None and not path.is_file():
        why = "it is no file" if path.exists() else "there is no such file"
        raise UsageError(message(f"{what} cannot be read: {why}.", got=path))


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
        "--policy",
        metavar="NAME",
        parser=checked(_policy, "NAME"),
        autocompletion=_policies,
        help="Which expert to drop for a new one: lru, lfu, ...",
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
Check = Annotated[
    str | None,
    typer.Option(
        "--check",
        metavar="first|always|none",
        parser=checked(_check, "WHEN"),
        help="Of a packed store: hold each block against its checksum when it is read first, whenever it is read, or never.",
        show_default="first",
    ),
]
MOST_SEED = 2**32 - 1
"""The largest seed that every library takes."""
Seed = Annotated[int, typer.Option(metavar="N", min=0, max=MOST_SEED, help="Seed of the sampling.")]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="Threads to compute with.", show_default="all cores")]
Context = Annotated[int | None, typer.Option(min=1, metavar="TOKENS", help="Most tokens of prompt and answer together.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]
OutPath = Annotated[Path, typer.Option("--out", metavar="PATH", help="File to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that is there already.")]
Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Write one self-contained page with charts.")]
