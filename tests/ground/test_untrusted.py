"""The door for untrusted JSON: what it lets through, what it refuses, and that neither takes long."""

from __future__ import annotations

import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swapless.errors import CheckpointCorruptError, TraceFormatError, UsageError, message
from swapless.untrusted import Table, parse_json, read_json, shown

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(_JSON)
def test_what_json_is_comes_through_as_the_library_reads_it(value):
    text = json.dumps(value)
    assert parse_json(text, where="x") == json.loads(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"b": {"a": 1, "a": 1}}', "stands twice"),
        ("[" * 100_000, "nested more than 64"),
        ("[" * 100_000 + "]" * 100_000, "nested more than 64"),
        ('{"a":' * 100_000, "nested more than 64"),
        ("9" * 5000, "more than 64 bits"),
        ("-9223372036854775809", "more than 64 bits"),
        ("1e999", "not finite"),
        ("NaN", "no number"),
        ("[-Infinity]", "no number"),
        (b"\xff\xfe", "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
    ],
)
def test_what_is_refused(text, why):
    with pytest.raises(TraceFormatError, match=why) as caught:
        parse_json(text, where="some.file", error=TraceFormatError)
    assert "some.file" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_brackets_in_texts_are_no_depth():
    assert parse_json(json.dumps(["[" * 1000, '\\"[' * 100]), where="x") == ["[" * 1000, '\\"[' * 100]


@pytest.mark.parametrize("text", ['"' + '\\"' * 500_000, '["' * 500_000, '"a' * 1_000_001])
def test_an_open_text_is_looked_at_once(text):
    started = time.process_time()
    with pytest.raises(CheckpointCorruptError):
        parse_json(text, where="x")
    assert time.process_time() - started < 5


def test_special_floats_where_they_are_asked_for():
    assert parse_json("[Infinity, -Infinity]", where="x", special_floats=True) == [float("inf"), float("-inf")]


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointCorruptError, match="not a regular file"):
        read_json(tmp_path / "config.json", what="configuration")
    with pytest.raises(CheckpointCorruptError, match="not a regular file"):
        read_json("/dev/zero")
    (tmp_path / "large.json").write_text("[" + "1," * 100 + "1]")
    with pytest.raises(CheckpointCorruptError, match="too large"):
        read_json(tmp_path / "large.json", max_bytes=100)


@pytest.mark.parametrize(
    "ask",
    [
        lambda t: t.integer("number", minimum=4),
        lambda t: t.integer("truth"),
        lambda t: t.integer("half"),
        lambda t: t.number("word"),
        lambda t: t.number("truth"),
        lambda t: t.text("number"),
        lambda t: t.text("word", choices=("a", "b")),
        lambda t: t.text("word", pattern="[0-9]+"),
        lambda t: t.text("word", maximum=1),
        lambda t: t.flag("number"),
        lambda t: t.items("number"),
        lambda t: t.items("list", maximum=1),
        lambda t: t.integers("list", maximum=1),
        lambda t: t.texts("list"),
        lambda t: t.tables("list"),
        lambda t: t.table("list"),
        lambda t: t.integer("missing"),
        lambda t: t.only("number"),
    ],
)
def test_a_wrong_value_names_file_key_and_what_is_allowed(ask):
    table = Table({"inner": {"number": 3, "truth": True, "half": 0.5, "word": "abc", "list": [1, 2]}}, where="a/b.json").table(
        "inner"
    )
    with pytest.raises(CheckpointCorruptError, match=r"inner.*Where: a/b\.json.*Got: .*Allowed: "):
        ask(table)


def test_defaults_stand_in_for_what_is_missing_and_not_for_what_is_wrong():
    table = Table({"word": None}, where="x")
    assert table.integer("missing", default=None) is None
    assert table.text("missing", default="z") == "z"
    with pytest.raises(CheckpointCorruptError):
        table.text("word", default="z")


def test_what_messages_show_is_short_and_has_no_control_characters():
    assert shown({"a": "\x1b[2J" * 100}).isprintable()
    assert len(shown("a" * 1000)) < 100


def test_messages_are_safe_for_a_terminal():
    text = str(UsageError(message("A name.", where="a\x1b[2J\x07", got="\u202eb\ud800")))
    assert text == "A name. Where: a\\x1b[2J\\x07. Got: \\u202eb\\ud800."
