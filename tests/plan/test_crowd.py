"""A busy machine is noticed: figures of it are shown with a word, and not kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from swapless.cli.main import app
from swapless.plan import machine as machine_module
from swapless.plan.crowd import Busy, Crowd, _Times, share_given, taken_by_others, used_ticks
from swapless.plan.machine import Machine, machine
from swapless.processors import processors
from tests.plan.conftest import made_machine

BUSY = Busy(processors=2, share=0.5, taken=1.25, apart=("the disk gave 1e+08 and 9e+08 bytes a second",))
ALWAYS, NEVER = {"least_share": 2.0}, {"least_share": 0.0, "most_taken": 1e9, "most_spread": 1e9}


def test_neighbours_on_every_processor_are_seen_by_each_sign() -> None:
    work = [sys.executable, "-c", "while True: sum(range(10_000_000))"]
    neighbours = [subprocess.Popen(work) for _ in range(2 * processors())]
    try:
        crowd = Crowd()
        with crowd.watching():
            crowd.look()
            share_given(1, seconds=0.5)
        found = crowd.found()
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    assert found is not None and found.share < 0.85, "two thirds of the time are theirs"
    assert found.taken is None or found.taken > 0.15 * processors(), "where the kernel says so"
    assert str(found).startswith("The machine is busy: this process got")


def test_our_own_work_is_not_a_neighbours() -> None:
    assert taken_by_others(_Times(0.0, 10.0, 1.0), _Times(2.0, 13.5, 4.5)) == 0.0
    assert taken_by_others(_Times(0.0, 10.0, 1.0), _Times(2.0, 13.5, 1.5)) == 1.5
    assert taken_by_others(_Times(0.0, 10.0, 1.0), _Times(2.0, 10.0, 1.5)) == 0.0, "clocks of different grain"
    assert taken_by_others(None, _Times(2.0, 13.5, 1.5)) is None


@pytest.mark.parametrize(
    "lines,found",
    [
        (["cpu0 1 2 3 400 50 6 7 8 9 10", "cpu1 1 1 1 1 1 1 1 1 1 1", "intr 5"], 1 + 2 + 3 + 6 + 7 + 8),
        (["cpu 1 2 3 400 50 6 7 8 9 10"], None),
        (["cpu0 0 0 0 400 50 0 0 0 0 0"], None),
        (["cpu0 1 2 3"], None),
        (["cpu0 a b c d e f g h"], None),
        ([], None),
    ],
)
def test_what_the_kernel_says_of_the_processors_that_are_ours(lines: list[str], found: int | None) -> None:
    assert used_ticks(lines, [0]) == found


def test_a_container_without_the_kernels_figures_has_the_other_signs(tmp_path: Path) -> None:
    crowd = Crowd(least_share=0.0, root=tmp_path)
    with crowd.watching():
        pass
    assert crowd.found() is None
    crowd.twice("the disk gave {:.3g} and {:.3g} bytes a second", 1e9, 2.9e9)
    assert crowd.found() is None
    crowd.twice("the disk gave {:.3g} and {:.3g} bytes a second", 1e8, 9e8)
    found = crowd.found()
    assert found is not None and found.taken is None
    assert "measured twice, the disk gave 1e+08 and 9e+08 bytes a second" in str(found)


def test_all_signs_are_told() -> None:
    assert str(BUSY) == (
        "The machine is busy: this process got 50% of the processor time it asked for; others used 1.2 of 2 processors; "
        "measured twice, the disk gave 1e+08 and 9e+08 bytes a second."
    )
    assert json.loads(json.dumps(BUSY.to_dict()))["taken"] == 1.25


def measured_as(monkeypatch: pytest.MonkeyPatch, **figures: Any) -> None:
    """Let measuring, which takes its time, come to made figures."""
    monkeypatch.setattr(machine_module, "_measure", lambda now, *_: made_machine(identity=now, **figures))


def test_what_was_measured_beside_others_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_as(monkeypatch, busy=BUSY)
    assert machine(folder=tmp_path).busy == BUSY and not list(tmp_path.iterdir())
    measured_as(monkeypatch)
    quiet = machine(folder=tmp_path)
    before = (tmp_path / "machine.json").read_bytes()
    measured_as(monkeypatch, busy=BUSY, base_bytes=1)
    assert machine(folder=tmp_path) == quiet, "what is kept is good"
    assert machine(folder=tmp_path, fresh=True).base_bytes == 1
    assert (tmp_path / "machine.json").read_bytes() == before, "what was kept stays"


def test_doctor_says_it(kept_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_as(monkeypatch, busy=BUSY)
    before = (kept_machine / "machine.json").read_bytes()
    said = CliRunner().invoke(app, ["doctor", "--fresh"])
    assert said.exit_code == 0 and "The machine is busy: this process got 50%" in said.stdout, said.output
    assert "not kept" in said.stdout
    document = json.loads(CliRunner().invoke(app, ["doctor", "--fresh", "--json"]).stdout)
    assert document["busy"] == BUSY.to_dict() | {"apart": list(BUSY.apart)} and document["kept_in"] is None
    assert (kept_machine / "machine.json").read_bytes() == before
    assert json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["busy"] is None


@pytest.mark.slow
def test_plan_says_it(kept_machine: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_as(monkeypatch, busy=BUSY)
    before = (kept_machine / "machine.json").read_bytes()
    arguments = ["plan", str(checkpoint), "--memory", "600MiB", "--context", "256", "--fresh"]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0 and "The machine is busy: this process got 50%" in said.stdout, said.output
    assert "not kept" in said.stdout
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["busy"]["share"] == 0.5
    assert (kept_machine / "machine.json").read_bytes() == before


@pytest.mark.slow
def test_a_crowd_decides_what_is_kept(tmp_path: Path) -> None:
    found: Machine = machine(folder=tmp_path, crowd=Crowd(**ALWAYS))
    assert found.busy is not None and not list(tmp_path.iterdir())
    found = machine(folder=tmp_path, crowd=Crowd(**NEVER))
    assert found.busy is None and machine(folder=tmp_path) == found
