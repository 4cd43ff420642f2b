"""Machine code of yesterday's sources is not run."""

from __future__ import annotations

import os

from swapless.cache.compiled import drop_stale


def test_what_is_older_than_any_source_goes(tmp_path):
    kept = tmp_path / "__pycache__"
    kept.mkdir()
    names = {"loop.py": 10, "policy.py": 30, "__pycache__/loop.nbi": 20, "__pycache__/loop.1.nbc": 20}
    names |= {"__pycache__/policy.nbi": 40, "__pycache__/loop.cpython-311.pyc": 5}
    for name, when in names.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (when, when))
    assert drop_stale(tmp_path) == 2
    assert {file.name for file in kept.iterdir()} == {"policy.nbi", "loop.cpython-311.pyc"}
    assert drop_stale(tmp_path) == 0


def test_a_package_without_any_is_left_alone(tmp_path):
    (tmp_path / "loop.py").touch()
    assert drop_stale(tmp_path) == 0
