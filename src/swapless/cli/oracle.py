"""``swapless oracle``: train a model that hardly swaps, fit its routers, and compare twins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from swapless.atomic import check_output_folder
from swapless.cli import early
from swapless.cli._options import MOST_SEED, Force, Json, Quiet, Threads, exclusive, input_file, output, set_threads
from swapless.cli.out import Out

__all__ = ["VERBS"]

RUN_FILES = ("recipe.json",)
"""What the folder of a run that was begun holds."""

Corpus = Annotated[Path, typer.Option(metavar="FILE", help="Parquet file with columns domain, source, licence, text.")]
Tokenizer = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Tokenizer of the model.", show_default="the embedded model's")
]


def train(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run; a stopped run goes on from it.")],
    corpus: Corpus,
    router: Annotated[str, typer.Option(metavar="NAME", help="oracle, theme-gate, switch, dense, ...")] = "oracle",
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file with further values of the recipe.")] = None,
    size: Annotated[str, typer.Option(metavar="NAME", help="tiny, 195M, 295M, 729M or 2.06B.")] = "tiny",
    steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Optimiser steps in all.")] = None,
    warmup: Annotated[str, typer.Option(metavar="KIND", help="Before the fit: dense, or switch (the paper's).")] = "dense",
    warmup_steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Steps before the fit.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=MOST_SEED, help="Seed of weights and data order.")] = 0,
    tokenizer: Tokenizer = None,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Warm up, fit, and go on: from a corpus to a trained checkpoint in RUN/model. Resumable at any moment."""
    values: dict[str, Any] = _recipe_file(recipe) | {"router": router, "size": size, "warmup": warmup, "seed": seed}
    values |= {name: value for name, value in (("steps", steps), ("warmup_steps", warmup_steps)) if value is not None}
    out = Out(quiet=quiet)
    input_file("The corpus", corpus)
    check_output_folder(run, inputs=(corpus, recipe, tokenizer), ours=RUN_FILES)
    from swapless.oracle.recipe import Recipe
    from swapless.oracle.train import train as train_run

    chosen = Recipe(**values)
    chosen.config()
    set_threads(early.threads(threads, out))
    with out.progress() as progress:
        progress("reading the corpus", 0.0)
        loaded, streams = _data(corpus, tokenizer, run.parent, held_out=False)
        folder = train_run(chosen, streams, loaded, run, warmups=run.parent / "warmups", report=progress)
    out.text(str(folder))


def fit(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A trained model, dense or with a learned gate.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the fitted model.")],
    corpus: Corpus,
    router: Annotated[
        str, typer.Option(metavar="NAME", help="The router to fit: oracle, theme-gate, prefix-mean, ...")
    ] = "oracle",
    num_experts: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Experts a layer.", show_default="as the size has")
    ] = None,
    size: Annotated[str, typer.Option(metavar="NAME", help="Where the MoE blocks are: tiny, 195M, ...")] = "tiny",
    windows: Annotated[int, typer.Option(metavar="N", min=1, help="Held-in windows to fit to.")] = 192,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", min=16, help="Tokens a window.", show_default="the context")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=MOST_SEED, help="Seed of the windows and of K-means.")] = 0,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a router's groups and space to a warmed-up model and write the model that it makes, its experts still copies."""
    sink = Out(as_json=json, quiet=quiet)
    input_file("The corpus", corpus)
    check_output_folder(out, inputs=(checkpoint, corpus))
    import torch

    from swapless.errors import UsageError, message
    from swapless.oracle.compare import load_model
    from swapless.oracle.config import of_size
    from swapless.oracle.corpus import WindowSampler
    from swapless.oracle.fit import fit_routers
    from swapless.oracle.fork import fork
    from swapless.oracle.train import export, special_tokens

    model = load_model(checkpoint)
    if not model.config.trained:
        raise UsageError(
            message(
                "A router is fitted after the warm-up.",
                where=checkpoint,
                got="weights that were never trained",
                step="Train first.",
            )
        )
    set_threads(early.threads(threads, sink))
    with sink.progress() as progress:
        progress("reading the corpus", 0.0)
        tokenizer, streams = _data(corpus, str(checkpoint), out.parent, held_out=False)
        shape: dict[str, Any] = {
            name: getattr(model.config, name)
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "max_position_embeddings",
            )
        }
        shape["moe_blocks"] = [block for block in of_size(size).moe_blocks or [] if block < model.config.num_hidden_layers]
        if num_experts is not None:
            shape["num_experts"] = num_experts
        config = of_size(size, router=router, **shape, **special_tokens(tokenizer))
        length = tokens or config.max_position_embeddings
        sampler = WindowSampler(streams, rows=8, window_tokens=length, power=0.5, seed=seed)
        batches = [torch.from_numpy(sampler.next_batch()[:, :-1]) for _ in range(-(-windows // 8))]
        fits = fit_routers(model, config, batches, seed=seed, report=lambda done: progress("fitting", done))
        made, _ = fork(model, config, fits, None)
        export(made, tokenizer, out)
    rows = [
        {
            "moe_layer": place,
            "tau": found.tau,
            "groups_a_window": found.groups,
            "least_share": float(found.space.shares.min()) if found.space else None,
            "most_share": float(found.space.shares.max()) if found.space else None,
        }
        for place, found in enumerate(fits)
    ]
    sink.document(rows)
    table = [[str(row["moe_layer"]), *(f"{row[key]:.3g}" for key in list(row)[1:])] for row in rows]
    sink.table(list(rows[0]), table)
    sink.note(f"Wrote {out}.")


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or their result.json files.")],
    corpus: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measure runs that have no result yet on this corpus' held-out text.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with the table and the activation strips.")
    ] = None,
    force: Force = False,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put twins side by side: loss on held-out text, experts changed, and what a small cache would have to read."""
    exclusive(json=json, html=html)
    out = Out(as_json=json, quiet=quiet)
    input_file("The corpus", corpus)
    results_of_runs = (run / "result.json" if run.is_dir() else run for run in runs)
    output("--html", html, force=force, inputs=(corpus, *results_of_runs))
    from swapless.oracle.compare import measure_run, read_result, recovered, rows_of

    set_threads(early.threads(threads, out))
    results = []
    with out.progress() as progress:
        for number, run in enumerate(runs):
            if corpus is not None and run.is_dir() and not (run / "result.json").exists():

                def report(stage: str, done: float, number: int = number, name: str = run.name) -> None:
                    progress(f"{name}: {stage}", (number + done) / len(runs))

                results.append(measure_run(run, _held_out(corpus, run), report=report))
            else:
                results.append(read_result(run))
    rows = rows_of(results)
    kept = recovered(rows)
    out.document([row | {"recovered": kept.get(row["name"])} for row in rows])
    _print(out, rows, kept)
    if html is not None:
        from swapless.report.oracle import write_page

        write_page(html, results, rows, kept)
        out.note(f"Wrote {html}.")


def _print(out: Out, rows: list[dict[str, Any]], kept: dict[str, float]) -> None:
    """One line a router."""
    columns = [
        "router",
        "seeds",
        "loss",
        "joined",
        "gain kept",
        "changes/100",
        "generated",
        "joined ",
        "in 256",
        "entropy",
        "B/token at 1",
    ]
    table = []
    for row in rows:
        smallest = row["lru"][0]["bytes_a_token"] if row["lru"] else None
        table.append(
            [
                row["name"],
                str(row["seeds"]),
                f"{row['held_out_loss']:.4f}",
                f"{row['joined_loss']:.4f}",
                "-" if row["name"] not in kept else f"{kept[row['name']]:.0%}",
                _figure(row["routing_changes_per_100"], ".1f"),
                _figure(row["routing_generated_changes_per_100"], ".1f"),
                _figure(row["routing_joined_changes_per_100"], ".1f"),
                _figure(row["routing_experts_in_256"], ".2f"),
                _figure(row["routing_load_entropy"], ".3f"),
                _figure(smallest, ",.0f"),
            ]
        )
    out.table(columns, table)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _recipe_file(path: Path | None) -> dict[str, Any]:
    """Values of a recipe from a JSON file; only names that a recipe has."""
    if path is None:
        return {}
    import json
    from dataclasses import fields

    from swapless.errors import UnknownNameError, UsageError, message
    from swapless.oracle.recipe import Recipe

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(message("The recipe cannot be read.", where=path, got=str(error))) from error
    known = [field.name for field in fields(Recipe)]
    for name in values if isinstance(values, dict) else {}:
        if name not in known:
            raise UnknownNameError.of("value of a recipe", name, known)
    if not isinstance(values, dict):
        raise UsageError(message("A recipe is one JSON object.", where=path))
    return values


def _data(corpus: Path, tokenizer: str | None, cache: Path, *, held_out: bool) -> tuple[Any, dict[str, Any]]:
    """The tokenizer, and the tokens of one side of the split by domain."""
    from swapless import embedded
    from swapless.oracle.corpus import domain_texts, read_documents, token_streams
    from swapless.runtime.door import tokenizer_of

    documents = read_documents(corpus)
    loaded = tokenizer_of(Path(tokenizer or embedded.path()))
    return loaded, token_streams(domain_texts(documents, held_out=held_out), loaded, cache)


def _held_out(corpus: Path, run: Path) -> Any:
    import json

    from swapless.errors import CheckpointMissingError, message
    from swapless.oracle.evaluate import held_out

    if not (run / "model" / "config.json").exists():
        raise CheckpointMissingError(
            message("The run is not finished.", where=run, step="Train it to its end: swapless oracle train.")
        )
    tokenizer, streams = _data(corpus, str(run / "model"), run.parent, held_out=True)
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    return held_out(streams, window_tokens=recipe["window_tokens"], end=tokenizer.eos_token_id)


VERBS = {"train": train, "fit": fit, "compare": compare}
"""The verbs of the group, as ``cli.main`` registers them."""
