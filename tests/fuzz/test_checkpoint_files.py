"""Files of a checkpoint made wrong: each ends in an error of ours, or in what transformers computes from the same folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.checkpoints import header_of, make, our_tokens, ours, shard_of, their_tokens, theirs, with_tokenizer
from tests.fuzz.figures import count
from tests.fuzz.mutations import Mutation, bounded, byte_mutations, json_mutations

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("SWAPLESS_FUZZ_SEED", "0"))
MORE = int(os.environ.get("SWAPLESS_FUZZ_TIMES", "1"))
"""A nightly run takes other seeds and more files."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("fuzz") / "whole", sharded=False)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("fuzz") / "sharded", sharded=True)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(tmp_path_factory.mktemp("fuzz") / "tokens")


def held(
    form: str, good: Path, name: str, mutations: list[Mutation], tmp_path: Path, asked: Any = ours, judge: Any = theirs
) -> None:
    """Each variant of the file ``name`` in a copy of ``good`` ends well.

    Well is an error of ours, or what transformers gives; where it fails on what changes nothing, what the good one gives.
    """
    folder = Path(shutil.copytree(good, tmp_path / "changed"))
    original = bounded(asked, str(good), seconds=120).value
    wrong = []
    for mutation in mutations:
        (folder / name).write_bytes(mutation.raw)
        outcome = bounded(asked, str(folder))
        ended = outcome.kind
        if ended == "value":
            expected = bounded(judge, str(folder), seconds=60, extra_bytes=4 << 30)
            same = outcome.value == (expected.value if expected.kind == "value" else original)
            ended = "right" if same else f"other than transformers ({expected.kind})"
        count(form, "refused by name" if ended == "typed" else ended, outcome)
        if ended not in ("typed", "right"):
            wrong.append(f"{mutation.name}: {ended}, {outcome.detail[-700:]}")
    assert not wrong, f"{len(wrong)} wrong\n" + "\n".join(wrong)


def test_the_good_ones_are_as_transformers_has_them(whole: Path, sharded: Path, tokens: Path) -> None:
    for folder in (whole, sharded):
        assert bounded(ours, str(folder), seconds=120).value == bounded(theirs, str(folder), seconds=120).value is not None
    assert (
        bounded(our_tokens, str(tokens), seconds=60).value == bounded(their_tokens, str(tokens), seconds=60).value is not None
    )


def headers(shard: bytes) -> Iterator[Mutation]:
    header, data = header_of(shard)
    for mutation in json_mutations(header, 70 * MORE, seed=SEED + 20):
        yield Mutation(mutation.name, shard_of(mutation.raw, data))
    keys = [key for key in header if key != "__metadata__"]
    for at, key in enumerate(keys[:: max(1, len(keys) // (12 * MORE))]):
        other = keys[(at * 7 + 3) % len(keys)]
        changed = header | {key: header[other], other: header[key]}
        yield Mutation(f"{key} and {other} exchanged", shard_of(json.dumps(changed).encode(), data))
        shape = header[key]["shape"]
        yield Mutation(
            f"{key} turned", shard_of(json.dumps(header | {key: header[key] | {"shape": shape[::-1]}}).encode(), data)
        )
        kind = {"BF16": "F16", "F32": "I32"}.get(header[key]["dtype"], "I16")
        yield Mutation(f"{key} as {kind}", shard_of(json.dumps(header | {key: header[key] | {"dtype": kind}}).encode(), data))
    length = len(shard) - len(data)
    yield from byte_mutations(shard, 40 * MORE, seed=SEED + 21, last=length)


def test_headers_of_shards(whole: Path, tmp_path: Path) -> None:
    held("safetensors header", whole, "model.safetensors", list(headers((whole / "model.safetensors").read_bytes())), tmp_path)


def test_indices(sharded: Path, tmp_path: Path) -> None:
    name = "model.safetensors.index.json"
    raw = (sharded / name).read_bytes()
    mutations = json_mutations(json.loads(raw), 60 * MORE, seed=SEED + 22) + byte_mutations(raw, 15 * MORE, seed=SEED + 23)
    held("index", sharded, name, mutations, tmp_path)


@pytest.mark.parametrize(("name", "number"), [("config.json", 120), ("generation_config.json", 60)])
def test_configurations(whole: Path, name: str, number: int, tmp_path: Path) -> None:
    raw = (whole / name).read_bytes()
    mutations = json_mutations(json.loads(raw), number * MORE, seed=SEED + 24) + byte_mutations(raw, 15 * MORE, seed=SEED + 25)
    held(name, whole, name, mutations, tmp_path)


@pytest.mark.parametrize(("name", "number"), [("tokenizer.json", 50), ("tokenizer_config.json", 50)])
def test_files_of_tokenizers(tokens: Path, name: str, number: int, tmp_path: Path) -> None:
    raw = (tokens / name).read_bytes()
    mutations = json_mutations(json.loads(raw), number * MORE, seed=SEED + 26) + byte_mutations(raw, 10 * MORE, seed=SEED + 27)
    held(name, tokens, name, mutations, tmp_path, our_tokens, their_tokens)


def test_chat_templates(tokens: Path, tmp_path: Path) -> None:
    name = "chat_template.jinja"
    mutations = byte_mutations((tokens / name).read_bytes(), 25 * MORE, seed=SEED + 28)
    held(name, tokens, name, mutations, tmp_path, our_tokens, their_tokens)
