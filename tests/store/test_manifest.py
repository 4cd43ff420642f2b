"""The manifest of a packed store: whatever it says that cannot be is refused before a byte is addressed, sealed or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swapless.errors import CheckpointCorruptError, CheckpointError, PackMismatchError
from swapless.runtime.open import open_checkpoint
from swapless.store.manifest import MANIFEST, parse_manifest, seal_holds, sealed
from swapless.store.packed import note_perplexity, read_manifest
from swapless.store.verify import verify_packed
from tests.store.made import as_version_2, document, reseal

Q = "model.layers.0.self_attn.q_proj.weight"
Change = Callable[[dict[str, Any]], Any]


def exchange(rows: Any, one: Any, other: Any) -> None:
    rows[one], rows[other] = rows[other], rows[one]


CHANGES: dict[str, Change] = {
    "a piece beyond its block": lambda d: d["moe_layers"][0]["pieces"][2].update(offset=1 << 40),
    "a piece over the end": lambda d: d["moe_layers"][0]["pieces"][2].update(offset=d["moe_layers"][0]["block_bytes"] - 64),
    "a negative offset": lambda d: d["moe_layers"][0]["pieces"][1].update(offset=-64),
    "pieces that overlap": lambda d: d["moe_layers"][0]["pieces"][1].update(offset=0),
    "an offset off its alignment": lambda d: d["moe_layers"][0]["pieces"][1].update(
        offset=d["moe_layers"][0]["pieces"][1]["offset"] + 1
    ),
    "gate and up exchanged": lambda d: exchange(d["moe_layers"][0]["pieces"], 0, 1),
    "offsets of gate and up exchanged": lambda d: [
        piece.update(offset=offset)
        for piece, offset in zip(
            d["moe_layers"][0]["pieces"][:2], [p["offset"] for p in d["moe_layers"][0]["pieces"][1::-1]], strict=True
        )
    ],
    "down first": lambda d: exchange(d["moe_layers"][0]["pieces"], 0, 2),
    "a piece too few": lambda d: d["moe_layers"][0]["pieces"].pop(),
    "a shape too large": lambda d: d["moe_layers"][0]["pieces"][0].update(shape=[1 << 20, 192]),
    "a shape turned round": lambda d: d["moe_layers"][0]["pieces"][0]["shape"].reverse(),
    "a shape with a zero": lambda d: d["moe_layers"][0]["pieces"][0].update(shape=[0, 192]),
    "other bits of a piece": lambda d: d["moe_layers"][0]["pieces"][0].update(bits=8, dtype="int8"),
    "another type": lambda d: d["moe_layers"][0]["pieces"][0].update(dtype="int8"),
    "another size of a piece": lambda d: d["moe_layers"][0]["pieces"][0].update(nbytes=64),
    "another name of a piece": lambda d: d["moe_layers"][0]["pieces"][2].update(name="up_proj"),
    "other bits": lambda d: d.update(bits=8),
    "unknown bits": lambda d: d.update(bits=3),
    "another group": lambda d: d.update(group=64),
    "an unknown group": lambda d: d.update(group=0),
    "other dense bits": lambda d: d.update(dense_bits=4),
    "no dense bits": lambda d: d.update(dense_bits=16),
    "no such type": lambda d: d.update(dtype="float8_e4m3fn"),
    "another type to compute in": lambda d: d.update(dtype="float16"),
    "larger blocks": lambda d: d["moe_layers"][0].update(block_bytes=2 * d["moe_layers"][0]["block_bytes"]),
    "blocks of half a page": lambda d: d["moe_layers"][0].update(block_bytes=2048),
    "another first byte": lambda d: d["moe_layers"][0].update(data_offset=0),
    "layers exchanged": lambda d: exchange(d["moe_layers"], 0, 1),
    "paths exchanged": lambda d: [
        d["moe_layers"][i].update(path=path) for i, path in enumerate([d["moe_layers"][1]["path"], d["moe_layers"][0]["path"]])
    ],
    "paths and blocks exchanged": lambda d: [
        d["moe_layers"][i].update(path=path, block=block)
        for i, (path, block) in enumerate([(d["moe_layers"][j]["path"], d["moe_layers"][j]["block"]) for j in (1, 0)])
    ],
    "another block of the model": lambda d: d["moe_layers"][0].update(block=17),
    "a file elsewhere": lambda d: d["moe_layers"][0].update(file="../experts-00000.safetensors"),
    "a layer twice": lambda d: d["moe_layers"].append(d["moe_layers"][0]),
    "a layer too few": lambda d: d["moe_layers"].pop(),
    "no layers": lambda d: d.update(moe_layers=[]),
    "a checksum too few": lambda d: d["moe_layers"][0]["checksums"].pop(),
    "a checksum of another form": lambda d: d["moe_layers"][0]["checksums"].__setitem__(0, "x" * 64),
    "a number for a checksum": lambda d: d["moe_layers"][0]["checksums"].__setitem__(0, 7),
    "another identity": lambda d: d["source"].update(identity="0" * 64),
    "a file outside the folder": lambda d: d["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
    "no configuration": lambda d: d["files"].pop("config.json"),
    "a size that is none": lambda d: d["files"]["config.json"].update(bytes=-1),
    "two weights exchanged": lambda d: exchange(
        d["dense"], "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    ),
    "a weight that is not there": lambda d: d["dense"].update({"nonsense": {"module": "nonsense", "shape": [64, 64]}}),
    "a rounded weight of another shape": lambda d: d["dense"][Q].update(shape=[64, 64]),
    "a rounded weight of a module that is none": lambda d: d["dense"][Q].update(module="model.nonsense"),
    "an unknown key": lambda d: d.update(nonsense=1),
    "a key too few": lambda d: d.pop("group"),
    "a perplexity of zero": lambda d: d.update(perplexity={"original": 0, "packed": 1.0}),
}


@pytest.mark.few(30)
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_is_refused_even_under_a_checksum_of_its_own(change: str, version: int, mine: Path) -> None:
    if version == 2:
        as_version_2(mine)
        found = document(mine)
        CHANGES[change](found)
        (mine / MANIFEST).write_text(json.dumps(found))
    else:
        reseal(mine, CHANGES[change])
    with pytest.raises(CheckpointError, match=r"Where: |Got: "):
        open_checkpoint(mine)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["tensors"].pop(Q),
        lambda d: d["tensors"].update({"nonsense": "0" * 16}),
        lambda d: d["tensors"].update({Q: "0"}),
        lambda d: d["moe_layers"][0]["part_checksums"].pop(),
        lambda d: d["moe_layers"][0]["part_checksums"].__setitem__(0, "0" * 15),
        lambda d: d["moe_layers"][0]["part_checksums"].__setitem__(0, ""),
        lambda d: d["moe_layers"][0].update(part_checksums=["0" * 16 * 9] * len(d["moe_layers"][0]["checksums"])),
    ],
)
def test_checksums_of_parts_and_tensors_that_cannot_be_are_refused(change: Change, mine: Path) -> None:
    reseal(mine, change)
    with pytest.raises(CheckpointError):
        open_checkpoint(mine)


def test_every_changed_byte_of_the_manifest_is_found(mine: Path) -> None:
    raw = (mine / MANIFEST).read_bytes()
    assert seal_holds(raw)
    for place in range(0, len(raw), 97):
        for bit in (0, 5):
            changed = raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :]
            with pytest.raises(CheckpointError):
                parse_manifest(changed, mine / MANIFEST)
    (mine / MANIFEST).write_bytes(raw.replace(b'"block": 1', b'"block":  1', 1))
    for read in (read_manifest, lambda folder: list(verify_packed(folder))):
        with pytest.raises(CheckpointCorruptError, match="checksum"):
            read(mine)


def test_the_seal_is_a_checksum_that_anybody_can_compute() -> None:
    import hashlib

    raw = sealed({"a": 1})
    digest = json.loads(raw)["checksum"]
    assert hashlib.sha256(raw.replace(digest.encode(), b"0" * 64)).hexdigest() == digest
    assert not seal_holds(raw.replace(b"1", b"2", 1)) and not seal_holds(b"{}")


def test_a_perplexity_that_no_reader_would_take_is_not_written(mine: Path) -> None:
    before = (mine / MANIFEST).read_bytes()
    with pytest.raises(CheckpointCorruptError, match="perplexity"):
        note_perplexity(mine, {"original": 2.0, "packed": 0.5})
    assert (mine / MANIFEST).read_bytes() == before
    for folder in (mine, as_version_2(mine)):
        version = read_manifest(folder).format_version
        note_perplexity(folder, {"original": 2.0, "packed": 2.5})
        assert read_manifest(folder).perplexity == {"original": 2.0, "packed": 2.5}
        assert read_manifest(folder).format_version == version


@pytest.mark.parametrize("version", [-1, 0, 1, 4, 10**6, "3", 3.0, None, True])
def test_another_version_is_refused_by_name(version: Any, mine: Path) -> None:
    reseal(mine, lambda found: found.update(format_version=version))
    with pytest.raises(CheckpointError, match=r"[Pp]ack the checkpoint again") as refused:
        read_manifest(mine)
    assert isinstance(refused.value, PackMismatchError) == (type(version) is int and version > 0)


def test_a_rounded_weight_that_the_manifest_forgets_is_missed(mine: Path) -> None:
    reseal(mine, lambda found: found["dense"].pop(Q))
    with pytest.raises(PackMismatchError, match="not in the manifest"):
        open_checkpoint(mine)
