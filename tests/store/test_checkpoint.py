"""The checkpoint store: parts of an expert, near and far, in one file and in several, end up where the slot wants them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from swapless.errors import ReadError
from swapless.store.checkpoint import SLOT_ALIGNMENT, CheckpointStore, Extent, ParameterSource, cut
from swapless.store.probe import DEPTHS, probe
from swapless.store.read import BLOCK_BYTES, FileReader, aligned_buffer

FAR = 1 << 20


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    paths = tmp_path / "one", tmp_path / "two"
    for path in paths:
        path.write_bytes(rng.bytes(3 * FAR))
    return paths


def store_of(files: tuple[Path, Path], sources: list[ParameterSource]) -> CheckpointStore:
    return CheckpointStore(lambda moe_layer, expert: sources, FileReader(files), [(0, 0)])


def fill(store: CheckpointStore, slot_bytes: int) -> tuple[np.ndarray, int]:
    slot = aligned_buffer(slot_bytes)
    slot[:] = 0
    return slot, store.read(0, 0, slot, store.bounce_buffer())


def test_parts_side_by_side_are_one_read(files: tuple[Path, Path]) -> None:
    one, _ = files
    sources = [
        ParameterSource((Extent(one, 1000, 500), Extent(one, 3000, 700)), 0, 1200),
        ParameterSource((Extent(one, 1500, 300),), 1216, 300),
    ]
    store = store_of(files, sources)
    assert store.extents(0, 0) == [Extent(one, 1000, 2700)]
    slot, fetched = fill(store, 2 * BLOCK_BYTES)
    raw = one.read_bytes()
    assert slot[:1200].tobytes() == raw[1000:1500] + raw[3000:3700]
    assert slot[1216:1516].tobytes() == raw[1500:1800]
    assert not slot[1200:1216].any() and not slot[1516:].any(), "bytes outside the parameters were touched"
    assert fetched == 2700


def test_parts_far_apart_or_in_two_files_are_read_apart(files: tuple[Path, Path]) -> None:
    one, two = files
    sources = [ParameterSource((Extent(two, 13, 5000), Extent(one, 8, 4096), Extent(one, 2 * FAR + 1, 777)), 0, 9873)]
    store = store_of(files, sources)
    assert len(store.extents(0, 0)) == 3
    slot, fetched = fill(store, 3 * BLOCK_BYTES)
    a, b = one.read_bytes(), two.read_bytes()
    assert slot[:9873].tobytes() == b[13:5013] + a[8:4104] + a[2 * FAR + 1 : 2 * FAR + 778]
    assert fetched == 9873


def test_a_conversion_gets_the_parts_in_their_order(files: tuple[Path, Path]) -> None:
    one, two = files

    def add(parts: list[np.ndarray], out: np.ndarray) -> None:
        out[:] = parts[0] + parts[1] * 2

    store = store_of(files, [ParameterSource((Extent(two, 5, 64), Extent(one, 9, 64)), SLOT_ALIGNMENT, 64, add)])
    slot, _ = fill(store, BLOCK_BYTES)
    a, b = (np.frombuffer(path.read_bytes(), np.uint8) for path in files)
    assert np.array_equal(slot[64:128], b[5:69] + a[9:73] * 2)


def test_the_bounce_buffer_fits_every_expert_not_just_the_first(files: tuple[Path, Path]) -> None:
    one, two = files
    plans = {
        (0, 0): [ParameterSource((Extent(one, 0, 100), Extent(one, 100, 100)), 0, 200)],
        (0, 1): [ParameterSource((Extent(one, 5000, 100_000), Extent(two, 4095, 100_000)), 0, 200_000)],
    }
    store = CheckpointStore(lambda moe_layer, expert: plans[moe_layer, expert], FileReader(files), plans)
    slot, bounce = aligned_buffer(200_000), store.bounce_buffer()
    assert store.read(0, 1, slot, bounce) == 200_000
    assert slot[:200_000].tobytes() == one.read_bytes()[5000:105_000] + two.read_bytes()[4095:104_095]


def test_probe_reads_what_it_is_given_and_says_so(files: tuple[Path, Path]) -> None:
    reader = FileReader(files)
    extents = [Extent(path, offset, 20_000) for path in files for offset in range(8, FAR, 50_000)]
    measured = probe(reader, extents, budget_s=0.03)
    assert measured.block_bytes == 20_000
    assert sorted(measured.bytes_per_s) == list(DEPTHS) and min(measured.bytes_per_s.values()) > 0
    assert measured.depth in DEPTHS and measured.best_bytes_per_s == measured.bytes_per_s[measured.depth]
    assert measured.fixed_s > 0 and measured.direct == reader.direct
    assert probe(reader, extents, copied=True, budget_s=0.03).depth >= 2, "one reads while the other copies"
    reader.close()


def test_probe_raises_what_its_threads_meet(files: tuple[Path, Path]) -> None:
    reader = FileReader(files)
    files[1].unlink()
    with pytest.raises(ReadError, match="unlinked"):
        probe(reader, [Extent(files[1], 8, 4096)], budget_s=0.03)
    reader.close()


@pytest.mark.parametrize("first,nbytes", [(0, 900), (0, 100), (100, 0), (99, 2), (100, 300), (399, 501), (450, 10)])
def test_a_range_of_extents_is_cut_out(first: int, nbytes: int, files: tuple[Path, Path]) -> None:
    extents = [Extent(files[0], 7, 100), Extent(files[1], 1000, 300), Extent(files[0], 107, 500)]

    def content(parts: object) -> bytes:
        return b"".join(path.read_bytes()[offset : offset + size] for path, offset, size in parts)

    found = cut(extents, first, nbytes)
    assert content(found) == content(extents)[first : first + nbytes]
    assert all(extent.nbytes for extent in found)


def test_what_is_fetched_is_placed_later(files: tuple[Path, Path]) -> None:
    one, two = files
    sources = [ParameterSource((Extent(two, 13, 5000), Extent(one, 8, 4096)), 0, 9096)]
    store = CheckpointStore(lambda moe_layer, expert: sources, FileReader(files), [(0, 0)], most_parts=1)
    slot, bounce = np.zeros(9096, np.uint8), store.bounce_buffer()
    fetched = store.fetch_part(0, 0, 0, bounce)
    assert store.parts(0, 0) == 1 and fetched.nbytes == 9096 and not slot.any()
    fetched.place(slot)
    assert slot.tobytes() == two.read_bytes()[13:5013] + one.read_bytes()[8:4104]
