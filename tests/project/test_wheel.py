"""The wheel carries all it needs: built, installed in a clean environment elsewhere, and its demo runs there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
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


def interpreter() -> str:
    """A Python of this version that other users can run too, where there is one; else this one."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name in (os.path.realpath(sys.executable), f"/usr/bin/python{here}", f"/usr/local/bin/python{here}"):
        above = Path(os.path.realpath(name)).parents
        if Path(name).exists() and all(folder.stat().st_mode & 0o1 for folder in above):
            return name
    return sys.executable


@pytest.fixture(scope="module")
def installed(wheel):
    """A clean environment with the wheel, where any user can read it and none but us write; the command in it."""
    folder = Path(tempfile.mkdtemp(prefix="swapless-wheel-"))
    folder.chmod(0o755)
    try:
        subprocess.run([interpreter(), "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=300)
        python = folder / "venv" / "bin" / "python"
        install = [
            "--python",
            str(python),
            "install",
            "--quiet",
            "--no-compile",
            "-c",
            str(ROOT / "constraints.txt"),
            str(wheel),
        ]
        subprocess.run([sys.executable, "-m", "pip", *install], check=True, timeout=1500, cwd=folder)
        subprocess.run(["chmod", "-R", "a+rX,go-w", str(folder)], check=True, timeout=300)
        yield python.with_name("swapless")
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(folder)], check=True, timeout=300)
        shutil.rmtree(folder)


def demo(done: subprocess.CompletedProcess[str]) -> None:
    """What every run of the demo shows."""
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    shown = json.loads(done.stdout)
    assert shown["identical"] is True
    assert [run["resident"] for run in shown["runs"]] == [0.25, 0.5, 1.0]


@pytest.mark.slow
def test_the_demo_runs_from_an_installed_wheel(installed, tmp_path):
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SWAPLESS_CACHE_DIR")}
    clean["XDG_CACHE_HOME"] = str(tmp_path)
    demo(subprocess.run([installed, "demo", "--json"], capture_output=True, text=True, timeout=1500, cwd=tmp_path, env=clean))
    assert list(tmp_path.glob("swapless/code/*/*.code"))


@pytest.mark.slow
@pytest.mark.parametrize("home", ["/nonexistent", None])
def test_the_demo_runs_for_a_user_who_can_write_nowhere_but_in_a_temporary_folder(installed, home):
    packages = installed.parents[1] / "lib"
    as_other = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"] if os.geteuid() == 0 else []
    if as_other:
        works = shutil.which("setpriv") and not subprocess.run([*as_other, installed, "--version"], timeout=120).returncode
        if not works:
            pytest.skip("no setpriv, or an interpreter that no other user can run")
    else:
        subprocess.run(["chmod", "-R", "a-w", str(packages)], check=True, timeout=300)
    before = sorted(packages.rglob("*"))
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o1777)
        clean = {"PATH": "/usr/bin:/bin", "TMPDIR": scratch, "HF_HUB_OFFLINE": "1"} | ({} if home is None else {"HOME": home})
        if not as_other:
            clean["XDG_CACHE_HOME"] = "/proc/nowhere"  # this user has a home, with or without HOME
        notes = []
        for _ in range(2):
            command = [*as_other, str(installed), "demo", "--json"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=1500, cwd=scratch, env=clean)
            demo(done)
            notes.append([line for line in done.stderr.splitlines() if "cannot be kept" in line])
        # A number that no list of users knows has no home to begin with: the folder that passes is then its own.
        assert [len(lines) for lines in notes] == [0 if home is None and as_other else 1, 0]
    assert sorted(packages.rglob("*")) == before
