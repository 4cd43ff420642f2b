"""Whole files or none: what stays after a failure, and what is refused before the work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from swapless.atomic import WholeFile, check_output, write_json, write_whole
from swapless.errors import OutputExistsError, UsageError, WriteError


def test_a_failure_leaves_the_older_file_and_no_part(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, {"old": 1})

    def fail(part):
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(target, fail)
    assert target.read_text() == '{\n  "old": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with WholeFile(tmp_path / "a") as first, WholeFile(tmp_path / "a") as second:
        assert first.part != second.part
        first.part.write_text("first")
        second.part.write_text("second")
    assert (tmp_path / "a").read_text() == "first"


def test_the_mode_follows_the_umask(tmp_path):
    write_json(tmp_path / "a.json", {})
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_full_disk_is_one_message():
    with pytest.raises(WriteError, match=r"disk is full.*Free some space"):
        write_whole("/dev/shm/swapless-full", lambda part: Path("/dev/full").write_bytes(b"x"))


def test_what_exists_is_refused_and_forced(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("mine")
    with pytest.raises(OutputExistsError, match="--force"):
        check_output(target)
    assert check_output(target, force=True) == target


def test_an_input_is_never_the_output(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("mine")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(UsageError, match="input"):
        check_output(tmp_path / "link", force=True, inputs=(None, target))


def test_folders_devices_and_missing_folders_are_refused(tmp_path):
    for path, error in [(tmp_path, UsageError), ("/dev/full", UsageError), (tmp_path / "no" / "a", WriteError)]:
        with pytest.raises(error):
            check_output(path, force=True)
