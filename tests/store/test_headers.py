"""Headers of safetensors files: what is well formed is found; every corruption has its own error before a weight is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from swapless.errors import CheckpointCorruptError, CheckpointMissingError, UnsupportedCheckpointError
from swapless.store.headers import find_shards, read_config, read_header, read_headers

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with an index, and a configuration."""
    rng = np.random.default_rng(0)
    parts = {
        "model-1.safetensors": {"a": rng.standard_normal((3, 5)).astype(np.float32), "b": np.arange(7, dtype=np.float16)},
        "model-2.safetensors": {"c": np.arange(6, dtype=np.int64).reshape(2, 3), "d": np.ones((), np.float32)},
    }
    weight_map = {}
    for name, tensors in parts.items():
        save_file(tensors, tmp_path / name)
        weight_map |= dict.fromkeys(tensors, name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    return tmp_path


def rewrite(shard: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a shard and leave its data."""
    raw = shard.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def test_every_tensor_is_found_where_it_lies(folder: Path) -> None:
    refs = read_headers(folder)
    assert sorted(refs) == ["a", "b", "c", "d"]
    a, c, d = refs["a"], refs["c"], refs["d"]
    assert (a.dtype, a.shape, a.nbytes, a.file.name) == ("F32", (3, 5), 60, "model-1.safetensors")
    assert (d.shape, d.nbytes) == ((), 4)
    raw = c.file.read_bytes()[c.offset : c.offset + c.nbytes]
    assert np.frombuffer(raw, np.int64).tolist() == [0, 1, 2, 3, 4, 5]


def test_an_empty_tensor_is_a_tensor(tmp_path: Path) -> None:
    save_file({"none": np.zeros((0, 4), np.float32)}, tmp_path / "model.safetensors")
    assert read_header(tmp_path / "model.safetensors")["none"].nbytes == 0


@pytest.mark.parametrize("keep", [0, 7, 8, 20], ids=lambda keep: f"{keep} bytes left")
def test_cut_within_the_header(folder: Path, keep: int) -> None:
    shard = folder / "model-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointCorruptError, match=rf"shorter than its own header.*model-1.*{keep} bytes.*again"):
        read_headers(folder)


def test_cut_within_the_data(folder: Path) -> None:
    shard = folder / "model-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointCorruptError, match=r"truncated.*model-1.*at least"):
        read_headers(folder)


@pytest.mark.parametrize("length", [1 << 62, (1 << 64) - 1], ids=hex)
def test_an_absurd_header_length_reads_nothing(folder: Path, length: int) -> None:
    shard = folder / "model-1.safetensors"
    shard.write_bytes(struct.pack("<Q", length) + shard.read_bytes()[8:])
    with pytest.raises(CheckpointCorruptError, match="shorter than its own header"):
        read_header(shard)


@pytest.mark.parametrize("text", [b"{not json", b"\xff\xfe\x00", b'["a", "list"]', b"17", b"null"])
def test_a_header_that_is_no_json_object(folder: Path, text: bytes) -> None:
    shard = folder / "model-1.safetensors"
    shard.write_bytes(struct.pack("<Q", len(text)) + text + bytes(200))
    with pytest.raises(CheckpointCorruptError):
        read_header(shard)


BROKEN: dict[str, dict[str, Any]] = {
    "no dtype": {"shape": [3, 5], "data_offsets": [0, 60]},
    "no offsets": {"dtype": "F32", "shape": [3, 5]},
    "three offsets": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60, 70]},
    "shape is a word": {"dtype": "F32", "shape": ["wide"], "data_offsets": [0, 60]},
    "shape does not fit the range": {"dtype": "F32", "shape": [3, 6], "data_offsets": [0, 60]},
    "type does not fit the range": {"dtype": "F16", "shape": [3, 5], "data_offsets": [0, 60]},
    "begins before the data": {"dtype": "F32", "shape": [3, 5], "data_offsets": [-60, 0]},
    "ends before it begins": {"dtype": "F32", "shape": [3, 5], "data_offsets": [60, 0]},
    "negative sizes that multiply to a positive one": {"dtype": "F32", "shape": [-3, -5], "data_offsets": [0, 60]},
}


@pytest.mark.parametrize("entry", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_entry_names_its_tensor(folder: Path, entry: dict[str, Any]) -> None:
    rewrite(folder / "model-1.safetensors", lambda header: header.update(a=entry))
    with pytest.raises(CheckpointCorruptError, match=r"a in .*model-1"):
        read_headers(folder)


def test_an_entry_that_is_no_object(folder: Path) -> None:
    rewrite(folder / "model-1.safetensors", lambda header: header.update(a="F32"))
    with pytest.raises(CheckpointCorruptError, match="malformed"):
        read_headers(folder)


def test_an_unknown_type_is_not_served(folder: Path) -> None:
    rewrite(folder / "model-1.safetensors", lambda header: header["a"].update(dtype="F4"))
    with pytest.raises(UnsupportedCheckpointError, match="F4"):
        read_headers(folder)


def test_a_missing_shard(folder: Path) -> None:
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointMissingError, match=r"model-2\.safetensors, which should hold c and 1 more"):
        find_shards(folder)


def test_a_shard_without_a_tensor_that_the_index_names(folder: Path) -> None:
    save_file({"c": np.zeros(1, np.float32)}, folder / "model-2.safetensors")
    with pytest.raises(CheckpointCorruptError, match=r"d in model-2"):
        read_headers(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {"a": 5}}', "no weight_map"),
    ],
)
def test_a_broken_index(folder: Path, text: str, words: str) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointCorruptError, match=words):
        find_shards(folder)


def test_an_index_that_is_no_text(folder: Path) -> None:
    (folder / INDEX).write_bytes(b"\xff\xfe\x80")
    with pytest.raises(CheckpointCorruptError):
        find_shards(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "consolidated.pth", "model.pt"])
def test_weights_in_another_format_only(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(UnsupportedCheckpointError, match=f"{Path(name).suffix}.*safetensors"):
        find_shards(tmp_path)
    with pytest.raises(UnsupportedCheckpointError, match=Path(name).suffix):
        read_config(tmp_path / name)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissingError, match="No weights"):
        find_shards(tmp_path)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissingError, match="cannot be read"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointMissingError, match=r"no config\.json.*an empty folder"):
        read_config(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointMissingError, match="a folder with config"):
        read_config(tmp_path / "notes.txt")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"olmoe"'])
def test_a_broken_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointCorruptError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_good_configuration(folder: Path) -> None:
    assert read_config(folder) == {"model_type": "olmoe"}
