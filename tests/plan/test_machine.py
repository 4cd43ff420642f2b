"""Figures of this machine: kept while they are of it, measured anew when it changes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from swapless.atomic import write_json
from swapless.errors import WriteError
from swapless.plan import machine as machine_module
from swapless.plan import products
from swapless.plan.crowd import Crowd
from swapless.plan.machine import Free, identity, machine, probe_disk, probe_files
from tests.fuzz.mutations import byte_mutations, json_mutations
from tests.plan.conftest import made_machine


def test_what_was_kept_is_taken(kept_machine: Path) -> None:
    found = machine()
    assert found == made_machine(identity=identity())
    assert found.read_at(900_000).block_bytes == 1 << 20


def test_identity_has_no_name_of_the_machine() -> None:
    assert os.uname().nodename not in json.dumps(identity()).split('"')


@pytest.mark.parametrize(
    "damage",
    ["not JSON", "[]", *(f'{{"format_version": {old}}}' for old in range(4)), '{"format_version": 4, "reads": [1]}'],
)
def test_a_damaged_file_is_as_none(damage: str, kept_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from swapless.plan.machine import _read

    (kept_machine / "machine.json").write_text(damage)
    assert _read(kept_machine / "machine.json") is None


def test_a_file_of_figures_that_was_changed_gives_good_figures_or_none(kept_machine: Path) -> None:
    from swapless.plan.machine import _read

    path = kept_machine / "machine.json"
    mutations = json_mutations(json.loads(path.read_text()), 200, seed=1) + byte_mutations(path.read_bytes(), 60, seed=2)
    taken = 0
    for mutation in mutations:
        path.write_bytes(mutation.raw)
        found = _read(path)
        if found is not None:
            taken += 1
            rates = [found.copy_bytes_per_s, found.memory_bytes_per_s, *found.weights_per_s.values()]
            rates += [rate for probe in found.reads for rate in probe.bytes_per_s.values()]
            assert all(type(rate) is float and 0 < rate < float("inf") for rate in rates), mutation.name
            assert all(probe.best_bytes_per_s and probe.block_bytes > 0 for probe in found.reads)
            assert found.base_bytes >= 0 and found.read_at(1 << 20)
    assert taken < len(mutations) / 2
    path.unlink()
    os.mkfifo(path)
    assert _read(path) is None, "nothing waits for a pipe"


class Measured(Exception):
    pass


@pytest.mark.parametrize(
    "key,value", [("cores", 999), ("processor_quota", 0.25), ("memory_limit_bytes", 1 << 20), ("threads", 77), ("cpu", "")]
)
def test_another_limit_of_the_container_is_another_machine(
    key: str, value: Any, kept_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object) -> Any:
        raise Measured

    monkeypatch.setattr(machine_module, "_measure", measure)
    assert machine() == made_machine(identity=identity())
    write_json(kept_machine / "machine.json", made_machine(identity=identity() | {key: value}).to_dict())
    with pytest.raises(Measured):
        machine()


def test_weights_are_timed_out_of_more_memory_than_the_last_cache_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "available_bytes", lambda: 8 << 30)
    assert products.cold_bytes(tmp_path) == 96 << 20, "where the kernel says nothing"
    for number, size in enumerate(("48K", "2048K", "516096K", "no size")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(f"{size}\n")
    assert products.cold_bytes(tmp_path) == 516096 * 1024 * 3 // 2
    monkeypatch.setattr(products, "available_bytes", lambda: 1 << 30)
    assert products.cold_bytes(tmp_path) == 256 << 20, "a quarter of what is free"


@pytest.mark.slow
def test_measured_kept_and_measured_anew(tmp_path: Path) -> None:
    quiet = {"least_share": 0.0, "most_taken": 1e9, "most_spread": 1e9}
    first = machine(folder=tmp_path, crowd=Crowd(**quiet))
    assert first.identity == identity() and first.base_bytes > 100 << 20
    assert all(rate > 1e7 for rate in first.weights_per_s.values())
    assert set(first.weights_per_s) == {"bf16", "int8", "int4", "expert bf16", "expert int8", "expert int4"}
    assert [file.name for file in tmp_path.iterdir()] == ["machine.json"], "nothing is left beside it"
    assert machine(folder=tmp_path) == first
    document = json.loads((tmp_path / "machine.json").read_text())
    document["identity"]["threads"] += 1
    (tmp_path / "machine.json").write_text(json.dumps(document))
    again = machine(folder=tmp_path, crowd=Crowd(**quiet))
    assert again.identity == identity() and again != first
    assert machine(folder=tmp_path, fresh=True, crowd=Crowd(**quiet)) != again


@pytest.mark.slow
def test_the_disk_is_probed_at_several_sizes(tmp_path: Path) -> None:
    found = probe_disk(tmp_path)
    assert [probe.block_bytes for probe in found] == [1 << 18, 1 << 20, 1 << 22]
    assert not list(tmp_path.iterdir())


def test_files_smaller_than_a_block_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x" * 5000)
    (tmp_path / "large").write_bytes(b"x" * 50_000)
    assert probe_files([tmp_path / "small", tmp_path / "large"], 8192, budget_s=0.01).bytes_per_s[1] > 0


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WriteError, match="SWAPLESS_CACHE_DIR"):
        machine(folder=tmp_path / "file" / "cache")


def test_what_is_free_is_asked_where_something_exists(tmp_path: Path) -> None:
    found = Free.of(tmp_path / "not" / "there")
    assert found.disk_bytes > 0 and 0 < found.memory_bytes <= found.limit_bytes
