"""``swapless pack``: a checkpoint with fewer bits a weight, in the form that is read fastest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swapless.atomic import check_output_folder
from swapless.cli import _options as options
from swapless.cli import early
from swapless.cli.out import Out
from swapless.cli.perplexity import Text, measure, read_text, say_if_few
from swapless.errors import UsageError, message
from swapless.units import format_size

if TYPE_CHECKING:
    from swapless.store.packed import Manifest

__all__ = ["pack"]


def pack(
    checkpoint: options.Checkpoint,
    out_path: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the packed store.")],
    bits: Annotated[int, typer.Option(metavar="16|8|4", help="Bits of an expert's weights; 16 keeps every bit.")] = 8,
    group: Annotated[int, typer.Option(metavar="32|64|128", help="Weights that share a scale in 4 bits.")] = 32,
    dense_bits: Annotated[int, typer.Option(metavar="16|8|4", help="Bits of all other weights; 16 keeps them.")] = 16,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Then score this text with and without, for the manifest.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(metavar="N", min=1, help="Of the text, score so many tokens.")] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a packed store of a checkpoint: fewer bits, one aligned block an expert.

    The folder holds all that is needed to run it. Stopped at any moment, the same command goes on where it was.
    """
    if tokens is not None and text is None:
        raise UsageError("--tokens says how much of --text is scored. Give --text too.")
    given = None if text is None else read_text(text)
    early.checkpoint(checkpoint)
    from swapless.store.matrix import check_precision
    from swapless.store.packed import JOURNAL, MANIFEST

    check_precision(bits, group)
    if dense_bits not in (16, 8, 4):
        raise UsageError(message("No packed store has such dense bits.", got=dense_bits, allowed="16, 8, 4"))
    check_output_folder(out_path, inputs=(checkpoint, text), ours=(MANIFEST, JOURNAL))
    out = Out(as_json=as_json, quiet=quiet)
    with out.progress() as progress:
        progress("Starting", 0.0)
        from swapless.runtime.packing import pack as run

        manifest = run(checkpoint, out_path, bits=bits, group=group, dense_bits=dense_bits, progress=progress)
    experts = sum(layer.num_experts * layer.block_bytes for layer in manifest.moe_layers)
    others = sum(int(entry["bytes"]) for entry in manifest.files.values())
    count = sum(layer.num_experts for layer in manifest.moe_layers)
    if given is not None:
        manifest = _priced(checkpoint, out_path, given, tokens, out)
    document = {"out": str(out_path), "bits": bits, "experts": count, "expert_bytes": experts, "other_bytes": others}
    out.document(document | ({"perplexity": manifest.perplexity} if given is not None else {}))
    out.text(f"{out_path}: {count} experts in {format_size(experts)}, everything else in {format_size(others)}")
    if given is not None and manifest.perplexity is not None:
        before, after = manifest.perplexity["original"], manifest.perplexity["packed"]
        change = f"{100 * (after / before - 1):+.2f} %"
        out.text(f"perplexity {before:.4f} before, {after:.4f} packed ({change}), {manifest.perplexity['tokens']} tokens")


def _priced(checkpoint: str, folder: Path, text: Text, tokens: int | None, out: Out) -> Manifest:
    """Score ``text`` with the checkpoint and with the packed store, and put both figures into the manifest."""
    from swapless.store.packed import note_perplexity

    before = measure(checkpoint, text, tokens, out, memory="auto")
    after = measure(str(folder), text, tokens, out, memory="auto")
    say_if_few(after, out)
    return note_perplexity(
        folder,
        {"original": before["perplexity"], "packed": after["perplexity"]}
        | {name: after[name] for name in ("tokens", "context_tokens", "text_sha256")},
    )
