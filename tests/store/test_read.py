"""The read path: any range of a file, direct or buffered, and a typed error for whatever may happen to a file in use."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from swapless.errors import CheckpointMissingError, ReadError
from swapless.store.read import BLOCK_BYTES, HUGE_PAGE_BYTES, FileReader, aligned_buffer, buffer_bytes

SIZE = 5 * BLOCK_BYTES + 777
TMPFS = Path("/dev/shm")

RANGES = {
    "a whole block": (BLOCK_BYTES, BLOCK_BYTES),
    "8-byte aligned": (8, 1000),
    "odd": (4097, 3),
    "over a block boundary": (BLOCK_BYTES - 5, 10),
    "many blocks, unaligned at both ends": (123, 4 * BLOCK_BYTES),
    "the unaligned tail": (5 * BLOCK_BYTES + 700, 77),
    "the last byte": (SIZE - 1, 1),
    "everything": (0, SIZE),
}


@pytest.fixture
def content() -> bytes:
    return np.random.default_rng(0).bytes(SIZE)


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(content)
    return path


def read(reader: FileReader, path: Path, offset: int, nbytes: int) -> bytes:
    return reader.read(path, offset, nbytes, aligned_buffer(nbytes + 2 * BLOCK_BYTES)).tobytes()


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def reader(request: pytest.FixtureRequest, file: Path):
    reader = FileReader([file], direct=request.param)
    yield reader
    reader.close()


@pytest.mark.parametrize(("offset", "nbytes"), RANGES.values(), ids=RANGES.keys())
def test_any_range(reader: FileReader, file: Path, content: bytes, offset: int, nbytes: int) -> None:
    assert read(reader, file, offset, nbytes) == content[offset : offset + nbytes]


def test_a_range_lies_where_it_was_promised(reader: FileReader, file: Path) -> None:
    buffer = aligned_buffer(3 * BLOCK_BYTES)
    view = reader.read(file, 8, 100, buffer)
    assert np.shares_memory(view, buffer)
    assert view.shape == (100,) and view.dtype == np.uint8


@pytest.mark.parametrize("nbytes", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1, 1 << 20, 2 << 20, 3 << 20])
def test_buffers_are_aligned_to_pages_and_writable(nbytes: int) -> None:
    buffer = aligned_buffer(nbytes)
    assert buffer.ctypes.data % BLOCK_BYTES == 0
    assert buffer.nbytes >= nbytes and buffer.nbytes % BLOCK_BYTES == 0 and buffer.nbytes > 0
    assert buffer.nbytes == buffer_bytes(nbytes)
    buffer[:] = 7
    assert int(buffer[-1]) == 7


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs an operating system with huge pages on demand")
def test_large_buffers_are_whole_huge_pages() -> None:
    for nbytes in ((1 << 20) + 1, HUGE_PAGE_BYTES + 1):
        buffer = aligned_buffer(nbytes)
        assert buffer.ctypes.data % HUGE_PAGE_BYTES == 0 and buffer.nbytes % HUGE_PAGE_BYTES == 0


def test_several_threads_at_once(reader: FileReader, file: Path, content: bytes) -> None:
    wrong: list[tuple[int, int]] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(50):
            offset = int(rng.integers(SIZE - 1))
            nbytes = int(rng.integers(1, SIZE - offset + 1))
            if read(reader, file, offset, nbytes) != content[offset : offset + nbytes]:
                wrong.append((offset, nbytes))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_truncated_in_use(reader: FileReader, file: Path) -> None:
    os.truncate(file, BLOCK_BYTES)
    with pytest.raises(ReadError, match=f"truncated.*{file}.*{BLOCK_BYTES} of {SIZE}"):
        read(reader, file, 0, 100)


def test_unlinked_in_use(reader: FileReader, file: Path) -> None:
    file.unlink()
    with pytest.raises(ReadError, match="unlinked or replaced"):
        read(reader, file, 0, 100)


def test_replaced_in_use(reader: FileReader, file: Path, content: bytes, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(content[::-1])
    other.replace(file)
    with pytest.raises(ReadError, match="unlinked or replaced"):
        read(reader, file, 0, 100)


@pytest.mark.parametrize("same_size", [True, False], ids=["same size", "longer"])
def test_written_to_in_use(reader: FileReader, file: Path, same_size: bool) -> None:
    with open(file, "r+b" if same_size else "ab") as handle:
        handle.write(b"changed")
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))  # clocks of file systems may tick slowly
    with pytest.raises(ReadError, match="written to"):
        read(reader, file, 0, 100)


def test_a_range_beyond_the_end(reader: FileReader, file: Path) -> None:
    with pytest.raises(ReadError, match=f"shorter.*at least {SIZE + 100}"):
        read(reader, file, SIZE - 100, 200)


def test_errors_are_those_that_callers_of_files_catch(reader: FileReader, file: Path) -> None:
    file.unlink()
    with pytest.raises(OSError):
        read(reader, file, 0, 1)


def test_a_file_that_is_not_there(tmp_path: Path, file: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    with pytest.raises(CheckpointMissingError, match="missing"):
        FileReader([file, tmp_path / "missing"])
    assert not before or len(list(Path("/proc/self/fd").iterdir())) == before, "a descriptor was left open"


def test_close_closes_and_may_be_repeated(file: Path) -> None:
    reader = FileReader([file])
    reader.close()
    reader.close()
    with pytest.raises(KeyError):
        reader.read(file, 0, 1, aligned_buffer(3 * BLOCK_BYTES))


@pytest.mark.skipif(not TMPFS.is_dir() or not os.access(TMPFS, os.W_OK), reason="no writable tmpfs at /dev/shm")
def test_tmpfs_is_read_buffered_or_direct_but_right(content: bytes) -> None:
    # Old kernels refuse direct I/O on tmpfs when the file is opened, new ones allow it: either way the bytes come.
    path = TMPFS / f"swapless-test-{os.getpid()}"
    path.write_bytes(content)
    try:
        reader = FileReader([path])
        for offset, nbytes in RANGES.values():
            assert read(reader, path, offset, nbytes) == content[offset : offset + nbytes]
        probe = os.O_RDONLY | os.O_DIRECT
        try:
            os.close(os.open(path, probe))
        except OSError:
            assert not reader.direct
        reader.close()
    finally:
        path.unlink()
