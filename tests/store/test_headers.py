"""Headers of safetensors files: what is well formed is found; every corruption has its own error before a weight is read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from swapless.errors import CheckpointCorruptError, CheckpointMissingError, UnsupportedCheckpointError
from swapless.store.headers import find_shards, local_folder, read_config, read_header, read_headers

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
    rewrite(folder / "model-1.safetensors", lambda header: header["a"].update(dtype="F5"))
    with pytest.raises(UnsupportedCheckpointError, match="F5"):
        read_headers(folder)


KEY = '"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
REFUSED_BY_THE_LIBRARY = {
    "overlap": (
        '"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
        '"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}',
        12,
    ),
    "the same bytes twice": (f'{KEY}, "b": {{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', 8),
    "a hole between": (f'{KEY}, "b": {{"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}', 16),
    "a hole before": ('"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}', 12),
    "bytes after the last": (KEY, 9),
    "a byte short": (KEY, 7),
    "a float in the shape": (KEY.replace("[2]", "[2.0]"), 8),
    "a float in the offsets": (KEY.replace("8]", "8.0]"), 8),
    "true in the shape": ('"a": {"dtype": "F32", "shape": [true, 2], "data_offsets": [0, 8]}', 8),
    "a text in the shape": ('"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}', 8),
    "an exponent": (KEY.replace("[2]", "[2e0]"), 8),
    "a field twice": (KEY.replace('"shape"', '"dtype": "F32", "shape"'), 8),
    "a key twice, of different ranges": (f'{KEY}, "a": {{"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}', 12),
    "metadata that is no text": (f'"__metadata__": {{"a": 1}}, {KEY}', 8),
    "metadata that is a list": (f'"__metadata__": ["a"], {KEY}', 8),
    "a product that overflows": (KEY.replace("[2]", "[4611686018427387906, 4]"), 8),
    "half a byte": ('"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}', 1),
    "a zero byte after the text": (f"{KEY}}}\0", 8),
    "no text": ("\ud800", 8),
}


@pytest.mark.parametrize(("inner", "data"), REFUSED_BY_THE_LIBRARY.values(), ids=REFUSED_BY_THE_LIBRARY.keys())
def test_what_the_library_refuses_is_refused(tmp_path: Path, inner: str, data: int) -> None:
    text = ("{" + inner + ("" if inner.endswith("\0") else "}")).encode("utf-8", "surrogatepass")
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    with pytest.raises(SafetensorError), safe_open(shard, "np"):
        pass
    with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors"):
        read_header(shard)


SERVED_BY_THE_LIBRARY = {
    "spaces around": "  {" + KEY + "}  \n",
    "an unknown field": "{" + KEY.replace('"shape"', '"more": {"deep": [[[1.5]]]}, "shape"') + "}",
    "a list for an object": '{"a": ["F32", [2], [0, 8]]}',
    "the same key twice": "{" + f"{KEY}, {KEY}" + "}",
    "no metadata": '{"__metadata__": null, ' + KEY + "}",
    "a key in escapes": "{" + KEY.replace('"a"', r'"\u0061"') + "}",
}


@pytest.mark.parametrize("text", SERVED_BY_THE_LIBRARY.values(), ids=SERVED_BY_THE_LIBRARY.keys())
def test_what_the_library_serves_is_served(tmp_path: Path, text: str) -> None:
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(struct.pack("<Q", len(text)) + text.encode() + np.arange(2, dtype=np.float32).tobytes())
    ref = read_header(shard)["a"]
    with safe_open(shard, "np") as file:
        assert file.get_tensor("a").tobytes() == shard.read_bytes()[ref.offset : ref.offset + ref.nbytes]


_NAMES = st.sampled_from(["a", "b", "model.x", "__metadata__", ""])
_SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, -1, 1.0, True, None, "2", 2**40, 2**63])
_ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "F6_E2M3", "F8_E8M0", "f32", 4, None]),
        "shape": st.lists(_SIZES, max_size=3) | st.none(),
        "data_offsets": st.lists(_SIZES, min_size=1, max_size=3),
        "more": st.none(),
    },
)


@st.composite
def _laid_out(draw: Any) -> dict[str, Any]:
    """Entries that cover their bytes in the order drawn, which is what the library serves, or nearly so."""
    header, at = {}, 0
    for name in draw(st.lists(_NAMES, max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        nbytes = 2 * int(np.prod(shape))
        shift = draw(st.sampled_from([0, 0, 0, 0, 0, 1, -1]))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at + shift, at + nbytes]}
        at += nbytes
    return header


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=_laid_out() | st.dictionaries(_NAMES, _ENTRIES | _SIZES, max_size=3), data=st.sampled_from(["fits", "more", 0, 8])
)
def test_exactly_what_the_library_accepts_is_accepted(tmp_path: Path, header: dict[str, Any], data: Any) -> None:
    end = 0
    for entry in header.values():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        end = max([end, *(n for n in offsets or [] if type(n) is int and n < 100)])
    count = {"fits": end, "more": end + 3}.get(data, data)
    text = json.dumps(header).encode()
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(struct.pack("<Q", len(text)) + text + bytes(range(64))[:count])
    try:
        with safe_open(shard, "np") as file:
            known = {
                key: (file.get_slice(key).get_dtype(), tuple(file.get_slice(key).get_shape())) for key in file.offset_keys()
            }
    except SafetensorError:
        with pytest.raises((CheckpointCorruptError, UnsupportedCheckpointError), match=r"model\.safetensors"):
            read_header(shard)
        return
    refs = read_header(shard)
    assert {key: (ref.dtype, ref.shape) for key, ref in refs.items()} == known
    for key, ref in refs.items():
        assert ref.offset == 8 + len(text) + header[key]["data_offsets"][0] or ref.nbytes == 0
        assert ref.offset + ref.nbytes <= shard.stat().st_size


def test_only_regular_files_are_read(folder: Path) -> None:
    shard = folder / "model-1.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(CheckpointMissingError, match="not there"):
        read_headers(folder)
    with pytest.raises(CheckpointCorruptError, match="not a regular file"):
        read_header(shard)
    with pytest.raises(CheckpointCorruptError, match="not a regular file"):
        read_header(Path("/dev/zero"))
    for name in ("config.json", INDEX):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    with pytest.raises(CheckpointCorruptError, match=r"config\.json is not a regular file"):
        read_config(folder)
    with pytest.raises(CheckpointCorruptError, match=r"index\.json is not a regular file"):
        read_headers(folder)


def test_a_header_of_millions_of_values_is_not_parsed(tmp_path: Path) -> None:
    text = b'{"a": [' + b"0," * 6_000_000 + b"0]}"
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointCorruptError, match="too many values"):
        read_header(shard)


def test_the_single_file_comes_before_an_index(folder: Path) -> None:
    save_file({"e": np.zeros(3, np.float32)}, folder / "model.safetensors")
    assert list(read_headers(folder)) == ["e"]
    for shard in folder.glob("model-*"):
        shard.unlink()
    assert list(read_headers(folder)) == ["e"], "what a stale index names need not be there"


def test_shards_in_a_folder_below(folder: Path) -> None:
    (folder / "below").mkdir()
    for shard in sorted(folder.glob("model-*")):
        shard.rename(folder / "below" / shard.name)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {key: f"below/{name}" for key, name in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    assert sorted(read_headers(folder)) == ["a", "b", "c", "d"]
    (folder / "below" / "model-2.safetensors").unlink()
    words = r"below/model-2\.safetensors, which should hold c and 1 more.*Allowed: below/model-1\.safetensors"
    with pytest.raises(CheckpointMissingError, match=words):
        find_shards(folder)


@pytest.mark.parametrize(
    "name",
    ["../model-1.safetensors", "/etc/passwd", "/model-1.safetensors", "x/../../y.safetensors", "", "config.json", "a\0b"],
)
def test_an_index_that_leads_out_of_its_folder(folder: Path, name: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointCorruptError, match="outside its folder"):
        read_headers(folder)


def test_of_a_tensor_in_two_shards_the_last_counts(folder: Path) -> None:
    save_file({key: np.ones(2, np.float32) for key in "acd"}, folder / "model-2.safetensors")
    assert read_headers(folder)["a"].file.name == "model-2.safetensors"


def test_an_index_of_a_million_entries_is_refused_or_read(folder: Path) -> None:
    with open(folder / INDEX, "w") as file:
        file.write('{"weight_map": {"a": "model-1.safetensors"')
        for number in range(1_200_000):
            file.write(f', "model.layers.{number}.mlp.experts.gate_proj.weight": "model-1.safetensors"')
        file.write("}}")
    with pytest.raises(CheckpointCorruptError, match="too large"):
        read_headers(folder)


def test_shards_without_their_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    for number in (1, 2):
        (folder / f"model-{number}.safetensors").rename(folder / f"model-0000{number}-of-00002.safetensors")
    with pytest.raises(CheckpointMissingError, match=r"index of the shards is missing.*2 shards"):
        find_shards(folder)


@pytest.mark.parametrize(
    "name", ["model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"]
)
def test_a_variant_only(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointMissingError, match=r"variant.*fp16"):
        find_shards(tmp_path)


def test_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointMissingError, match="a link to a file that is not there"):
        find_shards(tmp_path)


def test_an_adapter_alone_and_beside_a_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')
    with pytest.raises(UnsupportedCheckpointError, match=r"adapter lies beside the model.*adapter_config"):
        read_headers(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UnsupportedCheckpointError, match=r"adapter \(LORA\), not a model.*owner/base"):
        read_config(folder)
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(UnsupportedCheckpointError, match=r"adapter \(of peft\)"):
        read_config(folder)


def test_a_distributed_checkpoint(folder: Path) -> None:
    (folder / "shard-00000-model-00001-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedCheckpointError, match="distributed checkpoint"):
        read_headers(folder)


def test_a_repository_in_the_hubs_cache(tmp_path: Path) -> None:
    cached = tmp_path / "models--owner--name"
    for commit in ("0a", "0b"):
        (cached / "snapshots" / commit).mkdir(parents=True)
    with pytest.raises(CheckpointMissingError, match=r"which of its snapshots.*0a, 0b"):
        local_folder(cached)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0b\n")
    assert local_folder(cached) == cached / "snapshots" / "0b"
    (cached / "refs" / "main").write_text("../../..")
    (cached / "snapshots" / "0b").rmdir()
    assert local_folder(cached) == cached / "snapshots" / "0a"
    assert local_folder(tmp_path) == tmp_path


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
        ("{", "no JSON"),
        ("[]", "an object"),
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
