"""What a file seems to hold, as messages that refuse it say."""

from __future__ import annotations

import io
import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from swapless.content import content_of


def saved(write):
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


LONG = json.dumps({"answers": ["x" * 50] * 3000}).encode()
CASES = {
    "empty": (b"", "an empty file"),
    "blank": (b" \n", "an empty text"),
    "object": (b'{"model": "m", "layers": [1]}', "a JSON object with the keys 'model', 'layers'"),
    "nothing in it": (b"{}", "a JSON object without keys"),
    "many keys": (json.dumps(dict.fromkeys("abcdefgh")).encode(), "'f' and 2 more"),
    "list": (b"[1, 2, 3]", "a JSON list of 3 entries"),
    "lines": (b'{"a": 1}\n{"b": 2}\n', "lines of JSON, the first an object with the keys 'a'"),
    "long lines": (b'{"a": 1}\n' * 20_000, "lines of JSON, the first an object with the keys 'a'"),
    "long": (LONG, "a large JSON document"),
    "half": (b'{"a": [1,', "a text that begins '{\"a\": [1,' and is no JSON"),
    "log": (b"INFO 12:00 layer 0 experts [1, 2]\nINFO 12:01 layer 1 experts [3, 4]\n", "a text that begins 'INFO 12:00"),
    "bracketed log": (b"[INFO] layer 0\n", "a text that begins '[INFO] layer 0' and is no JSON"),
    "prose": (b"Once upon a time, there was a cat.\nIt sat.\n", "a text that begins 'Once"),
    "commas": (b"layer,token,expert\n0,1,2\n", "lines with commas (CSV), the first 'layer', 'token', 'expert'"),
    "terminal": (b"\x1b[31mred", "a text that begins '\\x1b[31mred'"),
    "cut letter": ("ä".encode() * 40_000 + b"x", "a text that begins 'ä"),
    "latin": ("Zürich".encode("latin1"), "bytes of no form that is known here"),
    "zeros": (bytes(100), "bytes of no form that is known here"),
    "pickle": (pickle.dumps({"a": 1}), "a Python pickle"),
    "npy": (saved(lambda file: np.save(file, np.zeros(3))), "one NumPy array (.npy)"),
    "npz": (saved(lambda file: np.savez(file, a=np.zeros(3))), "a zip archive"),
    "pt": (saved(lambda file: torch.save(torch.zeros(3), file)), "a zip archive"),
    "safetensors": (save({"a": np.zeros(3)}), "a safetensors file"),
    "predictor": (save({"a": np.zeros(3)}, {"swapless.predictor": "{}"}), "a saved predictor"),
    "parquet": (b"PAR1....PAR1", "a Parquet table"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_file_holds(case, tmp_path):
    raw, said = CASES[case]
    (tmp_path / "x").write_bytes(raw)
    assert said in content_of(tmp_path / "x")


def test_what_is_no_file(tmp_path):
    assert content_of(tmp_path / "nowhere") == "nothing of that name"
    assert content_of(tmp_path) == "an empty folder"
    os.mkfifo(tmp_path / "pipe")
    assert content_of(tmp_path / "pipe") == content_of("/dev/zero") == "no regular file"
    assert content_of(tmp_path) == "a folder with 'pipe'"
    (tmp_path / "config.json").write_text("{}")
    assert content_of(tmp_path) == "a checkpoint folder"
    assert content_of("a\0b").startswith("what cannot be read")
