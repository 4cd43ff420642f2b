"""The one cache folder: what names it, and whose it is."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from swapless.folders import cache_folder, is_ours, passing_folder


def test_the_variable_names_the_folder_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SWAPLESS_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SWAPLESS_CACHE_DIR", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWAPLESS_CACHE_DIR", "mine")
    assert cache_folder() == tmp_path / "mine"


@pytest.mark.parametrize("empty", [None, ""])
def test_otherwise_it_is_where_the_system_keeps_such_folders(empty, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SWAPLESS_CACHE_DIR", raising=False) if empty is None else monkeypatch.setenv(
        "SWAPLESS_CACHE_DIR", empty
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "swapless"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "swapless"


def test_a_user_without_a_home_gets_a_folder_that_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SWAPLESS_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(_):
        raise KeyError("a number that no list of users knows")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cache_folder() == passing_folder() == tmp_path / f"swapless-{os.getuid()}"
    monkeypatch.setenv("SWAPLESS_CACHE_DIR", "~/mine")
    assert cache_folder() == passing_folder()
    monkeypatch.setenv("HOME", "here")  # relative: the folder must not follow the working folder about
    monkeypatch.delenv("SWAPLESS_CACHE_DIR")
    assert cache_folder().is_absolute()


def test_a_folder_that_others_can_write_to_is_not_ours(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    assert not is_ours(folder)
    for mode, expected in ((0o700, True), (0o755, True), (0o775, False), (0o777, False)):
        folder.mkdir(exist_ok=True)
        folder.chmod(mode)
        assert is_ours(folder) is expected
