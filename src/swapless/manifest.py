"""Files that are whole or not there: write under a temporary name, flush, rename; a folder's manifest comes last."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path`` and rename it only once it is safely on disk.

    State changes only on success: after an exception (Ctrl-C and a full disk included) the temporary file is gone and an
    older ``path`` is as it was.
    """
    final = Path(path)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], document: Any) -> None:
    """Write ``document`` as JSON, whole or not at all."""
    write_whole(path, lambda part: part.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8"))
