"""Imports point down only: the arrows of the house, read from the source with ``ast``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "swapless"
GROUND = {"notation", "units", "errors", "registry", "atomic", "untrusted", "folders", "processors", "control_groups", "locks"}
GROUND |= {"arrays", "content", "portable", "compiled", "compiled_key", "compiled_store", "onednn"}
ALLOWED = {
    "trace": set(),
    "store": set(),
    "embedded": set(),
    "locality": {"trace"},
    "cache": {"trace"},
    "predict": {"trace"},
    "runtime": {"store", "cache", "predict", "trace"},
    "plan": {"runtime", "store", "cache", "trace", "embedded"},
    "oracle": {"trace", "locality", "cache", "predict", "runtime"},
}
"""What each package may import besides itself and the ground floor; cli, report and testing see everything."""
TOP = {"cli", "report", "testing", "__main__.py"}


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and part of each import of our own in a file, wherever in it; '' is the package itself."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "swapless" else [module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "swapless":
                part = rest.partition(".")[0]
                yield node.lineno, part if (SOURCE / part).is_dir() or (SOURCE / f"{part}.py").is_file() else ""


@pytest.mark.parametrize(
    "package", sorted(path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__")
)
def test_a_package_imports_only_what_stands_below_it(package):
    assert package in ALLOWED or package in TOP, f"{package} has no place in the house"
    if package in TOP:
        return
    allowed = ALLOWED[package] | GROUND | {package}
    wrong = [
        f"{file.relative_to(SOURCE)}:{line} imports swapless{'.' if part else ''}{part}"
        for file in sorted((SOURCE / package).rglob("*.py"))
        for line, part in _imports(file)
        if part not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_the_ground_floor_imports_only_itself():
    wrong = [(name, part) for name in sorted(GROUND) for _, part in _imports(SOURCE / f"{name}.py") if part not in GROUND]
    assert not wrong


def test_nothing_imports_the_top():
    wrong = [
        f"{file.relative_to(SOURCE)}:{line}"
        for file in sorted(SOURCE.rglob("*.py"))
        for line, part in _imports(file)
        if part in TOP and file.relative_to(SOURCE).parts[0] not in TOP
    ]
    assert not wrong, wrong


NUMBA = {"compiled.py", "compiled_key.py", "predict/_network_kernels.py", "runtime/kernels_code.py", "runtime/kernels_tiles.py"}
"""The files that may name numba or llvmlite: the door to the compiler, and builders of code that Python cannot say."""


def test_one_door_to_the_compiler():
    named = set()
    for file in sorted(SOURCE.rglob("*.py")):
        name = file.relative_to(SOURCE).as_posix()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                modules, names = [node.module or ""], {alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                modules, names = [alias.name for alias in node.names], set()
            else:
                continue
            if {module.partition(".")[0] for module in modules} & {"numba", "llvmlite"}:
                named.add(name)
                compiles = names & {"njit", "jit", "cfunc", "vectorize", "guvectorize", "jitclass", "stencil", "generated_jit"}
                assert name == "compiled.py" or not compiles, f"{name}:{node.lineno} compiles on its own"
    assert named == NUMBA
