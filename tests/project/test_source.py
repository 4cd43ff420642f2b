"""House rules that a reader relies on: small files, a sentence on every public thing, exports that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from swapless import errors

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src" / "swapless").rglob("*.py"))
ALL = [
    *SOURCES,
    *(file for folder in ("tests", "benchmarks", "training", "examples") for file in sorted((ROOT / folder).rglob("*.py"))),
]
MOST_LINES = {"src": 400, "tests": 500, "benchmarks": 500, "training": 500, "examples": 500}


def _name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_no_file_is_long():
    lines = {_name(file): len(file.read_text(encoding="utf-8").splitlines()) for file in ALL}
    long = {name: count for name, count in lines.items() if count > MOST_LINES[name.split("/")[0]]}
    assert not long


def _public(node: ast.Module | ast.ClassDef, path: str) -> Iterator[tuple[str, str | None]]:
    yield path, ast.get_docstring(node)
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not child.name.startswith("_"):
            overloaded = any(
                "overload" in ast.unparse(decorator) or "setter" in ast.unparse(decorator) for decorator in child.decorator_list
            )
            if not overloaded:
                yield f"{path}.{child.name}", ast.get_docstring(child)
        elif isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from _public(child, f"{path}.{child.name}")


@pytest.mark.parametrize("file", SOURCES, ids=_name)
def test_everything_public_has_a_summary(file):
    found = list(_public(ast.parse(file.read_text(encoding="utf-8")), file.stem))
    bare = [path for path, text in found if not text or not re.search(r"[.:!?)`]$", text.split("\n\n")[0].strip())]
    assert not bare, f"without a summary sentence: {bare}"


@pytest.mark.parametrize("file", [file for file in SOURCES if "__all__" in file.read_text(encoding="utf-8")], ids=_name)
def test_exports_exist(file):
    parts = file.relative_to(ROOT / "src").with_suffix("").parts
    module = import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    assert len(set(module.__all__)) == len(module.__all__)
    assert not [name for name in module.__all__ if not hasattr(module, name)]


def _drawn() -> dict[str, tuple[str, list[str]]]:
    """Class name to parent and extra bases, as the docstring of ``errors`` draws them."""
    tree, stack = {}, []
    for line in errors.__doc__.splitlines():
        match = re.match(r"^    ((?:[| ]   )*(?:[|`]-- )?)([A-Z]\w*Error)(?: \(([\w, ]+)\))?", line)
        if match:
            depth = len(match[1]) // 4
            del stack[depth:]
            tree[match[2]] = (stack[-1] if stack else "Exception", re.split(", *", match[3]) if match[3] else [])
            stack.append(match[2])
    return tree


def test_the_drawn_tree_of_errors_is_the_real_one():
    real = {
        name: (item.__bases__[0].__name__, [base.__name__ for base in item.__bases__[1:]])
        for name, item in vars(errors).items()
        if isinstance(item, type) and issubclass(item, errors.SwaplessError)
    }
    assert _drawn() == real


def test_nothing_names_a_machine():
    marks = ("/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/")
    texts = [
        *(file for file in ALL if "tests" not in file.parts),
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        ROOT / "Makefile",
        ROOT / "pyproject.toml",
    ]
    assert not [(_name(file), mark) for file in texts for mark in marks if mark in file.read_text(encoding="utf-8")]
