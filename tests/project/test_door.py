"""Every use of transformers' private interface sits in runtime/door, so that a new release breaks one folder."""

from __future__ import annotations

import ast
from pathlib import Path

import swapless

SOURCES = Path(swapless.__file__).parent
DOOR = SOURCES / "runtime" / "door"
PRIVATE = (
    "transformers.conversion_mapping",
    "transformers.core_model_loading",
    "transformers.integrations",
    "transformers.modeling_utils",
    "transformers.models",
)


def private_imports(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        found += [name for name in names if name.startswith(PRIVATE)]
    return found


def test_the_door_is_the_only_place() -> None:
    elsewhere = {
        str(file.relative_to(SOURCES)): names
        for file in SOURCES.rglob("*.py")
        if not file.is_relative_to(DOOR) and (names := private_imports(file))
    }
    assert elsewhere == {}


def test_the_door_is_where_they_are() -> None:
    assert {name for file in DOOR.glob("*.py") for name in private_imports(file)} >= {
        "transformers.conversion_mapping",
        "transformers.core_model_loading",
        "transformers.integrations.moe",
    }
