"""Traces made wrong: each ends in an error of ours, or in rows that can be: replayed and measured within seconds and bytes."""

from __future__ import annotations

import base64
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from swapless.trace import write_trace
from swapless.trace.parquet import HEADER_KEY
from tests.fuzz.figures import count
from tests.fuzz.mutations import Mutation, bounded, byte_mutations, json_mutations
from tests.fuzz.readers import trace_measured, trace_told
from tests.predict.made import made_trace

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("SWAPLESS_FUZZ_SEED", "0"))
MORE = int(os.environ.get("SWAPLESS_FUZZ_TIMES", "1"))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "trace.parquet"
    write_trace(path, made_trace(lengths=(30, 1, 20), domain="news", step=np.arange(51)), row_group_tokens=20)
    return path


def held(form: str, suffix: str, mutations: list[Mutation], tmp_path: Path) -> None:
    wrong = []
    for number, mutation in enumerate(mutations):
        path = tmp_path / f"changed{suffix}"
        path.write_bytes(mutation.raw)
        for asked in (trace_measured, trace_told)[: 2 if number % 6 == 0 else 1]:
            outcome = bounded(asked, str(path))
            kind = {"typed": "refused by name", "value": "read, within range"}.get(outcome.kind, outcome.kind)
            count(form, kind, outcome)
            if not outcome.held:
                wrong.append(f"{mutation.name}: {outcome.kind}, {outcome.detail[-700:]}")
    assert not wrong, f"{len(wrong)} wrong\n" + "\n".join(wrong)


def test_the_good_one_is_measured(parquet: Path) -> None:
    assert bounded(trace_measured, str(parquet), seconds=120).kind == "value"
    assert bounded(trace_told, str(parquet), seconds=120).value == "told"


def test_bytes_of_parquet(parquet: Path, tmp_path: Path) -> None:
    raw = parquet.read_bytes()
    footer = len(raw) - int.from_bytes(raw[-8:-4], "little") - 8
    mutations = byte_mutations(raw, 60 * MORE, seed=SEED + 30) + byte_mutations(raw, 60 * MORE, seed=SEED + 31, first=footer)
    held("Parquet, bytes", ".parquet", mutations, tmp_path)


def written(table: pa.Table, **how: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **how)
    return sink.getvalue()


def test_headers_of_parquet(parquet: Path, tmp_path: Path) -> None:
    table = pq.read_table(parquet)
    header = json.loads(table.schema.metadata[HEADER_KEY])
    mutations = [
        Mutation(name, written(table.replace_schema_metadata({HEADER_KEY: raw})))
        for name, raw in json_mutations(header, 80 * MORE, seed=SEED + 32)
    ]
    held("Parquet, header", ".parquet", mutations, tmp_path)


def odd_columns(name: str, column: Any, rng: np.random.Generator) -> Iterator[tuple[str, Any]]:
    rows = len(column)
    yield "nulls", pa.nulls(rows, column.type)
    yield "text", pa.array(["\x1b[31m\u202e"] * rows)
    yield "no UTF-8", pa.array([b"\xff\xfe\x80"] * rows).cast(pa.binary()).view(pa.string()) if rows else column
    yield "huge", pa.array(np.full(rows, 2**62))
    yield "negative", pa.array(np.full(rows, -5, np.int32))
    yield "numbers that are none", pa.array(np.full(rows, np.nan))
    yield "shuffled", column.take(pa.array(rng.permutation(rows)))
    yield "lists", pa.array([[1] * (row % 3) for row in range(rows)], pa.list_(pa.int16()))
    yield "structures", pa.array([{"a": 1}] * rows)
    yield "dictionary", pa.array(["x"] * rows).dictionary_encode()
    if pa.types.is_fixed_size_list(column.type):
        kind, size = column.type.value_type, column.type.list_size
        for what, value in (("beyond", 999), ("none", -1), ("below", -7), ("the same", 0)):
            flat = pa.array(np.full(rows * size, value)).cast(kind)
            yield what, pa.FixedSizeListArray.from_arrays(flat, size)
        flat = pa.array(np.zeros(rows * (size + 1), np.int16)).cast(kind)
        yield "one wider", pa.FixedSizeListArray.from_arrays(flat, size + 1)


def test_columns_of_parquet(parquet: Path, tmp_path: Path) -> None:
    table = pq.read_table(parquet).combine_chunks()
    rng, mutations = np.random.default_rng(SEED), []
    for place, name in enumerate(table.column_names):
        whole = table.column(name).combine_chunks()
        column = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
        for what, changed in odd_columns(name, column, rng):
            raw = written(table.set_column(place, name, changed))
            mutations.append(Mutation(f"{name}: {what}", raw))
        mutations.append(Mutation(f"{name} twice", written(table.append_column(name, column))))
        mutations.append(Mutation(f"{name} gone", written(table.remove_column(place))))
        mutations.append(
            Mutation(
                f"{name} renamed",
                written(table.rename_columns([*table.column_names[:place], "\x1b[2J", *table.column_names[place + 1 :]])),
            )
        )
    mutations.append(Mutation("no rows", written(table.slice(0, 0))))
    many = pa.concat_tables([table] * 4000).combine_chunks()
    mutations.append(Mutation("the same rows again and again", written(many, compression="zstd", use_dictionary=True)))
    held("Parquet, columns", ".parquet", mutations, tmp_path)


def test_a_bomb_is_refused(parquet: Path, tmp_path: Path) -> None:
    table = pq.read_table(parquet).slice(0, 1).combine_chunks()
    header = json.loads(table.schema.metadata[HEADER_KEY])
    rows = 4_000_000
    ids = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows * 64, np.int16)), 64)
    header |= {"top_k": 1, "moe_blocks": list(range(64)), "num_experts": 1}
    zeros = pa.array(np.zeros(rows, np.int32))
    phase = pa.array(np.full(rows, "decode")).dictionary_encode()
    bomb = pa.table(
        {"document": zeros, "position": pa.array(np.arange(rows, dtype=np.int32)), "phase": phase, "expert_ids": ids}
    )
    path = tmp_path / "bomb.parquet"
    pq.write_table(bomb.replace_schema_metadata({HEADER_KEY: json.dumps(header)}), path, compression="zstd")
    outcome = bounded(trace_measured, str(path))
    count("bombs", outcome.kind, outcome)
    assert outcome.kind == "typed", outcome


def npy(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


def zipped(members: dict[str, bytes], **how: Any) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", **how) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return sink.getvalue()


def claiming(shape: str, descr: str = "<i8", data: bytes = bytes(64)) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def archives() -> Iterator[Mutation]:
    trace = made_trace(lengths=(12, 5))
    good: dict[str, np.ndarray] = {
        "expert_ids": trace.expert_ids.astype(np.int64),
        "offsets": np.array([0, 12, 17]),
        "num_experts": np.array(8),
        "domain": np.array(["a", "b"]),
        "token_id": np.arange(17),
        "gate_weights": np.full(trace.expert_ids.shape, 0.5, np.float32),
    }
    members = {f"{name}.npy": npy(value) for name, value in good.items()}
    raw = zipped(members)
    yield Mutation("good", raw)
    yield from byte_mutations(raw, 70 * MORE, seed=SEED + 33)
    for name, value in good.items():
        changes: dict[str, Callable[[Any], Any]] = {
            "empty": lambda value: value.reshape(-1)[:0],
            "one dimension more": lambda value: value[None],
            "negative": lambda value: -np.ones(value.shape, np.int64),
            "huge": lambda value: np.full(value.shape, 2**62),
            "not finite": lambda value: np.full(value.shape, np.nan),
            "texts": lambda value: np.full(value.shape, "\x1b[2J\u202e"),
            "bytes": lambda value: np.full(value.shape, b"\xff"),
            "complex": lambda value: np.full(value.shape, 1j),
            "structured": lambda value: np.zeros(value.shape, [("a", "i4")]),
            "dates": lambda value: np.zeros(value.shape, "M8[s]"),
            "flags": lambda value: np.ones(value.shape, bool),
            "the other way round": lambda value: value[::-1] if value.ndim else value + 1,
            "no items": lambda value: np.zeros((*value.shape, 0)),
            "unsigned": lambda value: np.full(value.shape, 2**64 - 1, np.uint64),
        }
        for what, change in changes.items():
            yield Mutation(f"{name} {what}", zipped(members | {f"{name}.npy": npy(change(value))}))
        yield Mutation(f"{name} pickled", zipped(members | {f"{name}.npy": npy(np.array([{"a": 1}], dtype=object))}))
        for shape in ("(1000000000000, 4, 2)", "(-1,)", "(10**9,)", "()", "[3]", "(1.5,)", "(" * 300):
            yield Mutation(f"{name} claims {shape[:20]}", zipped(members | {f"{name}.npy": claiming(shape)}))
        for descr in ("|O", "<f9", "nonsense", "|V1000000000", "<U100000000"):
            yield Mutation(f"{name} is {descr}", zipped(members | {f"{name}.npy": claiming("(3,)", descr)}))
    zeros = claiming("(25000000, 4, 2)", "<i2", bytes(400_000_000))
    yield Mutation("a bomb", zipped(members | {"expert_ids.npy": zeros}, compression=zipfile.ZIP_DEFLATED))
    yield Mutation("a path out", zipped(members | {"../x.npy": npy(np.zeros(1))}))
    yield Mutation("no arrays", zipped({"x.txt": b"x"}))


def test_archives(tmp_path: Path) -> None:
    held("npz", ".npz", list(archives()), tmp_path)


def test_lines_of_servers(tmp_path: Path) -> None:
    trace = made_trace(lengths=(9,))
    ids = trace.expert_ids.astype(np.int16)
    text = base64.b64encode(npy(ids)).decode()
    answer = {
        "model": "a/model",
        "usage": {"prompt_tokens": 4, "completion_tokens": 5},
        "choices": [{"index": 0, "token_ids": [1, 2, 3, 4, 5], "routed_experts": text}],
        "prompt_token_ids": [1, 2, 3, 4],
    }
    plain = {"num_experts": 8, "top_k": 2, "num_blocks": 4, "model_id": "a/model"}
    row = {"prompt": "x", "routed_experts": ids.tolist(), "meta_info": {"prompt_tokens": 4, "completion_tokens": 6}}
    mutations = [
        Mutation(f"answer, {name}", json.dumps(plain).encode() + b"\n" + raw)
        for name, raw in json_mutations(answer, 50 * MORE, seed=SEED + 34)
    ]
    mutations += [
        Mutation(f"shape, {name}", raw + b"\n" + json.dumps(answer).encode())
        for name, raw in json_mutations(plain, 40 * MORE, seed=SEED + 35)
    ]
    mutations += [
        Mutation(f"line, {name}", json.dumps(plain).encode() + b"\n" + raw)
        for name, raw in json_mutations(row, 40 * MORE, seed=SEED + 36)
    ]
    held("answers of servers", ".jsonl", mutations, tmp_path)


def test_csv_files(tmp_path: Path) -> None:
    lines = ["Token,Layer ID,Activated Expert IDs"]
    for layer in (1, 2):
        lines += [f'w{token},{layer},"[{token % 7}, {token % 5 + 7}]"' for token in range(6)]
    raw = "\n".join(lines).encode()
    mutations = [Mutation("good", raw), *byte_mutations(raw, 60 * MORE, seed=SEED + 37)]
    for what, cell in {
        "deep": "[" * 5000,
        "long digits": "[" + "9" * 5000 + "]",
        "infinite": "[Infinity]",
        "text": "['a']",
        "empty": "[]",
        "huge": "[1e400, 2]",
        "negative": "[-1, 2]",
        "escapes": "\x1b[2J",
        "a quote": '""',
        "a megabyte": "[" + "1," * 500_000 + "1]",
        "zero byte": "[0\x00]",
    }.items():
        mutations.append(Mutation(f"ids {what}", raw.replace(b"[3, 10]", cell.encode(), 1)))
        mutations.append(Mutation(f"layer {what}", raw.replace(b"w3,1", b"w3," + cell.encode(), 1)))
    held("CSV", ".csv", mutations, tmp_path)
