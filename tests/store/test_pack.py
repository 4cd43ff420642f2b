"""Packed stores on disk: whole or not at all, the same bytes after any interruption, and every wrong byte or file is found."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors import safe_open

from swapless import embedded
from swapless.errors import CheckpointCorruptError, PackMismatchError, ReadError, UsageError, WriteError
from swapless.runtime.packing import pack
from swapless.store.pack import Packing, Source
from swapless.store.packed import (
    JOURNAL,
    MANIFEST,
    PackedLayer,
    PackedStore,
    checkpoint_identity,
    read_manifest,
)
from swapless.store.quantize import dequantize
from swapless.store.read import BLOCK_BYTES, HUGE_PAGE_BYTES, aligned_buffer
from swapless.store.verify import verify_packed
from swapless.store.write import FileWriter

CHECKPOINT = embedded.path()


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "int4"
    pack(CHECKPOINT, folder, bits=4)
    return folder


@pytest.fixture
def own(packed: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(packed, tmp_path / "own"))


def test_every_file_of_experts_is_valid_safetensors_with_a_page_aligned_block_an_expert(packed: Path) -> None:
    manifest = read_manifest(packed)
    for layer in manifest.moe_layers:
        assert layer.data_offset % BLOCK_BYTES == layer.block_bytes % BLOCK_BYTES == 0
        raw = (packed / layer.file).read_bytes()
        with safe_open(packed / layer.file, framework="np") as file:
            assert sorted(file.keys()) == sorted(f"experts.{expert}" for expert in range(layer.num_experts))
            for expert, checksum in enumerate(layer.checksums):
                block = file.get_tensor(f"experts.{expert}")
                first = layer.data_offset + expert * layer.block_bytes
                assert block.tobytes() == raw[first : first + layer.block_bytes]
                assert hashlib.sha256(block.tobytes()).hexdigest() == checksum


@pytest.mark.parametrize("bits,bound", [(16, 0.0), (8, 0.02), (4, 0.15)])
def test_blocks_hold_the_experts(bits: int, bound: float, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    manifest = pack(CHECKPOINT, folder, bits=bits)
    layer = manifest.moe_layers[1]
    store, block = PackedStore(folder, manifest.moe_layers, check=True), aligned_buffer(layer.block_bytes)
    assert store.read_part(1, 3, 0, block, block[:0]) == layer.block_bytes
    store.close()
    names = ("gate_proj", "up_proj", "down_proj")
    with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as file:
        gate, up, down = (file.get_tensor(f"{layer.path}.3.{name}.weight").float().numpy() for name in names)
    expected = [np.concatenate([gate, up]), down] if bits == 16 else [gate, up, down]
    for piece, weights in zip(layer.pieces, expected, strict=True):
        held = block[piece.offset : piece.offset + piece.nbytes]
        if bits == 16:
            got = (held.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(piece.shape)
        else:
            got = dequantize(held, manifest.layout(piece))
        error = np.sqrt(((got - weights) ** 2).mean() / (weights**2).mean())
        assert error <= bound and (bits == 16 or error > bound / 100)


def test_a_store_is_self_contained(packed: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    assert AutoConfig.from_pretrained(packed).model_type == AutoConfig.from_pretrained(CHECKPOINT).model_type
    assert AutoTokenizer.from_pretrained(packed)("hello")["input_ids"]
    with safe_open(CHECKPOINT / "model.safetensors", "np") as whole, safe_open(packed / "model.safetensors", "np") as dense:
        kept = {key for key in whole.keys() if ".experts." not in key}  # noqa: SIM118
        assert set(dense.keys()) == kept
    raw = json.loads((packed / MANIFEST).read_text())
    assert raw["source"]["identity"] == checkpoint_identity(CHECKPOINT)
    assert set(raw["files"]) | {MANIFEST} | {layer["file"] for layer in raw["moe_layers"]} == set(contents(packed))


@pytest.mark.parametrize("dense_bits, group", [(8, 32), (4, 32), (4, 64)])
def test_rounded_non_expert_weights_are_what_quantising_them_whole_gives(dense_bits: int, group: int, tmp_path: Path) -> None:
    from swapless.store.matrix import MatrixLayout
    from swapless.store.quantize import quantize

    folder = tmp_path / "store"
    manifest = pack(CHECKPOINT, folder, bits=4, group=group, dense_bits=dense_bits)
    assert manifest == read_manifest(folder)
    assert manifest.dense and all(holds for _, _, holds in verify_packed(folder))
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as whole, safe_open(folder / "model.safetensors", "np") as dense:
        for key in dense.keys():  # noqa: SIM118
            weights = whole.get_tensor(key)
            if key not in manifest.dense:
                continue
            assert manifest.dense[key]["shape"] == list(weights.shape)
            layout = MatrixLayout(rows=weights.shape[0], columns=weights.shape[1], bits=dense_bits, group=group)
            expected = np.zeros(layout.nbytes, np.uint8)
            quantize(weights.float().numpy(), layout, expected)
            assert np.array_equal(dense.get_tensor(key), expected), key


class Stopped(Exception):
    pass


@pytest.mark.slow
def test_a_run_stopped_anywhere_goes_on_to_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    whole = contents(packed)
    calls: list[str] = []
    pack(CHECKPOINT, tmp_path / "count", bits=4, progress=lambda text, share: calls.append(text))
    assert contents(tmp_path / "count") == whole
    folder = tmp_path / "stopped"
    for stop in range(3, len(calls), len(calls) // 6):

        def report(text: str, share: float, left: list[int] = [stop]) -> None:  # noqa: B006
            left[0] -= 1
            if not left[0]:
                raise Stopped

        shutil.rmtree(folder, ignore_errors=True)
        with pytest.raises(Stopped):
            pack(CHECKPOINT, folder, bits=4, progress=report)
        assert MANIFEST not in contents(folder)
        with pytest.raises(CheckpointCorruptError, match="not finished"):
            read_manifest(folder)
        done = set(contents(folder))
        pack(CHECKPOINT, folder, bits=4)
        assert contents(folder) == whole and done - {JOURNAL} <= set(whole)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    program = (
        "import os, signal, sys\n"
        "from swapless.runtime.packing import pack\n"
        "stop = lambda text, share: share > 0.6 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "pack(sys.argv[1], sys.argv[2], bits=4, progress=stop)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(CHECKPOINT), str(folder)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = contents(folder)
    assert MANIFEST not in left and any(name.endswith(".part") for name in left) and "experts-00000.safetensors" in left
    pack(CHECKPOINT, folder, bits=4)
    assert contents(folder) == contents(packed)


def test_a_finished_store_is_left_alone(packed: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in packed.iterdir()}
    assert pack(CHECKPOINT, packed, bits=4) == read_manifest(packed)
    assert before == {file.name: file.stat().st_mtime_ns for file in packed.iterdir()}


def test_another_precision_is_refused_in_the_same_folder(own: Path) -> None:
    with pytest.raises(PackMismatchError, match=r"Got: bits 4\. Allowed: bits 8\."):
        pack(CHECKPOINT, own, bits=8)


def test_another_checkpoint_is_refused_in_an_unfinished_folder(tmp_path: Path) -> None:
    other = Path(shutil.copytree(CHECKPOINT, tmp_path / "other"))
    raw = bytearray((other / "model.safetensors").read_bytes())
    for place in range(1, 64):
        raw[len(raw) * place // 64] ^= 1
    (other / "model.safetensors").write_bytes(raw)
    assert checkpoint_identity(other) != checkpoint_identity(CHECKPOINT)
    folder = tmp_path / "store"
    with pytest.raises(Stopped):
        pack(other, folder, bits=4, progress=lambda text, share: (_ for _ in ()).throw(Stopped()) if share > 0.6 else None)
    with pytest.raises(PackMismatchError, match="identity"):
        pack(CHECKPOINT, folder, bits=4)


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(UsageError, match="something else"):
        pack(CHECKPOINT, tmp_path, bits=4)
    assert contents(tmp_path).keys() == {"letters.txt"}


@pytest.mark.parametrize("bits,group,dense_bits", [(3, 32, 16), (4, 48, 16), (4, 32, 3)])
def test_unknown_precisions_are_refused_before_anything_is_written(
    bits: int, group: int, dense_bits: int, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="Allowed"):
        pack(CHECKPOINT, tmp_path / "store", bits=bits, group=group, dense_bits=dense_bits)
    assert not (tmp_path / "store").exists()


def test_a_packed_store_is_not_packed_again(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="packed store already"):
        pack(packed, tmp_path / "store", bits=8)


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """No file of this process may grow beyond ``nbytes``: the room ends for real."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_is_one_clear_error_without_a_manifest_and_the_run_can_go_on(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with largest_file(300_000), pytest.raises(WriteError, match=r"no room.*experts-00000|no room.*model.safetensors"):
        pack(CHECKPOINT, folder, bits=4)
    assert MANIFEST not in contents(folder)
    pack(CHECKPOINT, folder, bits=4)
    assert contents(folder) == contents(packed)


def test_a_flipped_byte_is_found_by_verify(own: Path) -> None:
    assert all(holds for _, _, holds in verify_packed(own))
    manifest = read_manifest(own)
    layer = manifest.moe_layers[2]
    places = {
        f"{layer.file}, expert 5": (layer.file, layer.data_offset + 5 * layer.block_bytes + 1234),
        "model.safetensors": ("model.safetensors", 500_000),
        "tokenizer.json": ("tokenizer.json", 7000),
    }
    for name, offset in places.values():
        raw = bytearray((own / name).read_bytes())
        raw[offset] ^= 4
        (own / name).write_bytes(raw)
    assert {what for what, _, holds in verify_packed(own) if not holds} == set(places)


def test_a_flipped_byte_is_found_when_the_block_is_read_and_checked(own: Path) -> None:
    manifest = read_manifest(own)
    layer = manifest.moe_layers[0]
    raw = bytearray((own / layer.file).read_bytes())
    raw[layer.data_offset + 2 * layer.block_bytes + 99] ^= 1
    (own / layer.file).write_bytes(raw)
    block = aligned_buffer(layer.block_bytes)
    checked = PackedStore(own, manifest.moe_layers, check=True)
    with pytest.raises(ReadError, match="expert 2"):
        checked.read_part(0, 2, 0, block, block[:0])
    assert checked.read_part(0, 1, 0, block, block[:0]) == layer.block_bytes
    checked.close()
    trusting = PackedStore(own, manifest.moe_layers)
    assert sum(trusting.read_part(0, 2, part, block, block[:0]) for part in range(trusting.parts(0, 2))) == layer.block_bytes
    trusting.close()


def test_large_blocks_are_read_in_parts_straight_into_the_slot(tmp_path: Path) -> None:
    block_bytes = 13 << 20
    layer = PackedLayer(
        path="", block=0, file="blocks", data_offset=BLOCK_BYTES, block_bytes=block_bytes, pieces=(), checksums=("", "")
    )
    raw = np.random.default_rng(0).integers(0, 256, BLOCK_BYTES + 2 * block_bytes, np.uint8)
    (tmp_path / "blocks").write_bytes(raw.tobytes())
    store, slot = PackedStore(tmp_path, [layer]), aligned_buffer(block_bytes)
    assert store.parts(0, 1) == 4 and store.bounce_bytes == 0
    assert all(extent.offset % BLOCK_BYTES == extent.nbytes % BLOCK_BYTES == 0 for extent in store.extents(0, 1))
    assert sum(store.read_part(0, 1, part, slot, store.bounce_buffer()) for part in range(4)) == block_bytes
    assert np.array_equal(slot[:block_bytes], raw[BLOCK_BYTES + block_bytes :])
    store.close()


@pytest.mark.parametrize(
    "damage,error,words",
    [
        (lambda folder: (folder / "config.json").write_bytes((folder / "config.json").read_bytes() + b"\n"), None, "size"),
        (
            lambda folder: (folder / "config.json").write_bytes((folder / "config.json").read_bytes().replace(b"0", b"1", 1)),
            PackMismatchError,
            "not the one that was packed",
        ),
        (lambda folder: (folder / "experts-00003.safetensors").unlink(), None, "missing"),
        (lambda folder: (folder / MANIFEST).write_text("{"), None, "malformed"),
        (lambda folder: (folder / MANIFEST).write_text('{"format_version": 2, "bits": 4}'), None, "malformed"),
        (lambda folder: (folder / MANIFEST).write_text('{"format_version": 9}'), PackMismatchError, "another version"),
        (
            lambda folder: (folder / MANIFEST).write_text('{"format_version": 1}'),
            PackMismatchError,
            "Pack the checkpoint again",
        ),
        (
            lambda folder: shutil.copy(folder / "experts-00001.safetensors", folder / "experts-00002.safetensors"),
            PackMismatchError,
            "another packed store",
        ),
    ],
)
def test_what_does_not_belong_is_refused(own: Path, damage, error, words: str) -> None:
    damage(own)
    with pytest.raises(error or CheckpointCorruptError, match=words):
        read_manifest(own)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "expert_bytes,block_bytes,at_once", [(BLOCK_BYTES, BLOCK_BYTES, 4), (32 << 20, 8 << 20, 3), (32 << 20, 32 << 20, 2)]
)
def test_never_more_than_four_experts_in_memory(expert_bytes: int, block_bytes: int, at_once: int, tmp_path: Path) -> None:
    buffers: dict[int, int] = {}

    class Expert(NamedTuple):
        number: int
        nbytes: int = expert_bytes

        def place(self, block: np.ndarray) -> None:
            buffers[block.ctypes.data] = len(block)
            assert not block[-1]
            block[:-1] = self.number

    def fetch(moe_layer: int, expert: int, bounce: np.ndarray) -> Expert:
        buffers[bounce.ctypes.data] = len(bounce)
        return Expert(expert)

    packing = Packing.begin(tmp_path / "store", {"identity": "x", "bits": 8, "group": 32, "dense_bits": 16})
    layer = PackedLayer(path="", block=0, file="f", data_offset=0, block_bytes=block_bytes, pieces=(), checksums=())
    reported: list[int] = []
    done = packing.layer(0, layer, 9, Source(expert_bytes, expert_bytes + 2 * BLOCK_BYTES, fetch), reported.append)
    assert len(buffers) == 2 * at_once and sum(reported) == 9 * (expert_bytes + block_bytes)
    assert sum(buffers.values()) <= max(4 * expert_bytes, 64 << 20) + at_once * HUGE_PAGE_BYTES  # of whole pages
    raw = np.fromfile(tmp_path / "store" / "f", np.uint8)[done.data_offset :].reshape(9, block_bytes)
    assert (raw[:, :-1] == np.arange(9)[:, None]).all()


@pytest.mark.parametrize("sizes", [[0], [1], [4096], [5_000_000, 3, 4_194_304], [8 << 20]])
def test_files_of_any_size_are_written_whole(sizes: list[int], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    pieces = [rng.integers(0, 256, size, np.uint8) for size in sizes]
    with FileWriter(tmp_path / "file", sum(sizes)) as writer:
        for piece in pieces:
            writer.write(piece)
        assert not (tmp_path / "file").exists()
        writer.commit()
    assert (tmp_path / "file").read_bytes() == b"".join(piece.tobytes() for piece in pieces)
    assert contents(tmp_path).keys() == {"file"}


def test_an_abandoned_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Stopped), FileWriter(tmp_path / "file", 10) as writer:
        writer.write(np.zeros(5, np.uint8))
        raise Stopped
    assert not contents(tmp_path)


def test_the_verbs_pack_and_verify(packed: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from swapless.cli.main import app

    def call(*arguments: object):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    folder = tmp_path / "store"
    done = call("pack", CHECKPOINT, "--bits", 4, "--out", folder, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["experts"] == sum(layer.num_experts for layer in read_manifest(packed).moe_layers)
    assert contents(folder) == contents(packed)
    good = call("verify", folder)
    assert good.exit_code == 0 and "are as they were packed" in good.stdout
    layer = read_manifest(folder).moe_layers[1]
    raw = bytearray((folder / layer.file).read_bytes())
    raw[-1] ^= 128
    (folder / layer.file).write_bytes(raw)
    bad = call("verify", folder, "--json")
    assert bad.exit_code == 1 and f"expert {layer.num_experts - 1}" in bad.stderr
    assert json.loads(bad.stdout)["damaged"] == [f"{layer.file}, expert {layer.num_experts - 1}"]
    again = call("pack", CHECKPOINT, "--bits", 8, "--out", folder)
    assert again.exit_code == 1 and "packed in another way" in again.stderr
