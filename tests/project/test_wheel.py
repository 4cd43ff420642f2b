"""The wheel carries all it needs: built, installed in a clean environment elsewhere, and its demo runs there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")})
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"swapless"}
    twins = [f"swapless/embedded/twins/{name}/model.safetensors" for name in ("switch", "theme-gate")]
    for needed in ("swapless/py.typed", "swapless/embedded/config.json", "swapless/embedded/model.safetensors", *twins):
        assert needed in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name]


@pytest.mark.slow
def test_the_demo_runs_from_an_installed_wheel(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=300)
    python = tmp_path / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "-c", str(ROOT / "constraints.txt"), str(wheel)]
    subprocess.run(install, check=True, timeout=1500, cwd=tmp_path)
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SWAPLESS_CACHE_DIR")}
    command = [str(python.with_name("swapless")), "demo", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path, env=clean)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["identical"] is True
    assert [run["resident"] for run in shown["runs"]] == [0.25, 0.5, 1.0]
