"""Documents that cannot go stale: the reference is generated, the README's blocks run or parse."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from swapless.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _commands(text: str, program: str) -> list[list[str]]:
    lines = [line.removeprefix("$ ") for block in _blocks(text, "sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ")]


def test_the_first_commands_are_demo_and_test():
    assert [line.split("#")[0].split() for line in _blocks(README, "sh")[0].splitlines()] == [
        ["make", "demo"],
        ["make", "test"],
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_in_the_text_exist(page):
    for command in _commands(page.read_text(encoding="utf-8"), "make"):
        assert {word for word in command[1:] if "=" not in word} <= TARGETS, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_exist(page):
    verbs = typer.main.get_command(app).commands
    for command in _commands(page.read_text(encoding="utf-8"), "swapless"):
        assert command[1] in verbs or command[1] in ("--help", "--version"), command
        if command[1] in verbs:
            known = {name for parameter in verbs[command[1]].params for name in parameter.opts} | {"--help"}
            assert {word.partition("=")[0] for word in command[2:] if re.match("--[a-z]", word)} <= known, command


def test_python_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = _blocks(README, "python")
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_local_links_lead_somewhere():
    dead = [
        (page.name, link)
        for page in PAGES
        for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / link).exists()
    ]
    assert not dead


def test_the_reference_of_the_command_line_is_fresh():
    command = [sys.executable, "-m", "typer", "swapless.cli.main", "utils", "docs", "--name", "swapless"]
    fresh = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").strip() == fresh.strip(), "run make docs"
