"""``swapless run``: let a checkpoint write, under a byte budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from swapless.cache import DEFAULT_POLICY
from swapless.cli import _options as options
from swapless.cli import early
from swapless.cli.out import Out
from swapless.cli.session import Sampling, generate, measured, open_model, open_tokenizer, prompt_ids, summarise
from swapless.errors import UsageError

__all__ = ["read_prompt", "run"]


def run(
    checkpoint: options.Checkpoint,
    memory: options.Memory = None,
    resident: options.Resident = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Text to continue; - reads it from stdin.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template; without --prompt, talk.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Most tokens to generate.")] = 128,
    temperature: Annotated[
        float, typer.Option(metavar="X", min=0.0, help="0 takes the likeliest token, above it samples.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="X", min=0.0, max=1.0, help="Sample from the likeliest tokens of this joint share.")
    ] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.")] = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    context: options.Context = None,
    policy: options.Policy = DEFAULT_POLICY,
    prefetch: options.Prefetch = "auto",
    record: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the routing as a trace (.parquet).")] = None,
    force: options.Force = False,
    check: options.Check = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Generate text under a byte budget.

    The checkpoint may be larger than the memory. The text goes to stdout as it is generated, all else to stderr.
    """
    options.exclusive(memory=memory, resident=resident)
    if prompt is None and not chat:
        raise UsageError("There is nothing to continue. Give --prompt TEXT, --prompt - to read stdin, or --chat to talk.")
    if prompt is None and as_json:
        raise UsageError("--json prints one document for one prompt. Give --prompt with it.")
    options.output("--record", record, force=force, inputs=(checkpoint, prefetch))
    early.finite(temperature=temperature, top_p=top_p)
    early.checkpoint(checkpoint)
    early.prefetch(prefetch)
    text = None if prompt is None else read_prompt(prompt)
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=tuple(filter(None, stop or ())), seed=seed
    )
    out = Out(as_json=as_json, quiet=quiet)
    budget = {"memory": memory, "resident": resident} if memory or resident else {"memory": "auto"}
    how = {"policy": policy, "prefetch": prefetch, "context": context, "check": check}
    with open_model(checkpoint, out, threads=threads, **how, **budget) as model:
        tokenizer = open_tokenizer(checkpoint)
        if text is None:
            from swapless.cli.chat import talk

            talk(model, tokenizer, sampling, out, inputs=(checkpoint,))
        else:
            _answer(
                model, tokenizer, text, sampling, out, {"checkpoint": checkpoint, "policy": policy, "seed": seed}, chat=chat
            )
        if record is not None:
            from swapless.trace import write_trace

            write_trace(record, model.swapless.trace())
            out.note(f"Wrote {record}.")


def read_prompt(prompt: str) -> str:
    """The prompt itself, or stdin's text for ``-`` without its final newline.

    Raises
    ------
    UsageError
        Stdin is not UTF-8 text.
    """
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"The prompt on stdin is not UTF-8 text: {error}.") from None


def _answer(model: Any, tokenizer: Any, text: str, sampling: Sampling, out: Out, about: dict[str, Any], *, chat: bool) -> None:
    if chat:
        from swapless.cli.template import chat_ids

        ids = chat_ids(tokenizer, [{"role": "user", "content": text}])
    else:
        ids = prompt_ids(tokenizer, text)
    how: Any = {"chat": chat, "think": out.thinking, "warn": out.warn}
    reply = generate(model, tokenizer, ids, sampling, out.generated, **how)
    out.text("")
    figures = measured(reply, model.swapless)
    out.document(figures | about)
    summarise(figures, out)
