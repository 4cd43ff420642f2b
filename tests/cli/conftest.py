"""The command line as its users call it, in this process, on the embedded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from swapless import embedded
from swapless.cli.main import app


@pytest.fixture(scope="session")
def checkpoint() -> str:
    """The embedded checkpoint: real weights, real text, some 10 MB."""
    return str(embedded.path())


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    return folder


@pytest.fixture(scope="session")
def endless(checkpoint, tmp_path_factory) -> str:
    """The same model without a token that ends a text: it writes until something stops it."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text(encoding="utf-8")) | {"eos_token_id": None}
        (folder / name).write_text(json.dumps(settings), encoding="utf-8")
    return str(folder)


@pytest.fixture
def sharded(copy) -> Path:
    """The same weights in three shards with an index."""
    from safetensors.torch import load_file, save_file

    whole = copy / "model.safetensors"
    tensors = load_file(whole)
    weight_map = {key: f"model-{number % 3 + 1:05}-of-00003.safetensors" for number, key in enumerate(sorted(tensors))}
    for name in sorted(set(weight_map.values())):
        part = {key: tensors[key].clone() for key, shard in weight_map.items() if shard == name}
        save_file(part, copy / name, metadata={"format": "pt"})
    del tensors
    whole.unlink()
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return copy


@pytest.fixture
def swapless():
    """Call the command line: ``swapless("run", ..., input="text")`` gives exit code, stdout and stderr."""
    import torch

    threads = torch.get_num_threads()

    def call(*arguments: object, **options):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)

    yield call
    torch.set_num_threads(threads)
