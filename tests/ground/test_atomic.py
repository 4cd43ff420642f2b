"""Whole files or none: what stays after a failure, and what is refused before the work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from swapless.atomic import WholeFile, check_output, check_output_folder, whole_folder, write_json, write_text, write_whole
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


def test_a_file_in_an_input_folder_is_never_the_output(tmp_path):
    (tmp_path / "model" / "sub").mkdir(parents=True)
    shard = tmp_path / "model" / "sub" / "a"
    shard.write_text("weights")
    os.link(shard, tmp_path / "other-name")
    for name in (shard, tmp_path / "other-name"):
        with pytest.raises(UsageError, match="file of the input"):
            check_output(name, force=True, inputs=[tmp_path / "model"])
    assert check_output(tmp_path / "model" / "new", inputs=[tmp_path / "model"])


@pytest.mark.parametrize("name", ["x" * 300, "loop", "file/a"])
def test_a_path_that_cannot_be_is_one_error(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    for check in (check_output, check_output_folder):
        with pytest.raises((WriteError, UsageError)):
            check(tmp_path / name)


def test_folders_of_results(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("mine")
    with pytest.raises(OutputExistsError):
        check_output_folder(tmp_path / "full")
    assert check_output_folder(tmp_path / "full", ours=["letter"])
    assert check_output_folder(tmp_path / "new" / "deep")
    with pytest.raises(UsageError, match="input"):
        check_output_folder(tmp_path / "full", inputs=[tmp_path / "full"], ours=["letter"])


def test_a_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "a") as part:
        (part / "half").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with whole_folder(tmp_path / "a") as part:
        (part / "whole").write_text("whole")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "whole"]
    with pytest.raises(WriteError, match="by now"), whole_folder(tmp_path / "a") as part:
        (part / "second").write_text("second")
    assert (tmp_path / "a" / "whole").read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_the_mode_is_the_older_files_own_or_the_umasks(tmp_path):
    def shy(part):  # as libraries do that make files of their own
        part.unlink()
        os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))

    umask = os.umask(0)
    os.umask(umask)
    write_whole(tmp_path / "a", shy)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask
    (tmp_path / "a").chmod(0o640)
    write_whole(tmp_path / "a", shy)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_long_name_can_be_written(tmp_path):
    for name in ("x" * 255, "\u00fc" * 127, os.fsdecode(b"\xff" * 255)):
        write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"


def test_errors_of_other_libraries_are_told_alike(tmp_path):
    import numpy as np
    import torch
    from safetensors.numpy import save_file

    def by_torch(part):
        with open("/dev/full", "wb") as file:
            torch.save({"a": torch.zeros(10)}, file)

    for write in (by_torch, lambda part: save_file({"a": np.zeros(3)}, "/dev/full/a")):
        with pytest.raises(WriteError):
            write_whole(tmp_path / "a", write)
    with pytest.raises(RuntimeError, match="of mine"):
        write_whole(tmp_path / "a", lambda part: (_ for _ in ()).throw(RuntimeError("of mine")))
    assert not list(tmp_path.iterdir())
