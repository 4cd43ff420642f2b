"""The door to the compiler: what a key is made of, and files that are whole or count as not there."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from swapless import compiled_store as store
from swapless.compiled import kernel, rule
from swapless.compiled_key import Parts, Unknown, digest, source_files, sources_digest

FACTOR = 3


def helper(x):
    return x * FACTOR


_helper = kernel()(helper)


def times(x):
    return _helper(x) + 1


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder, and a folder for temporary files that is as empty."""
    monkeypatch.setenv("SWAPLESS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    forget()
    yield tmp_path / "cache" / "code"
    monkeypatch.undo()
    forget()


def forget() -> None:
    """What a process finds out once about the folders."""
    store._roots.cache_clear()
    store._first_writable.cache_clear()
    store._unwritable.clear()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def fresh(function: Any = times, **options: Any) -> Any:
    return kernel(**options)(function)


def hits(function: Any) -> int:
    return sum(function.stats.cache_hits.values())


def test_what_is_compiled_is_found_by_the_next(folder):
    first = fresh()
    assert first(5) == 16 and hits(first) == 0
    kept = files(folder)
    assert len(kept) == 2 and all(path.stat().st_mode & 0o77 == 0 for path in (folder, *kept[0].parents[:1]))
    second = fresh()
    assert second(5) == 16 and hits(second) == 1
    assert files(folder) == kept
    assert second(5.0) == 16.0 and len(files(folder)) > 2  # other types, another file


def broken(data: bytes) -> list[bytes]:
    flipped = bytearray(data)
    flipped[-200] ^= 1
    nonsense = b"cnowhere\nnothing\n."  # a pickle of a module that is not there
    return [b"", data[:10], data[: len(data) // 2], data[:-1], data + b"\0", bytes(flipped), data[:16] + bytes(32), nonsense]


def test_a_broken_file_counts_as_not_there_and_is_replaced(folder):
    assert fresh()(5) == 16
    (path,) = [path for path in files(folder) if path.name.startswith("times")]
    whole = path.read_bytes()
    for data in broken(whole):
        path.write_bytes(data)
        again = fresh()
        assert again(5) == 16 and hits(again) == 0
        replaced = path.read_bytes()
        assert replaced not in broken(whole)
        found = fresh()
        assert found(5) == 16 and hits(found) == 1


def test_a_whole_file_that_cannot_be_read_is_replaced(folder):
    assert fresh()(5) == 16
    (path,) = [path for path in files(folder) if path.name.startswith("times")]
    name = path.relative_to(folder / digest()).as_posix()
    for content in (b"cnowhere\nnothing\n.", b"", b"N.", b"(I1\nI2\nt."):
        path.unlink()
        store.write(digest(), name, content)
        again = fresh()
        assert again(5) == 16 and hits(again) == 0
        found = fresh()
        assert found(5) == 16 and hits(found) == 1


def test_exchanged_files_are_not_run(folder):
    other = fresh(helper)
    assert fresh()(5) == 16 and other(5) == 15
    (first,) = [path for path in files(folder) if path.name.startswith("times")]
    (second,) = [path for path in files(folder) if path.name.startswith("helper")]
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    assert fresh()(5) == 16 and fresh(helper)(5) == 15


def test_a_folder_or_a_pipe_in_the_place_of_a_file(folder, caplog):
    assert fresh()(5) == 16
    (path,) = [path for path in files(folder) if path.name.startswith("times")]
    path.unlink()
    os.mkfifo(path)
    assert fresh()(5) == 16 and path.is_file()  # a pipe is replaced
    path.unlink()
    path.mkdir()
    assert fresh()(5) == 16
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_changed_constant_of_what_is_inlined_is_another_key(folder, monkeypatch):
    assert fresh()(5) == 16
    changed = kernel()(helper)
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 4)
    monkeypatch.setattr(sys.modules[__name__], "_helper", changed)
    assert fresh()(5) == 21


def test_options_are_part_of_the_key(folder):
    def divide(x, y):
        return x / y

    with pytest.raises(ZeroDivisionError):
        fresh(divide)(1.0, 0.0)
    assert fresh(divide, error_model="numpy")(1.0, 0.0) == np.inf


def test_what_is_closed_over_is_part_of_the_key(folder):
    def adding(number):
        def add(x):
            return x + number

        return fresh(add)

    assert [adding(number)(1) for number in (1, 2, np.int64(3))] == [2, 3, 4]


class State(NamedTuple):
    numbers: np.ndarray


def asked(state):
    raise TypeError


def first_number(state):
    return state.numbers[0]


def ask(state):
    return asked(state)


rule(asked, State, first_number, {})


def test_a_rule_is_part_of_what_asks_for_it(folder):
    from numba import typeof

    state = State(np.array([7, 8]))
    assert fresh(ask)(state) == 7
    parts = Parts(ask, [typeof(state)])
    assert parts.from_outside
    without = hashlib.sha256(b"").hexdigest()
    assert parts.hexdigest() != Parts(ask, [typeof(state.numbers)]).hexdigest() != without


def test_a_state_that_no_import_finds_is_not_kept(folder):
    class Hidden(NamedTuple):
        numbers: np.ndarray

    from numba import typeof

    rule(asked, Hidden, first_number, {})
    state = Hidden(np.array([7, 8]))
    assert fresh(ask)(state) == 7 and not files(folder)
    with pytest.raises(Unknown, match="Hidden"):
        Parts(ask, [typeof(state)])


def test_keys_are_the_same_in_every_process(tmp_path):
    script = (
        "from swapless.compiled_key import Parts, options_text\n"
        "from swapless.cache import serve, _next_use\nfrom swapless.predict import _network_kernels\n"
        "from swapless.runtime.kernels_vector import block_product, rounding\n"
        "from swapless.store import quantize\n"
        "for part in (serve.serve, _next_use.take_in, _network_kernels.read, quantize._quantize_4):\n"
        "    print(Parts(part.py_func, ()).hexdigest(), options_text(part.targetoptions))\n"
        "for part in (block_product(8, 1), block_product(4, 1), rounding()):\n"
        "    print(Parts(part, ()).hexdigest(), 'outside' * Parts(part, ()).from_outside)\n"
    )
    said = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        said.add(done.stdout)
    (found,) = said
    assert len(set(found.splitlines())) == 7 and "outside" not in found


def test_every_source_that_may_take_part_is_in_the_digest(tmp_path):
    package = Path(store.__file__).parent
    names = [name for name, _ in source_files(package)]
    for needed in ("notation.py", "cache/lru.py", "store/matrix.py", "runtime/kernels_code.py", "compiled_key.py"):
        assert needed in names
    assert not [name for name in names if name.startswith(("cli/", "report/"))]


def test_a_digest_tells_contents_names_and_their_order_apart(tmp_path):
    found = [sources_digest(tmp_path)]
    for name, text in (("b.py", "1"), ("a.py", ""), ("a.py", "1"), ("b.py", ""), ("cache/c.py", "1"), ("a.txt", "1")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (1000, 1000))
        found.append(sources_digest(tmp_path))
    assert found[0] is None and len(set(found)) == 6 and found[-1] == found[-2]


def test_states_of_the_sources_are_bounded(folder):
    for number in range(store.STATES_KEPT + 3):
        store.write(f"state{number}", "name.code", b"content")
        os.utime(folder / f"state{number}", (1000 + number, 1000 + number))
    left = sorted(path.name for path in folder.iterdir())
    assert left == [f"state{number}" for number in range(3, store.STATES_KEPT + 3)]
    assert store.read("state0", "name.code") is None  # and a process of that state goes on
    store.write("state0", "name.code", b"content")
    assert store.read("state0", "name.code") == b"content"


def test_code_of_plug_ins_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(store, "PLUGIN_FILES_KEPT", 3)
    for number in range(5):
        store.write("state", f"plugins/{number}.code", b"content")
        os.utime(folder / "state" / "plugins" / f"{number}.code", (1000 + number, 1000 + number))
    assert [path.stem for path in files(folder)] == ["2", "3", "4"]
    assert store.read("state", "plugins/4.code") == b"content"


def test_what_a_killed_process_left_goes_in_time(folder):
    store.write("old", "name.code", b"content")
    parts = [folder / "old" / f".name.code.{age}.part" for age in (0, 7200)]
    for age, part in zip((0, 7200), parts, strict=True):
        part.write_bytes(b"half")
        os.utime(part, (time.time() - age, time.time() - age))
    store.write("new", "name.code", b"content")
    assert [part.exists() for part in parts] == [True, False]


def test_a_folder_that_others_can_write_to_is_neither_read_nor_written(folder, caplog):
    store.write("state", "name.code", b"content")
    folder.chmod(0o777)
    forget()
    assert store.read("state", "name.code") is None
    store.write("state", "name.code", b"other")
    assert len(caplog.records) == 1 and "others can write" in caplog.text
    assert store.read("state", "name.code") == b"other"  # in the folder that passes
    folder.chmod(0o700)
    forget()
    assert store.read("state", "name.code") == b"content"


def test_a_folder_that_passes_must_be_ours_too(folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("SWAPLESS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_text("in the way")
    mine = tmp_path / "tmp" / f"swapless-{os.getuid()}"
    target = tmp_path / "elsewhere"
    for number, make in enumerate((lambda: mine.symlink_to(target), lambda: mine.mkdir() or mine.chmod(0o777))):
        target.mkdir(exist_ok=True)
        make()
        forget()
        store.write("state", "name.code", b"content")
        assert store.read("state", "name.code") is None and not files(tmp_path / "tmp") and not files(target)
        assert len(caplog.records) == number + 1 and "anew in every process" in caplog.text
        mine.unlink() if mine.is_symlink() else mine.rmdir()


def test_a_full_disk_is_said_once(folder, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    for name in ("a.code", "b.code"):
        store.write("state", name, b"content")
    assert len(caplog.records) == 1 and "full" in caplog.text
    assert not files(folder)


def test_a_long_wait_is_said_once(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "swapless")
    monkeypatch.setattr(store, "_LONG_S", 0.0)
    waiting = store.Waiting()
    for owner in ("a", "b"):
        waiting.begin(owner)
        waiting.begin("inner")
        waiting.end("inner")
        if waiting._begun is not None:
            waiting._begun[2].join()
        waiting.end(owner)
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_a_short_wait_is_not_said(caplog):
    caplog.set_level(logging.INFO, "swapless")
    waiting = store.Waiting()
    waiting.begin("a")
    waiting.end("a")
    assert waiting._begun is None and not caplog.records
