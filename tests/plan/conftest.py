"""A machine that nobody has measured, and checkpoints to plan for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from swapless import embedded
from swapless.atomic import write_json
from swapless.folders import cache_folder


def made_machine(**figures: Any) -> Any:
    """A machine with round figures."""
    from swapless.plan.machine import Machine
    from swapless.store.probe import Probe

    depths = {1: 5e8, 2: 1e9, 4: 1e9}
    reads = tuple(
        Probe(block_bytes=size, bytes_per_s=depths, fixed_s=1e-4, depth=2, direct=True) for size in (1 << 18, 1 << 20, 1 << 22)
    )
    given = {
        "identity": {},
        "reads": reads,
        "copy_bytes_per_s": 8e9,
        "memory_bytes_per_s": 15e9,
        "weights_per_s": {"bf16": 8e9, "expert int4": 14e9},
        "base_bytes": 300 << 20,
        "loading_bytes": 30 << 20,
    }
    return Machine(**given | figures)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The embedded checkpoint."""
    return embedded.path()


@pytest.fixture(scope="session")
def opened(checkpoint: Path) -> Any:
    """The same, opened."""
    from swapless.runtime.open import open_checkpoint

    return open_checkpoint(checkpoint)


@pytest.fixture
def kept_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with the figures of a made machine, under the identity of this one."""
    from swapless.plan.machine import identity

    folder = tmp_path / "cache" / "swapless"
    folder.mkdir(parents=True)
    code = cache_folder() / "code"
    code.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "code").symlink_to(code)  # or it would be compiled anew
    write_json(folder / "machine.json", made_machine(identity=identity()).to_dict())
    monkeypatch.setenv("SWAPLESS_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def sharded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint in three shards with an index."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("sharded")
    shutil.copy(checkpoint / "config.json", folder)
    tensors = load_file(checkpoint / "model.safetensors")
    weight_map = {key: f"model-{number % 3 + 1:05}-of-00003.safetensors" for number, key in enumerate(sorted(tensors))}
    for name in sorted(set(weight_map.values())):
        part = {key: tensors[key].clone() for key, shard in weight_map.items() if shard == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return folder
