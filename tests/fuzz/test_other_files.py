"""Files of figures, and the folders of the embedded twins, made wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.fuzz.checkpoints import header_of, shard_of
from tests.fuzz.figures import count
from tests.fuzz.mutations import Mutation, bounded, byte_mutations, json_mutations
from tests.fuzz.readers import figures_kept, twin_computes

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("SWAPLESS_FUZZ_SEED", "0"))
MORE = int(os.environ.get("SWAPLESS_FUZZ_TIMES", "1"))

FIGURES = {
    "format_version": 4,
    "identity": {"cpu": "a processor", "cores": 2, "memory_bytes": 2**33, "processor_quota": None},
    "reads": [
        {"block_bytes": 1 << 20, "bytes_per_s": {"1": 1e9, "4": 2e9}, "fixed_s": 1e-4, "depth": 4, "direct": True},
        {"block_bytes": 4 << 20, "bytes_per_s": {"1": 1e9}, "fixed_s": 0.0, "depth": 1, "direct": False},
    ],
    "copy_bytes_per_s": 5e9,
    "memory_bytes_per_s": 9e9,
    "weights_per_s": {"bf16": 1e9, "expert int4": 2e9},
    "base_bytes": 300_000_000,
    "loading_bytes": 1_000_000,
}


def test_figures_of_a_machine(tmp_path: Path) -> None:
    path, raw, wrong = tmp_path / "machine.json", json.dumps(FIGURES).encode(), []
    path.write_bytes(raw)
    assert bounded(figures_kept, str(path), seconds=60).value is not None
    for mutation in json_mutations(FIGURES, 90 * MORE, seed=SEED + 40) + byte_mutations(raw, 30 * MORE, seed=SEED + 41):
        path.write_bytes(mutation.raw)
        outcome = bounded(figures_kept, str(path))
        ended = outcome.kind if not outcome.held else "measured anew" if outcome.value is None else "figures that can be"
        count("machine.json", ended, outcome)
        if outcome.kind != "value":
            wrong.append(f"{mutation.name}: {outcome}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("twin", ["switch", "theme-gate"])
def test_twins(twin: str, tmp_path: Path) -> None:
    from swapless import embedded

    good = Path(embedded.path()) / "twins" / twin
    folder, wrong = Path(shutil.copytree(good, tmp_path / "twin")), []
    assert bounded(twin_computes, str(folder), seconds=120).kind == "value"
    config, shard = json.loads((good / "config.json").read_text()), (good / "model.safetensors").read_bytes()
    header, data = header_of(shard)
    changes = [("config.json", m) for m in json_mutations(config, 50 * MORE, seed=SEED + 42)]
    headers = json_mutations(header, 15 * MORE, seed=SEED + 43)
    changes += [("model.safetensors", Mutation(mutation.name, shard_of(mutation.raw, data))) for mutation in headers]
    for name, mutation in changes:
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(mutation.raw)
        outcome = bounded(twin_computes, str(folder))
        (folder / name).write_bytes(before)
        count(f"twins, {name}", {"typed": "refused by name", "value": "computes"}.get(outcome.kind, outcome.kind), outcome)
        if not outcome.held:
            wrong.append(f"{name}, {mutation.name}: {outcome.kind}, {outcome.detail[-900:]}")
    assert not wrong, f"{len(wrong)} wrong\n" + "\n".join(wrong)
