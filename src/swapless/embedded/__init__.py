"""The embedded default: a small MoE language model that the project trained itself, shipped inside the package.

The folder that :func:`path` names is an ordinary Hugging Face checkpoint (``config.json``, ``model.safetensors`` and the
tokenizer) with its model card beside it; nothing about it is special to this project.
"""

from __future__ import annotations

from pathlib import Path

from swapless.errors import CheckpointMissingError, UnknownNameError, message

__all__ = ["TWINS", "path", "twin"]

TWINS = ("switch", "theme-gate")
"""Routers of the two twins: a learned gate that looks at the token, and one that looks at the theme of the text."""


def path() -> Path:
    """Folder of the embedded checkpoint.

    Raises
    ------
    CheckpointMissingError
        The package was installed without its model.

    Examples
    --------
    >>> (path() / "config.json").is_file()
    True
    """
    folder = Path(__file__).parent
    if not (folder / "config.json").is_file():
        raise CheckpointMissingError(
            message(
                "The embedded model is not part of this installation.",
                where=folder / "config.json",
                step="Install the wheel, or train it with training/train_embedded.py.",
            )
        )
    return folder


def twin(router: str) -> Path:
    """Folder of one of the twins of :mod:`swapless.oracle`, which differ in their router alone.

    Raises
    ------
    UnknownNameError
        There is no twin of that router.

    Examples
    --------
    >>> (twin("switch") / "config.json").is_file()
    True
    """
    if router not in TWINS:
        raise UnknownNameError.of("twin", router, TWINS)
    return path() / "twins" / router
