"""Packing in processes that die and on disks that are full: what is left is never taken for whole, and can be gone on with."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swapless import embedded
from swapless.errors import CheckpointCorruptError, PackMismatchError, WriteError
from swapless.runtime.packing import pack
from swapless.store.packed import JOURNAL, MANIFEST, note_perplexity, read_manifest
from swapless.store.verify import verify_packed

CHECKPOINT = embedded.path()

DIES = """
import os, signal, sys
from swapless.runtime.packing import pack

name, when, place, checkpoint, folder = sys.argv[1:]
real, calls = getattr(os, name), 0

def dies(*arguments, **options):
    global calls
    calls += 1
    if calls == int(place) and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*arguments, **options)
    if calls == int(place):
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(os, name, dies)
pack(checkpoint, folder, bits=4)
print(calls)
"""
"""Pack, and be killed before or after the given call of one of the functions that change the disk."""


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole") / "int4"
    pack(CHECKPOINT, folder, bits=4)
    return contents(folder)


def killed(folder: Path, name: str, when: str, place: int) -> int:
    """Let :data:`DIES` run in ``folder``; 0 where it was killed, else the calls that it made in all."""
    command = [sys.executable, "-c", DIES, name, when, str(place), str(CHECKPOINT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return 0 if done.returncode else int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,when,place",
    [
        ("fsync", "before", 1),  # not even the journal has its name
        ("posix_fallocate", "before", 1),  # an empty file
        ("pwrite", "after", 1),
        ("replace", "before", 2),  # the first file is whole, but has no name
        ("replace", "after", 2),  # it has its name, and the journal does not know
        ("replace", "after", 3),  # the journal knows
        ("pwrite", "before", 12),
        ("replace", "after", 13),
        ("unlink", "before", -1),  # the manifest is there, and so is the journal still
    ],
)
def test_a_process_killed_at_any_step_leaves_what_the_same_command_ends(
    name: str, when: str, place: int, whole: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    if place < 0:  # counted from the end, in a run that is not killed
        place = killed(tmp_path / "count", name, when, 10**9) + 1 + place
    assert killed(folder, name, when, place) == 0
    left = contents(folder)
    if MANIFEST not in left:
        with pytest.raises(CheckpointCorruptError, match=r"not finished|config\.json"):
            read_manifest(folder)
    pack(CHECKPOINT, folder, bits=4)
    assert contents(folder) == whole


def test_a_journal_beside_a_manifest_is_removed(whole: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "store"
    pack(CHECKPOINT, folder, bits=4)
    (folder / JOURNAL).write_text("{")
    (folder / ".swapless.json.1-0123abcd.part").write_text("{")
    pack(CHECKPOINT, folder, bits=4)
    assert contents(folder) == whole


def test_a_finished_store_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    other = Path(shutil.copytree(CHECKPOINT, tmp_path / "other"))
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    weights[len(weights) // 2 + 1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    folder = tmp_path / "store"
    pack(other, folder, bits=4)
    before = contents(folder)
    with pytest.raises(PackMismatchError, match="identity"):
        pack(CHECKPOINT, folder, bits=4)
    assert contents(folder) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB, which the packed store does not fit on."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a file system is not allowed here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_clear_error_and_more_room_lets_it_go_on(small_disk: Path, whole: dict[str, str]) -> None:
    folder = small_disk / "store"
    with pytest.raises(WriteError, match=r"no room.*No space left on device.*goes on from there"):
        pack(CHECKPOINT, folder, bits=4)
    assert MANIFEST not in contents(folder) and not list(folder.glob(".*.part"))
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    pack(CHECKPOINT, folder, bits=4)
    assert contents(folder) == whole and all(holds for _, _, holds in verify_packed(folder))


def test_a_price_that_cannot_be_noted_leaves_the_manifest(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    folder = small_disk / "store"
    pack(CHECKPOINT, folder, bits=4)
    before = contents(folder)
    with open(small_disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(4096))
    with pytest.raises(WriteError, match="no room"):
        note_perplexity(folder, {"original": 2.0, "packed": 2.1})
    assert contents(folder) == before


def test_an_unfinished_store_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / JOURNAL).write_text('{"options": {}, "done": {}}')
    with pytest.raises(PackMismatchError, match="another version"):
        pack(CHECKPOINT, folder, bits=4)
