"""One process at a time, and the others told who it is."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from swapless.errors import LockedError, WriteError
from swapless.locks import Lock

HOLDS = """
import sys, time
from swapless.locks import Lock
lock = Lock(sys.argv[1], "packing")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".lock"


def test_a_second_one_is_refused_and_told_who_has_it(path: Path) -> None:
    with Lock(path, "packing") as lock:
        assert lock.held
        with pytest.raises(LockedError, match=rf"process {os.getpid()} on .*since 20.*: packing"):
            Lock(path, "verifying")
    assert not path.exists(), "nothing is left"
    lock.release()
    Lock(path, "again").release()


def test_another_process_is_refused_until_the_owner_is_killed(path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {owner.pid} "):
            Lock(path, "packing")
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        owner.stdout.close()
    assert path.exists()
    Lock(path, "packing").release()
    assert not path.exists()


def test_one_that_is_dropped_is_released(path: Path) -> None:
    lock = Lock(path, "packing")
    del lock
    Lock(path, "packing").release()


def test_a_forked_child_does_not_remove_the_lock(path: Path) -> None:
    lock = Lock(path, "packing")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # the child does next to nothing
        child = os.fork()
    if not child:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert path.exists()
    with pytest.raises(LockedError):
        Lock(path, "packing")
    lock.release()


@pytest.mark.parametrize("content", [b"", b"{", b'{"process": "x"}', b"\xff" * 9000, b'{"process": 1, "doing": "\\u001b[2J"}'])
def test_an_owner_that_wrote_nonsense(content: bytes, path: Path) -> None:
    with Lock(path, "packing"):
        path.write_bytes(content)
        with pytest.raises(LockedError, match="does not say which") as refused:
            Lock(path, "packing")
        assert str(refused.value).isprintable()


def test_what_is_no_file_is_refused_and_stays(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(elsewhere)):
        make()
        with pytest.raises(WriteError, match=re.escape(str(path))):
            Lock(path, "packing")
        assert os.path.lexists(path) and not elsewhere.exists()
        path.rmdir() if path.is_dir() else path.unlink()
