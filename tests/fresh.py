"""Measuring memory in a process of its own: in one that ran a thousand tests, pages lie half free wherever those left them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def numbers_of(program: str, *arguments: str) -> list[int]:
    """The whole numbers that a Python program prints, which may import the tests."""
    own = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300, env=own)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]
