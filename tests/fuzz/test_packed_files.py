"""Packed stores made wrong in every way: each ends in an error of ours or in the right output, within seconds and bytes.

A store is loaded and computes, is verified, and, where it is unfinished, packed to its end. Manifests are also sealed anew
after the change, as somebody would who means harm: then only the schema stands between a number and the memory it points to.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from swapless.store.manifest import DENSE, JOURNAL, MANIFEST, sealed
from tests.fuzz import figures
from tests.fuzz.mutations import Mutation, bounded, byte_mutations, json_mutations
from tests.store.made import as_version_2, document

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("SWAPLESS_FUZZ_SEED", "0"))

PRECISION = {"bits": 4, "dense_bits": 8}
BLOCKS = "experts-00001.safetensors"


class Good(NamedTuple):
    """A checkpoint of two MoE layers, a store of it, a pack of it that was stopped, and what the store computes."""

    checkpoint: Path
    store: Path
    stopped: Path
    output: str
    contents: dict[str, str]


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def compute(folder: str) -> str:
    """Digest of the logits of a prompt and of two steps after it; every expert is asked for."""
    import torch

    import swapless

    digest = hashlib.sha256()
    with torch.no_grad(), swapless.load(folder, resident=0.5, context=64) as model:
        out = model(torch.arange(3, 43)[None] * 3 % 120, use_cache=True)
        for token in (7, 11):
            digest.update(out.logits.float().numpy().tobytes())
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        digest.update(out.logits.float().numpy().tobytes())
    return digest.hexdigest()


def verifies(folder: str) -> bool:
    """Whether ``swapless verify`` finds nothing."""
    from swapless.runtime.open import open_checkpoint
    from swapless.store.verify import verify_packed

    holds = all(checked.holds for checked in verify_packed(Path(folder)))
    if holds:
        open_checkpoint(Path(folder))
    return holds


def judge(folder: str) -> dict[str, Any]:
    """What a run and ``verify`` make of a store, in one process."""
    from swapless.errors import SwaplessError

    found: dict[str, Any] = {}
    for name, call in (("verify", verifies), ("run", compute)):
        try:
            found[name] = call(folder)
        except SwaplessError as error:
            found[name] = error.__class__
            str(error).encode()  # a message that can be printed
    return {name: value if isinstance(value, (bool, str)) else "typed" for name, value in found.items()}


def go_on(checkpoint: str, folder: str) -> dict[str, str]:
    """Pack to the end, and what lies there then."""
    from swapless.runtime.packing import pack

    pack(checkpoint, folder, **PRECISION)
    return contents(Path(folder))


def stop(checkpoint: str, folder: str) -> None:
    """Pack until the first layer is whole."""
    from swapless.errors import UsageError
    from swapless.runtime.packing import pack

    def report(text: str, done: float) -> None:
        if done > 0.8:
            raise UsageError("stopped")

    pack(checkpoint, folder, **PRECISION, progress=report)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    root = tmp_path_factory.mktemp("fuzz")
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    about = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**sizes, **about, bos_token_id=1, dtype="bfloat16"))
    model.to(torch.bfloat16).save_pretrained(root / "checkpoint")
    done = bounded(go_on, str(root / "checkpoint"), str(root / "store"), seconds=300)
    assert done.kind == "value", done
    output = bounded(compute, str(root / "store"), seconds=300)
    assert output.kind == "value", output
    stopped = bounded(stop, str(root / "checkpoint"), str(root / "stopped"), seconds=300)
    assert stopped.kind == "typed" and (root / "stopped" / JOURNAL).is_file(), stopped
    return Good(root / "checkpoint", root / "store", root / "stopped", output.value, done.value)


def held(good: Good, tmp_path: Path, changes: Iterator[tuple[str, Callable[[Path], Any]]], least: int) -> None:
    """Each of ``changes`` to a copy of the store ends well."""
    wrong, count = [], 0
    for name, change in changes:
        count += 1
        folder = tmp_path / f"{count}"
        shutil.copytree(good.store, folder)
        change(folder)
        outcome = bounded(judge, str(folder))
        shutil.rmtree(folder)
        found = outcome.value or {"run": outcome.kind, "verify": outcome.kind}
        right = outcome.kind == "value" and found["run"] in ("typed", good.output)
        ran = "right" if found["run"] == good.output else found["run"] if len(found["run"]) < 10 else "other output"
        figures.count("packed stores", {"typed": "refused by name"}.get(ran, ran), outcome)
        if not right or (found["verify"] is True and found["run"] == "typed"):
            wrong.append(f"{name}: {found}, {outcome.detail[-600:]}")
    assert not wrong, "\n".join(wrong)
    assert count >= least


def with_manifest(
    mutations: list[Mutation], write: Callable[[bytes], bytes | None]
) -> Iterator[tuple[str, Callable[[Path], Any]]]:
    for mutation in mutations:
        raw = write(mutation.raw)
        if raw is not None:
            yield mutation.name, lambda folder, raw=raw: (folder / MANIFEST).write_bytes(raw)


def resealed(raw: bytes) -> bytes | None:
    """The same document under a checksum of its own; None where Python's own parser makes no object of it."""
    try:
        found = json.loads(raw)
        return sealed(found) if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        return None


def test_manifests_that_were_changed(good: Good, tmp_path: Path) -> None:
    mutations = json_mutations(document(good.store), 40, seed=SEED + 1) + byte_mutations(
        (good.store / MANIFEST).read_bytes(), 15, seed=SEED + 2
    )
    held(good, tmp_path, with_manifest(mutations, lambda raw: raw), 55)


def test_manifests_that_were_changed_and_sealed_anew(good: Good, tmp_path: Path) -> None:
    held(good, tmp_path, with_manifest(json_mutations(document(good.store), 130, seed=SEED + 3), resealed), 60)


def test_manifests_of_version_2_that_were_changed(good: Good, tmp_path: Path) -> None:
    older = as_version_2(Path(shutil.copytree(good.store, tmp_path / "older")))
    held(good, tmp_path, with_manifest(json_mutations(document(older), 60, seed=SEED + 4), lambda raw: raw), 60)


@pytest.mark.parametrize("file,count,last", [(BLOCKS, 20, 4096), (BLOCKS, 15, None), (DENSE, 20, 3000), (DENSE, 10, None)])
def test_files_whose_bytes_were_changed(good: Good, tmp_path: Path, file: str, count: int, last: int | None) -> None:
    mutations = byte_mutations((good.store / file).read_bytes(), count, seed=SEED + count, last=last)
    held(
        good,
        tmp_path,
        ((mutation.name, lambda folder, raw=mutation.raw: (folder / file).write_bytes(raw)) for mutation in mutations),
        count,
    )


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_small_files_that_were_changed(good: Good, tmp_path: Path, file: str) -> None:
    mutations = json_mutations(json.loads((good.store / file).read_text()), 8, seed=SEED + 6)
    mutations += byte_mutations((good.store / file).read_bytes(), 6, seed=SEED + 7)
    held(
        good,
        tmp_path,
        ((mutation.name, lambda folder, raw=mutation.raw: (folder / file).write_bytes(raw)) for mutation in mutations),
        14,
    )


def exchange(folder: Path, one: str, other: str) -> None:
    (folder / one).rename(folder / "aside")
    (folder / other).rename(folder / one)
    (folder / "aside").rename(folder / other)


def in_place_of(name: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


FOLDERS: dict[str, Callable[[Path], Any]] = {
    "blocks exchanged": lambda folder: exchange(folder, "experts-00000.safetensors", BLOCKS),
    "blocks and weights exchanged": lambda folder: exchange(folder, BLOCKS, DENSE),
    "manifest and configuration exchanged": lambda folder: exchange(folder, MANIFEST, "config.json"),
    "an index of other shards beside it": lambda folder: (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": BLOCKS}})
    ),
    "a journal beside the manifest": lambda folder: (folder / JOURNAL).write_text("{"),
    "a journal in place of the manifest": lambda folder: (folder / MANIFEST).rename(folder / JOURNAL),
    **{
        f"{name} is {kind}": in_place_of(name, make)
        for name in (MANIFEST, BLOCKS, DENSE, "config.json")
        for kind, make in {
            "gone": lambda path: None,
            "a folder": Path.mkdir,
            "a pipe": os.mkfifo,
            "zeros without end": lambda path: path.symlink_to("/dev/zero"),
            "a link to itself": lambda path: path.symlink_to(path),
            "empty": Path.touch,
        }.items()
    },
}


def test_folders_in_which_files_are_not_what_they_are_called(good: Good, tmp_path: Path) -> None:
    held(good, tmp_path, iter(FOLDERS.items()), 30)


def test_journals_and_kept_files_that_were_changed(good: Good, tmp_path: Path) -> None:
    journal = good.stopped / JOURNAL
    plain = json.loads(journal.read_text())
    del plain["checksum"]
    mutations = [(JOURNAL, m) for m in json_mutations(plain, 20, seed=SEED + 8)]
    mutations += [(JOURNAL, m) for m in byte_mutations(journal.read_bytes(), 10, seed=SEED + 9)]
    sealed_anew = [(m.name, resealed(m.raw)) for m in json_mutations(plain, 60, seed=SEED + 10)]
    mutations += [(JOURNAL, Mutation(f"{name}, sealed", raw)) for name, raw in sealed_anew if raw is not None]
    for name in ("experts-00000.safetensors", DENSE, "config.json"):
        mutations += [(name, m) for m in byte_mutations((good.stopped / name).read_bytes(), 8, seed=SEED + 11)]
    wrong = []
    for count, (name, mutation) in enumerate(mutations):
        folder = tmp_path / f"{count}"
        shutil.copytree(good.stopped, folder)
        (folder / name).write_bytes(mutation.raw)
        outcome = bounded(go_on, str(good.checkpoint), str(folder))
        figures.count("journals of packs", {"typed": "refused by name"}.get(outcome.kind, outcome.kind), outcome)
        if not (outcome.kind == "typed" or (outcome.kind == "value" and outcome.value == good.contents)):
            wrong.append(f"{name}, {mutation.name}: {outcome.kind}, {outcome.detail[-600:]}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
    assert len(mutations) >= 70
