"""What ``run``, ``chat`` and ``demo`` share: open a model, let it write, say what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swapless.cli import early
from swapless.cli._options import set_threads
from swapless.cli.out import Out
from swapless.cli.response import response_format
from swapless.cli.stream import TextStream
from swapless.errors import CheckpointError, SwaplessError, UsageError, message
from swapless.units import format_rate, format_size

__all__ = ["Reply", "Sampling", "generate", "measured", "open_model", "open_tokenizer", "prompt_ids", "summarise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen; a temperature of 0 takes the likeliest, and no text ends before ``min_new_tokens``."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What one generation gave: the text, why it ended and its times.

    It ended with ``eos``, ``stop``, ``length``, ``context`` or ``interrupted``. Of a family that thinks before it answers,
    ``text`` is the answer alone, and ``message`` is the turn as its chat template takes it back. ``tokens_per_s`` counts the
    tokens after the first, over the time after the first: the speed of decoding.
    """

    text: str
    finish: str
    prompt_tokens: int
    new_tokens: int
    first_token_s: float | None
    total_s: float
    tokens_per_s: float | None
    thinking: str
    message: dict[str, Any]


def open_tokenizer(checkpoint: str) -> Any:
    """The checkpoint's own tokenizer.

    Raises
    ------
    CheckpointError
        It has none that transformers can read.
    """
    from swapless.runtime.door import tokenizer_of
    from swapless.runtime.source import checkpoint_folder

    folder = checkpoint_folder(checkpoint)
    tokenizer = tokenizer_of(folder)
    tokenizer.chat_template = tokenizer.chat_template or _template_beside(folder)
    return tokenizer


def _template_beside(folder: Path) -> str | None:
    """The chat template of a checkpoint that keeps it where processors look for it."""
    from swapless.untrusted import read_json

    file = folder / "chat_template.json"
    return read_json(file, what="chat template").text("chat_template", maximum=1_000_000) if file.is_file() else None


@contextmanager
def open_model(checkpoint: str, out: Out, *, threads: int | None = None, **options: Any) -> Iterator[Any]:
    """The model of ``swapless.load(checkpoint, **options)``, its loading shown, closed at the end whatever happens."""
    early.memory(options.get("memory"), out)
    threads = early.threads(threads, out)
    with out.progress() as progress:
        progress("Starting", 0.0)
        import transformers

        import swapless

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        set_threads(threads)
        model: Any = swapless.load(checkpoint, progress=progress, **options)
    try:
        budget = model.swapless.budget
        for warning in budget.warnings:
            out.note(f"Note: {warning}")
        early.share(options.get("resident"), budget.slots / budget.num_experts_total, f"{budget.slots} experts", out)
        yield model
    finally:
        model.swapless.close()


def prompt_ids(tokenizer: Any, text: str) -> Any:
    """Token ids of a prompt, shape (1, T).

    Raises
    ------
    UsageError
        The prompt is empty and the model has no token to begin a text with.
    """
    import torch

    from swapless.runtime.door import text_ids

    ids = text_ids(tokenizer, text)
    if ids.shape[-1]:
        return ids
    if tokenizer.bos_token_id is None:
        raise UsageError("The prompt is empty, and this model has no token that begins a text. Give some text.")
    return torch.tensor([[tokenizer.bos_token_id]])


def generate(
    model: Any,
    tokenizer: Any,
    ids: Any,
    sampling: Sampling,
    write: Callable[[str], None],
    *,
    chat: bool = False,
    think: Callable[[str], None] | None = None,
    warn: Callable[[str], None] | None = None,
    stopped: Callable[[], bool] | None = None,
) -> Reply:
    """Continue ``ids`` and hand each finished piece of text to ``write``.

    One sequence is written, token by token, whatever the checkpoint's generation settings ask for.

    Parameters
    ----------
    model, tokenizer : PreTrainedModel, PreTrainedTokenizerBase
        From :func:`open_model` and :func:`open_tokenizer`.
    ids : torch.Tensor
        The prompt, shape (1, T).
    sampling : Sampling
        How tokens are chosen, and where the text ends.
    write : callable of str
        Receives each piece of the answer.
    chat : bool
        Whether the prompt came from the chat template, so that the answer has the family's format.
    think, warn : callable of str, optional
        Receive pieces of thinking, and what makes the text another than was asked for.
    stopped : callable, optional
        Asked after every token whether to end.

    Raises
    ------
    CheckpointError
        transformers cannot generate with the checkpoint's generation settings.
    ContextError
        The prompt is longer than the context. An answer that would not fit ends where the context does.
    ReadError
        Expert weights could not be read; what was written so far is not whole.
    """
    import torch

    from swapless.runtime.one_sequence import plain_settings

    form = response_format(tokenizer, model, chat=chat)
    stream = TextStream(tokenizer, write, sampling.stop, response=form, think=think)
    settings, asked = plain_settings(model.generation_config)
    if asked and warn is not None:
        warn(f"generation_config.json asks for {', '.join(asked)}; one answer is written, token by token.")
    room = max(1, model.swapless.budget.context_tokens - ids.shape[-1])
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    how: dict[str, Any]
    if sampling.temperature:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    else:
        how = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    torch.manual_seed(sampling.seed)
    started = time.perf_counter()
    with _named_settings():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(sampling.max_new_tokens, room),
            min_new_tokens=min(sampling.min_new_tokens, room) or None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), None),
            streamer=stream,
            stopping_criteria=[lambda *_, **__: torch.tensor([stream.stopped or (stopped is not None and stopped())])],
            **settings,
            **how,
        )
    total_s = time.perf_counter() - started
    new = stream.new_ids
    first, last = stream.first_token_at, stream.last_token_at
    if stream.problem and warn is not None:
        warn(f"The answer does not fit the format of its family and is shown as it was written. Got: {stream.problem}.")
    finish = "length" if sampling.max_new_tokens <= room else "context"
    if stream.stopped or (new and new[-1] in ends):
        finish = "stop" if stream.stopped else "eos"
    elif stopped is not None and stopped():
        finish = "interrupted"
    decode_s = (last - first) if first is not None and last is not None else 0.0
    return Reply(
        text=stream.text,
        finish=finish,
        prompt_tokens=ids.shape[-1],
        new_tokens=len(new),
        first_token_s=first - started if first is not None else None,
        total_s=total_s,
        tokens_per_s=(len(new) - 1) / decode_s if decode_s > 0 else None,
        thinking=stream.thinking,
        message=stream.message(),
    )


@contextmanager
def _named_settings() -> Iterator[None]:
    """Name the checkpoint's generation settings where transformers cannot work with them."""
    try:
        yield
    except SwaplessError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        trail = error.__traceback__
        while trail is not None and trail.tb_next is not None:
            trail = trail.tb_next
        if trail is None or not str(trail.tb_frame.f_globals.get("__name__", "")).startswith("transformers.generation"):
            raise
        what = "transformers cannot generate with the settings in generation_config.json."
        said = " ".join(str(error).split())[:300].rstrip(".")
        raise CheckpointError(message(what, got=said, step="Mend the file, or move it away.")) from error


def measured(reply: Reply, engine: Any) -> dict[str, Any]:
    """The figures of a generation and of the engine under it, as one flat document."""
    stats = engine.stats().to_dict()
    decode_tokens = stats["decode_tokens"]
    return {
        "text": reply.text,
        **({"thinking": reply.thinking} if reply.thinking else {}),
        "finish": reply.finish,
        "prompt_tokens": reply.prompt_tokens,
        "new_tokens": reply.new_tokens,
        "tokens_per_s": reply.tokens_per_s,
        "first_token_s": reply.first_token_s,
        "total_s": reply.total_s,
        "requests": stats["requests"],
        "hits": stats["hits"],
        "hit_rate": stats["hit_rate"],
        "bytes_read": stats["bytes_read"],
        "decode_bytes_read": stats["decode_bytes_read"],
        "bytes_read_per_token": stats["decode_bytes_read"] / decode_tokens if decode_tokens else None,
        "reads": stats["reads"],
        "read_s": stats["read_s"],
        "stall_s": stats["stall_s"],
        "compute_s": stats["compute_s"],
        "stall_share": stats["stall_s"] / reply.total_s if reply.total_s else None,
        **{name: value for name, value in stats.items() if name.startswith("prefetch_")},
        "peak_memory_bytes": stats["peak_memory_bytes"],
        "peak_memory_source": stats["peak_memory_source"],
        "memory_budget_bytes": engine.budget.total_bytes,
        "slots": engine.budget.slots,
    }


def summarise(figures: dict[str, Any], out: Out) -> None:
    """The figures of :func:`measured` in a few lines on stderr."""
    source = {"cgroup": "by the memory cgroup", "rss_anon": "anonymous memory, sampled"}.get(figures["peak_memory_source"], "")
    budget = f" of {format_size(figures['memory_budget_bytes'])}" if figures["memory_budget_bytes"] else ""
    lines = [
        ("tokens", f"{figures['new_tokens']} new after {figures['prompt_tokens']} of prompt, ended by {figures['finish']}"),
        ("speed", f"{rate(figures['tokens_per_s'])} tok/s, first token after {seconds(figures['first_token_s'])}"),
        ("hit rate", share(figures["hit_rate"])),
        ("read a token", size(figures["bytes_read_per_token"])),
        *ahead_line(figures),
        ("waiting for reads", f"{share(figures['stall_share'])} of the time"),
        ("peak memory", f"{size(figures['peak_memory_bytes'])}{budget} ({source})"),
    ]
    out.note()
    out.facts(lines, aside=True)


def ahead_line(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """What reading ahead came to, where it was asked for."""
    if not figures["prefetch_tokens"]:
        return []
    reads = ", ".join(f"{figures[f'prefetch_{kind}']} {kind}" for kind in ("useful", "late", "wasted"))
    foreseen = ", ".join(f"{share(value)} at lead {lead}" for lead, value in figures["prefetch_recall"].items())
    own = f"{milliseconds(figures['prefetch_own_s_per_token'])} a token to foresee them"
    with_it, without = (figures[f"prefetch_{way}_s"] for way in ("with", "without"))
    if with_it is None:
        verdict = "still on trial"
    else:
        times = f"{milliseconds(with_it)} a token with it, {milliseconds(without)} without"
        verdict = f"kept, as it pays: {times}" if with_it < without else f"switched off, as it does not pay: {times}"
    return [
        ("read ahead", f"{figures['prefetch_reads']} experts: {reads}"),
        ("foreseen", f"{foreseen or '-'}; {own}"),
        ("reading ahead", verdict),
    ]


def rate(value: float | None) -> str:
    """Tokens a second, or a dash where there were too few."""
    return "-" if value is None else format_rate(value)


def seconds(value: float | None) -> str:
    """Seconds with two digits, or a dash."""
    return "-" if value is None else f"{value:.2f} s"


def milliseconds(value: float | None) -> str:
    """Milliseconds with two digits, or a dash."""
    return "-" if value is None else f"{1000 * value:.2f} ms"


def share(value: float | None) -> str:
    """A fraction as a percentage, or a dash."""
    return "-" if value is None or value != value else f"{100 * value:.1f} %"


def size(value: float | None) -> str:
    """Bytes in binary units, or a dash."""
    return "-" if value is None else format_size(value)
