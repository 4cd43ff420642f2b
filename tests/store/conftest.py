"""Packed stores that tests share, and copies that they may damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from swapless import embedded


@pytest.fixture(scope="session")
def all_rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with experts in 4 bits and linear layers in 8."""
    from swapless.runtime.packing import pack

    folder = tmp_path_factory.mktemp("packed") / "int4"
    pack(embedded.path(), folder, bits=4, dense_bits=8)
    return folder


@pytest.fixture
def mine(all_rounded: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(all_rounded, tmp_path / "mine"))
