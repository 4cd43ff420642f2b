"""``swapless record``: the routing of a live model, as a trace."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from swapless.cache import DEFAULT_POLICY
from swapless.cli import _options as options
from swapless.cli import early
from swapless.cli.out import Out
from swapless.cli.session import open_model, open_tokenizer
from swapless.errors import UsageError, message

__all__ = ["record"]


def record(
    checkpoint: options.Checkpoint,
    out_path: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the trace goes (.parquet).")],
    force: options.Force = False,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="One document: a text file.")] = None,
    corpus: Annotated[
        Path | None, typer.Option(metavar="PARQUET", help="A document a row: column text, and domain if there is one.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="A document a line.")] = None,
    decode: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Read each document in one go and generate N tokens after it; 0 only reads.",
            show_default="the document itself, token by token",
        ),
    ] = None,
    documents: Annotated[int | None, typer.Option(metavar="N", min=1, help="Stop after so many documents.")] = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", min=1, help="Cut a document after so many tokens.")] = None,
    scores: Annotated[bool, typer.Option("--scores", help="Keep the router's output for every expert.")] = False,
    memory: options.Memory = None,
    resident: options.Resident = None,
    context: options.Context = None,
    threads: options.Threads = None,
    policy: options.Policy = DEFAULT_POLICY,
    check: options.Check = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Record which experts a model routes to.

    Every document is decoded token by token, as an answer is, so that the trace has the decode steps that simulate and plan
    judge. --decode 0 is faster and has none.
    """
    options.exclusive(memory=memory, resident=resident)
    inputs = {"The text": text, "The corpus": corpus, "The file of prompts": prompts}
    given = {name: path for name, path in inputs.items() if path is not None}
    if len(given) != 1:
        raise UsageError("Give exactly one of --text, --corpus and --prompts.")
    for name, path in given.items():
        options.input_file(name, path)
    options.output("--out", out_path, force=force, inputs=(checkpoint, *given.values()))
    early.checkpoint(checkpoint)
    out = Out(as_json=as_json, quiet=quiet)
    total = min(_count(text, corpus, prompts), documents or sys.maxsize)
    budget = {"memory": memory, "resident": resident} if memory or resident else {"memory": "auto"}
    with open_model(str(checkpoint), out, threads=threads, policy=policy, context=context, check=check, **budget) as model:
        from swapless.runtime.record import record as run

        with out.progress() as progress:
            rows = run(
                model,
                open_tokenizer(str(checkpoint)),
                _documents(text, corpus, prompts, documents),
                out_path,
                decode_tokens=decode,
                max_tokens=max_tokens,
                scores=scores,
                progress=lambda done, tokens: progress(
                    f"{int(done)} of {total} documents, {tokens:,} tokens", min(1.0, done / max(1, total))
                ),
            )
    out.document({"trace": str(out_path), "tokens": rows})
    out.text(f"{out_path}: {rows:,} tokens")
    if decode == 0:
        out.note("It has no decode steps: locality measures it, simulate and plan cannot.")


def _count(text: Path | None, corpus: Path | None, prompts: Path | None) -> int:
    """How many documents there are, without reading all of them.

    Raises
    ------
    UsageError
        None, or a corpus without a column of texts.
    """
    if corpus is not None:
        import pyarrow as pa

        from swapless.trace.parquet import open_parquet

        with open_parquet(corpus) as file:
            columns = {field.name: field.type for field in file.schema_arrow}
            if "text" not in columns:
                raise UsageError(message("The corpus has no column text.", where=corpus, got=", ".join(columns)))
            for name in ("text", "domain"):
                kind = columns.get(name, pa.string())
                held = kind.value_type if pa.types.is_dictionary(kind) else kind
                if held not in (pa.string(), pa.large_string(), pa.string_view()):
                    what = f"The column {name} of the corpus does not hold texts."
                    raise UsageError(message(what, where=corpus, got=str(kind), allowed="string"))
            found = file.metadata.num_rows
    else:
        found = sum(1 for _ in _all(text, None, prompts))
    if not found:
        raise UsageError(message("There is no document to record.", where=corpus or prompts or text, got="an empty file"))
    return found


def _documents(text: Path | None, corpus: Path | None, prompts: Path | None, most: int | None) -> Iterator[Any]:
    from itertools import islice

    return islice(_all(text, corpus, prompts), most)


def _all(text: Path | None, corpus: Path | None, prompts: Path | None) -> Iterator[Any]:
    from swapless.runtime.record import Document

    if text is not None:
        yield Document(_read(text))
    elif prompts is not None:
        yield from (Document(line) for line in _read(prompts).splitlines() if line.strip())
    elif corpus is not None:
        from swapless.trace.parquet import open_parquet

        with open_parquet(corpus) as file:
            columns = [name for name in ("text", "domain") if name in file.schema_arrow.names]
            number = 0
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    if row["text"] is None:
                        raise UsageError(message("A document of the corpus has no text.", where=f"row {number} of {corpus}"))
                    yield Document(row["text"], row.get("domain"))
                    number += 1


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(message("The file is not UTF-8 text.", where=path, got=str(error))) from None
