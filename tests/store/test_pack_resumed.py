"""Going on with a pack: what an earlier run left is verified before it is kept, and only what is ours is removed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from swapless import embedded
from swapless.errors import CheckpointCorruptError, LockedError, PackMismatchError
from swapless.runtime.packing import pack
from swapless.store.manifest import JOURNAL, LOCK, MANIFEST, sealed
from swapless.store.packed import note_perplexity, read_manifest
from swapless.store.verify import verify_packed
from tests.store.made import as_version_2, flip

CHECKPOINT = embedded.path()
PRECISION = {"bits": 4, "dense_bits": 8}


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


class Stopped(Exception):
    pass


def stopped(folder: Path, share: float = 0.8) -> Path:
    """A pack that ended before its last layer."""

    def report(text: str, done: float) -> None:
        if done > share:
            raise Stopped

    with pytest.raises(Stopped):
        pack(CHECKPOINT, folder, **PRECISION, progress=report)
    assert (folder / JOURNAL).is_file() and (folder / "experts-00002.safetensors").is_file()
    return folder


def change_config(folder: Path) -> None:
    file = folder / "config.json"
    file.write_bytes(file.read_bytes().replace(b"0", b"1", 1))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "nothing": lambda folder: None,
    "a bit of a block": lambda folder: flip(folder / "experts-00000.safetensors", 4096 + 777),
    "a bit of a header": lambda folder: flip(folder / "experts-00001.safetensors", 40),
    "a bit of the other weights": lambda folder: flip(folder / "model.safetensors", -1),
    "a bit of the other weights' header": lambda folder: flip(folder / "model.safetensors", 30),
    "the configuration": change_config,
    "a file cut short": lambda folder: os.truncate(folder / "experts-00000.safetensors", 4096),
    "a file gone": lambda folder: (folder / "experts-00001.safetensors").unlink(),
    "two files exchanged": lambda folder: [
        (folder / "experts-00000.safetensors").rename(folder / "aside"),
        (folder / "experts-00001.safetensors").rename(folder / "experts-00000.safetensors"),
        (folder / "aside").rename(folder / "experts-00001.safetensors"),
    ],
}


FEW = [pytest.param(damage, marks=() if number % 4 == 0 else pytest.mark.slow) for number, damage in enumerate(DAMAGE)]


@pytest.mark.few(3)
@pytest.mark.parametrize("damage", FEW)
def test_what_was_changed_meanwhile_is_written_again(damage: str, all_rounded: Path, tmp_path: Path) -> None:
    folder = stopped(tmp_path / "store")
    DAMAGE[damage](folder)
    pack(CHECKPOINT, folder, **PRECISION)
    assert contents(folder) == contents(all_rounded)


@pytest.mark.parametrize("damage", FEW)
def test_a_finished_store_is_made_whole_again(damage: str, all_rounded: Path, mine: Path) -> None:
    note_perplexity(mine, {"original": 2.0, "packed": 2.5, "tokens": 7})
    before = contents(mine)
    times = {file.name: file.stat().st_mtime_ns for file in mine.iterdir()}
    DAMAGE[damage](mine)
    changed = {name for name, digest in before.items() if contents(mine).get(name) != digest}
    pack(CHECKPOINT, mine, **PRECISION)
    assert contents(mine) == before and read_manifest(mine).perplexity == {"original": 2.0, "packed": 2.5, "tokens": 7}
    written = {file.name for file in mine.iterdir() if file.stat().st_mtime_ns != times[file.name]}
    assert written == (changed | {MANIFEST} if changed else set()), "what is whole is left alone"


def test_what_is_kept_is_not_written_again(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "store")
    times = {file.name: file.stat().st_mtime_ns for file in folder.iterdir() if not file.name.startswith(".")}
    pack(CHECKPOINT, folder, **PRECISION)
    assert len(times) > 5 and all((folder / name).stat().st_mtime_ns == time for name, time in times.items())


def test_a_store_of_version_2_is_read_verified_and_brought_up_to_date(all_rounded: Path, mine: Path) -> None:
    as_version_2(mine)
    manifest = read_manifest(mine)
    assert manifest.format_version == 2 and manifest.moe_layers[0].part_checksums == () and manifest.tensors == {}
    assert all(checked.holds for checked in verify_packed(mine))
    times = {file.name: file.stat().st_mtime_ns for file in mine.iterdir() if file.name != MANIFEST}
    pack(CHECKPOINT, mine, **PRECISION)
    assert contents(mine) == contents(all_rounded)
    assert times == {file.name: file.stat().st_mtime_ns for file in mine.iterdir() if file.name != MANIFEST}


MINE = (".mine.part", ".config.json.part", ".experts-00000.safetensors.part", ".notes.123-0123abcd.part", ".x.y")
THEIRS = (".experts-00003.safetensors.123-0123abcd.part", ".model.safetensors.1-ffffffff.part", f".{MANIFEST}.9-00000000.part")


def test_only_our_own_parts_are_removed(all_rounded: Path, tmp_path: Path) -> None:
    folder = stopped(tmp_path / "store")
    for name in (*MINE, *THEIRS, ".tokenizer.json.77-0a0b0c0d.part"):
        (folder / name).write_text("half")
    pack(CHECKPOINT, folder, **PRECISION)
    assert contents(folder).keys() == contents(all_rounded).keys() | set(MINE)


@pytest.mark.parametrize("name", MINE[:2])
def test_a_folder_with_a_part_of_somebody_else_is_not_ours(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="something else"):
        pack(CHECKPOINT, tmp_path, bits=4)
    assert contents(tmp_path).keys() == {name}


@pytest.mark.few(4)
@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.replace(b'"done"', b'"dnoe"'),
        lambda raw: raw.replace(b'"bytes": ', b'"bytes": 1'),
        lambda raw: raw[:-20],
        lambda raw: b"[" * 100_000,
        lambda raw: b"",
        lambda raw: sealed({"format_version": 3, "options": {"identity": 7}, "done": {}}),
        lambda raw: sealed({"format_version": 3, "options": json.loads(raw)["options"], "done": {"config.json": 3}}),
        lambda raw: sealed({"format_version": 3, "options": json.loads(raw)["options"], "done": {"config.json": [3]}}),
        lambda raw: sealed({"format_version": 10**9, "options": {}, "done": {}}),
        lambda raw: sealed({"format_version": 2, "options": {}, "done": {}}),
    ],
)
def test_a_journal_that_was_changed_is_refused(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    folder = stopped(tmp_path / "store", 0.7)
    (folder / JOURNAL).write_bytes(change((folder / JOURNAL).read_bytes()))
    before = contents(folder)
    with pytest.raises(PackMismatchError, match="Remove the folder"):
        pack(CHECKPOINT, folder, **PRECISION)
    assert contents(folder) == before


def test_a_journal_that_names_other_files_adds_nothing(all_rounded: Path, tmp_path: Path) -> None:
    folder = stopped(tmp_path / "store")
    document = json.loads((folder / JOURNAL).read_text())
    del document["checksum"]
    document["done"] |= {"../outside": {"bytes": 4, "sha256": "0" * 64}, "experts-00099.safetensors": ["0" * 64]}
    document["done"]["experts-00000.safetensors"][3] = "0" * 64
    (folder / JOURNAL).write_bytes(sealed(document))
    (tmp_path / "outside").write_text("mine")
    pack(CHECKPOINT, folder, **PRECISION)
    assert contents(folder) == contents(all_rounded)


def test_a_damaged_manifest_is_refused_with_a_way_out(mine: Path) -> None:
    flip(mine / MANIFEST, 100)
    with pytest.raises(CheckpointCorruptError, match=r"Give another --out, or remove the folder"):
        pack(CHECKPOINT, mine, **PRECISION)


def test_a_second_pack_into_one_folder_is_told_of_the_first(all_rounded: Path, tmp_path: Path) -> None:
    folder, told = tmp_path / "store", []

    def report(text: str, done: float) -> None:
        if done > 0.6 and not told:
            for second in (
                lambda: pack(CHECKPOINT, folder, **PRECISION),
                lambda: note_perplexity(folder, {"original": 2.0, "packed": 2.5}),
            ):
                with pytest.raises(LockedError, match=rf"process {os.getpid()} on .*: packing"):
                    second()
            told.append(text)

    pack(CHECKPOINT, folder, **PRECISION, progress=report)
    assert told and contents(folder) == contents(all_rounded) and not (folder / LOCK).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only the administrator may mount a file system")
def test_a_finished_store_on_a_read_only_file_system_is_found_whole(mine: Path, tmp_path: Path) -> None:
    place = tmp_path / "read-only"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a file system is not allowed here: {mounted.stderr.strip()}")
    try:
        shutil.copytree(mine, place / "good")
        shutil.copytree(mine, place / "bad")
        flip(place / "bad" / "experts-00000.safetensors", 5000)
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        assert pack(CHECKPOINT, place / "good", **PRECISION) == read_manifest(mine)
        for folder in ("bad", "new"):
            with pytest.raises(OSError, match=r"cannot be written.*read-only"):
                pack(CHECKPOINT, place / folder, **PRECISION)
    finally:
        subprocess.run(["umount", place], check=True)
