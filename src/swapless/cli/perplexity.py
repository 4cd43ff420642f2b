"""``swapless perplexity``: what fewer bits cost, in the state that decoding is in."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from swapless.cli import _options as options
from swapless.cli import early
from swapless.cli.out import Out, ProgressCall
from swapless.cli.session import open_model, open_tokenizer, rate, share, size
from swapless.errors import UsageError, message

__all__ = ["Text", "measure", "perplexity", "read_text", "say_if_few"]

LEAST_TOKENS = 1000
"""Fewer scored tokens are told to be few: the figure then says more of the text than of the model."""


class Text(NamedTuple):
    """A text, and the SHA-256 of its file."""

    text: str
    sha256: str


def perplexity(
    checkpoint: options.Checkpoint,
    text: Annotated[Path, typer.Option(metavar="FILE", help="The text, UTF-8.")],
    tokens: Annotated[int | None, typer.Option(metavar="N", min=1, help="Score so many tokens, and no more.")] = None,
    memory: options.Memory = None,
    resident: options.Resident = None,
    context: options.Context = None,
    threads: options.Threads = None,
    check: options.Check = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Perplexity of a text, decoded token by token.

    The text is cut into windows of the context. The figure does not depend on the memory, only the time does.
    """
    options.exclusive(memory=memory, resident=resident)
    given = read_text(text)
    early.checkpoint(checkpoint)
    out = Out(as_json=as_json, quiet=quiet)
    budget = {"memory": memory, "resident": resident} if memory or resident else {"memory": "auto"}
    figures = measure(checkpoint, given, tokens, out, context=context, threads=threads, check=check, **budget)
    out.document({"checkpoint": checkpoint, "text": str(text)} | figures)
    out.text(f"{figures['perplexity']:.4f}")
    windows = f"{figures['windows']} window{'s' if figures['windows'] > 1 else ''}"
    out.facts(
        [
            ("scored", f"{figures['tokens']} tokens in {windows} of at most {figures['context_tokens']}"),
            ("loss", f"{figures['nats_per_token']:.4f} nats a token"),
            ("speed", f"{rate(figures['tokens_per_s'])} tok/s, hit rate {share(figures['hit_rate'])}"),
            ("peak memory", size(figures["peak_memory_bytes"])),
        ],
        aside=True,
    )
    say_if_few(figures, out)


def say_if_few(figures: dict[str, Any], out: Out) -> None:
    """Say that a figure of a handful of tokens is hardly one of the model."""
    if figures["tokens"] < LEAST_TOKENS:
        out.note(f"Note: {figures['tokens']} tokens say little of a model; {LEAST_TOKENS:,} would do.")


def read_text(path: Path) -> Text:
    """The text of a file.

    Raises
    ------
    UsageError
        No such file, not UTF-8, or nothing but space in it.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise UsageError(message("The text cannot be read.", got=path, step=f"{error.strerror}.")) from None
    except UnicodeDecodeError as error:
        raise UsageError(message("The file is not UTF-8 text.", where=path, got=str(error))) from None
    if not text.strip():
        raise UsageError(message("The text is empty.", where=path, got=f"{len(data)} bytes", step="Give a text to score."))
    return Text(text, hashlib.sha256(data).hexdigest())


def measure(checkpoint: str, text: Text, tokens: int | None, out: Out, **budget: Any) -> dict[str, Any]:
    """Load ``checkpoint`` and score ``text``: the figures as one flat document.

    Raises
    ------
    CheckpointError
        As :func:`swapless.load`; also where there is no tokenizer.
    UsageError
        The text has too few tokens.
    """
    tokenizer = open_tokenizer(checkpoint)
    with open_model(checkpoint, out, **budget) as model, out.progress() as progress:
        from swapless.runtime.perplexity import perplexity as run

        found = run(model, tokenizer, text.text, most_tokens=tokens, progress=_told(progress))
        stats = model.swapless.stats()
    return found.to_dict() | {
        "text_sha256": text.sha256,
        "tokens_per_s": stats.decode_tokens_per_s,
        "hit_rate": stats.hit_rate,
        "decode_bytes_read": stats.decode_bytes_read,
        "peak_memory_bytes": stats.peak_memory_bytes,
    }


def _told(progress: ProgressCall) -> Any:
    return lambda done, total: progress(f"{done} of {total} tokens", done / total)
