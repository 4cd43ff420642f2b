"""``verify`` of a packed store by code of its own, and against the checkpoint that the store was made from."""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from typer.testing import CliRunner

from swapless import embedded
from swapless.cli.main import app
from swapless.errors import CheckpointError, PackMismatchError
from swapless.runtime.packing import pack
from swapless.runtime.verification_packed import compare_with_source, decode
from swapless.store import verify
from swapless.store.matrix import MatrixLayout
from swapless.store.packed import read_manifest
from swapless.store.quantize import dequantize, quantize
from swapless.store.verify import matrix_bytes, verify_packed
from tests.store.made import as_version_2, flip, reseal


def damaged(folder: Path) -> list[str]:
    return [what for what, _, holds in verify_packed(folder) if not holds]


def test_it_shares_no_code_with_writer_and_reader() -> None:
    """Ground floor and libraries alone."""
    tree = ast.parse(Path(verify.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert {module for module in modules if module.startswith("swapless")} == {
        "swapless.errors",
        "swapless.processors",
        "swapless.untrusted",
    }


@pytest.mark.parametrize("version", [2, 3])
def test_a_good_store_holds(version: int, mine: Path) -> None:
    if version == 2:
        as_version_2(mine)
    checked = list(verify_packed(mine))
    assert all(holds for _, _, holds in checked)
    manifest = read_manifest(mine)
    blocks = {f"{layer.file}, expert {expert}" for layer in manifest.moe_layers for expert in range(layer.num_experts)}
    assert [what for what, _, _ in checked] == [
        *sorted(blocks, key=lambda name: (name[:13], int(name.split()[-1]))),
        *manifest.files,
    ]


@pytest.mark.parametrize("version", [2, 3])
def test_each_kind_of_changed_bit_is_found(version: int, mine: Path) -> None:
    if version == 2:
        as_version_2(mine)
    layer = read_manifest(mine).moe_layers[2]
    flip(mine / layer.file, layer.data_offset + 5 * layer.block_bytes)
    flip(mine / layer.file, -1, 7)  # padding
    flip(mine / "model.safetensors", -1)
    flip(mine / "tokenizer.json", 7000)
    last = layer.num_experts - 1
    assert damaged(mine) == [f"{layer.file}, expert 5", f"{layer.file}, expert {last}", "model.safetensors", "tokenizer.json"]


def test_padding_that_is_not_zero_is_found_whatever_the_checksums_say(mine: Path) -> None:
    layer = read_manifest(mine).moe_layers[0]
    flip(mine / layer.file, layer.data_offset + layer.block_bytes - 1)
    raw = (mine / layer.file).read_bytes()[layer.data_offset : layer.data_offset + layer.block_bytes]

    def agree(document: dict) -> None:
        document["moe_layers"][0]["checksums"][0] = hashlib.sha256(raw).hexdigest()
        document["moe_layers"][0]["part_checksums"][0] = xxhash.xxh3_64_hexdigest(raw)

    reseal(mine, agree)
    assert damaged(mine) == [f"{layer.file}, expert 0"]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["moe_layers"][1]["part_checksums"].__setitem__(4, "0" * 16),
        lambda d: d["moe_layers"][1]["checksums"].__setitem__(4, "0" * 64),
    ],
)
def test_a_wrong_checksum_of_either_kind_is_found(change: Callable[[dict], object], mine: Path) -> None:
    reseal(mine, change)
    assert damaged(mine) == ["experts-00001.safetensors, expert 4"]


def test_a_wrong_checksum_of_a_tensor_is_found(mine: Path) -> None:
    reseal(mine, lambda found: found["tensors"].update({"model.norm.weight": "0" * 16}))
    assert damaged(mine) == ["model.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["moe_layers"][0]["pieces"][1].update(offset=0),
        lambda d: d["moe_layers"][0]["pieces"][2].update(offset=1 << 50),
        lambda d: d["moe_layers"][0]["pieces"][2].update(shape=[1 << 20, 1 << 20]),
        lambda d: d["moe_layers"][0]["pieces"].pop(),
        lambda d: d["moe_layers"][0].update(block_bytes=4096),
        lambda d: d["moe_layers"][0].update(data_offset=0),
        lambda d: d["moe_layers"][0].update(file="/etc/passwd"),
        lambda d: d["moe_layers"].reverse(),
        lambda d: d["files"].update({"../x": {"bytes": 0, "sha256": "0" * 64}}),
        lambda d: d["files"].update({"gone": {"bytes": 5, "sha256": "0" * 64}}),
        lambda d: d["tensors"].pop("model.norm.weight"),
        lambda d: d["dense"]["model.layers.0.self_attn.q_proj.weight"].update(shape=[32, 32]),
        lambda d: d.update(format_version=7),
    ],
)
def test_what_has_no_place_is_refused(change: Callable[[dict], object], mine: Path) -> None:
    reseal(mine, change)
    with pytest.raises(CheckpointError):
        list(verify_packed(mine))


def test_two_files_exchanged_and_a_file_cut_short_are_refused(mine: Path) -> None:
    first, second = mine / "experts-00000.safetensors", mine / "experts-00001.safetensors"
    first.rename(mine / "aside")
    second.rename(first)
    (mine / "aside").rename(second)
    with pytest.raises(PackMismatchError, match="another packed store"):
        list(verify_packed(mine))
    os.truncate(first, 100)
    with pytest.raises(CheckpointError, match="100 bytes"):
        list(verify_packed(mine))


@pytest.mark.parametrize(
    "rows,columns,bits,group", [(1, 1, 8, 32), (33, 100, 8, 32), (64, 64, 4, 32), (70, 200, 4, 64), (5, 129, 4, 128)]
)
def test_its_reading_of_the_format_is_the_writers(rows: int, columns: int, bits: int, group: int) -> None:
    layout = MatrixLayout(rows=rows, columns=columns, bits=bits, group=group)
    assert matrix_bytes(rows, columns, bits, group) == layout.nbytes
    held = np.zeros(layout.nbytes, np.uint8)
    weights = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    quantize(weights, layout, held)
    decoded = decode(held, rows, columns, bits, group)
    assert np.array_equal(decoded.weights, dequantize(held, layout))
    assert (np.abs(decoded.weights - weights) <= 0.56 * decoded.steps).all()


@pytest.mark.few(2)
@pytest.mark.parametrize("bits,dense_bits", [(16, 16), (8, 4), (4, 8)])
def test_a_store_is_what_its_checkpoint_rounds_to(bits: int, dense_bits: int, tmp_path: Path) -> None:
    pack(embedded.path(), tmp_path / "store", bits=bits, dense_bits=dense_bits)
    results = list(compare_with_source(tmp_path / "store", embedded.path()))
    assert all(result.holds for result in results) and len(results) > 10
    assert (max(result.worst_steps for result in results) > 0.4) == (bits < 16)


def resealed_block(folder: Path, expert: int, change: Callable[[np.ndarray], None]) -> None:
    """Change a block, and every checksum that would tell."""
    manifest = read_manifest(folder)
    layer = manifest.moe_layers[0]
    file = folder / layer.file
    raw = np.fromfile(file, np.uint8)
    first = layer.data_offset + expert * layer.block_bytes
    block = raw[first : first + layer.block_bytes]
    change(block)
    raw.tofile(file)

    def agree(document: dict) -> None:
        document["moe_layers"][0]["checksums"][expert] = hashlib.sha256(block.data).hexdigest()
        document["moe_layers"][0]["part_checksums"][expert] = xxhash.xxh3_64_hexdigest(block.data)

    reseal(folder, agree)


def test_gate_and_up_exchanged_by_somebody_thorough_is_found_beside_the_checkpoint(mine: Path) -> None:
    gate, up, _ = read_manifest(mine).moe_layers[0].pieces

    def exchange(block: np.ndarray) -> None:
        one, other = (block[piece.offset : piece.offset + piece.nbytes] for piece in (gate, up))
        one[:], other[:] = other.copy(), one.copy()

    resealed_block(mine, 3, exchange)
    assert damaged(mine) == [], "no checksum can tell"
    wrong = [result.what for result in compare_with_source(mine, embedded.path()) if not result.holds]
    assert wrong == ["MoE layer 0"]


def test_a_wrong_scale_is_found_beside_the_checkpoint(mine: Path) -> None:
    down = read_manifest(mine).moe_layers[0].pieces[2]
    layout = read_manifest(mine).layout(down)

    def double(block: np.ndarray) -> None:
        block[down.offset + layout.scales_offset + 1] ^= 1  # an exponent's bit of one scale

    resealed_block(mine, 7, double)
    assert [result.what for result in compare_with_source(mine, embedded.path()) if not result.holds] == ["MoE layer 0"]


def test_another_checkpoint_is_refused(mine: Path) -> None:
    with pytest.raises(PackMismatchError, match="another checkpoint"):
        next(compare_with_source(mine, embedded.path() / "twins" / "switch"))


def test_the_verb(mine: Path) -> None:
    def call(*arguments: object):
        return CliRunner().invoke(app, ["verify", *(str(argument) for argument in arguments)])

    done = call(mine, "--source", embedded.path())
    assert done.exit_code == 0 and "are as they were packed" in done.stdout and "rounded, by up to 0." in done.stdout
    document = json.loads(call(mine, "--source", embedded.path(), "--json").stdout)
    assert document["damaged"] == [] and all(row["holds"] for row in document["compared"])
    assert call(embedded.path(), "--source", mine).exit_code == 2
    # A seal of its own does not help what is not the model's.
    reseal(mine, lambda found: found["moe_layers"][0].update(block=9))
    refused = call(mine)
    assert refused.exit_code == 1 and "not made of" in refused.stderr
