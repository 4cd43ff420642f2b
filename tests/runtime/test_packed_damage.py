"""Changed bytes in a packed store: found at the first read by default, never printed as text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from swapless.errors import CheckpointCorruptError, CheckpointError, ReadError, SwaplessError
from swapless.runtime.packing import pack
from swapless.store.packed import DENSE, read_manifest
from tests.store.made import as_version_2, flip


@pytest.fixture(scope="module", params=[2, 3])
def store(request: pytest.FixtureRequest, qwen3_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything rounded, in both versions of the format."""
    folder = tmp_path_factory.mktemp("store") / "int4"
    pack(qwen3_moe, folder, bits=4, dense_bits=8)
    return as_version_2(folder) if request.param == 2 else folder


@pytest.fixture
def own(store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store, tmp_path / "own"))


@pytest.mark.few(1)
def test_both_versions_give_the_same_output(
    store: Path, qwen3_moe: Path, tmp_path: Path, load: Any, prompt: Any, generate: Any
) -> None:
    pack(qwen3_moe, tmp_path / "store", bits=4, dense_bits=8)
    for check in ("first", "always", "none"):
        ours, theirs = (generate(load(folder, check=check, resident=0.25), prompt) for folder in (store, tmp_path / "store"))
        assert torch.equal(ours, theirs)


def test_a_changed_tensor_is_named_when_it_is_loaded(own: Path, load: Any) -> None:
    with safe_open(own / DENSE, "pt") as file:
        assert "model.norm.weight" in file.keys()  # noqa: SIM118
    flip(own / DENSE, -3, 6)
    for check in (None, "first", "always"):
        with pytest.raises(CheckpointCorruptError, match=r"not what was packed.*model\.safetensors.*swapless verify"):
            load(own, check=check)
    load(own, check="none")


def test_two_tensors_exchanged_are_found(own: Path, load: Any) -> None:
    tensors = load_file(own / DENSE)
    one, other = (f"model.layers.{block}.input_layernorm.weight" for block in (0, 1))
    tensors[one] += 1  # they are all ones
    save_file(tensors, own / DENSE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError):
        load(own)
    tensors[one], tensors[other] = tensors[other], tensors[one]
    with pytest.raises(CheckpointError):
        load(own)


def test_a_damaged_block_is_found_at_its_first_read_and_not_before(own: Path, load: Any, prompt: Any, generate: Any) -> None:
    layer = read_manifest(own).moe_layers[1]
    for expert in range(layer.num_experts):
        flip(own / layer.file, layer.data_offset + expert * layer.block_bytes + 70, 4)
    model = load(own, resident=1.0)
    with pytest.raises(ReadError, match=r"experts-00001\.safetensors, expert \d+\. Run swapless verify"):
        generate(model, prompt)
    with pytest.raises(ReadError, match="expert"):  # it is not forgotten either
        generate(model, prompt)
    generate(load(own, check="none"), prompt)


def test_a_block_that_changes_after_its_first_read_is_found_by_always(own: Path, load: Any, prompt: Any, generate: Any) -> None:
    import os

    models = {check: load(own, resident=0.25, check=check, prefetch=None) for check in ("first", "always")}
    expected = generate(models["first"], prompt)
    assert torch.equal(generate(models["always"], prompt), expected)
    for layer in read_manifest(own).moe_layers:
        file = own / layer.file
        times = file.stat()
        with open(file, "r+b") as opened:
            for expert in range(layer.num_experts):
                opened.seek(layer.data_offset + expert * layer.block_bytes + 100)
                opened.write(b"\xaa" * 8)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a failing disk would do it
    with pytest.raises(ReadError, match="not what was packed"):
        generate(models["always"], prompt)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a block": lambda folder: [
        flip(folder / layer.file, layer.data_offset + expert * layer.block_bytes + 64)
        for layer in read_manifest(folder).moe_layers
        for expert in range(layer.num_experts)
    ],
    "the other weights": lambda folder: flip(folder / DENSE, -1),
    "the manifest": lambda folder: (folder / "swapless.json").write_bytes(
        (folder / "swapless.json").read_bytes().replace(b'"block": 1', b'"block": 2')
    ),
    "the tokenizer": lambda folder: flip(folder / "tokenizer.json", -9),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("change", CHANGES)
def test_no_verb_computes_with_changed_bytes(change: str, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from swapless import embedded
    from swapless.cli.main import app

    folder = tmp_path / "store"
    pack(embedded.path(), folder, bits=8)
    CHANGES[change](folder)
    (tmp_path / "text").write_text("Once upon a time")
    verbs = {
        "run": [folder, "--prompt", "Once", "--max-new-tokens", "2", "--resident", "50%"],
        "perplexity": [folder, "--text", tmp_path / "text", "--resident", "50%"],
        "record": [folder, "--text", tmp_path / "text", "--out", tmp_path / "out.parquet", "--resident", "50%"],
    }
    for verb, arguments in verbs.items():
        done = CliRunner().invoke(app, [verb, *map(str, arguments)])
        assert done.exit_code == 1 and done.stderr.count("Error: ") == 1, (verb, done.output)
        assert not done.stdout.strip() and not isinstance(done.exception, SwaplessError)
    if change in ("a block", "the other weights"):
        done = CliRunner().invoke(app, ["run", *map(str, verbs["run"]), "--check", "none", "--json"])
        assert done.exit_code == 0 and json.loads(done.stdout)["new_tokens"] == 2
    wrong = CliRunner().invoke(app, ["run", *map(str, verbs["run"]), "--check", "sometimes"])
    assert wrong.exit_code == 2
