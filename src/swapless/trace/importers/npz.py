"""An ``.npz`` of expert ids: ``expert_ids`` [T, L, K], ``offsets`` [D + 1], ``num_experts``; the rest is optional.

Optional: ``moe_blocks`` [L], ``domain`` [D] or [T], ``phase`` (one, or [T]), ``token_id`` [T], ``gate_weights`` [T, L, K].
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np

from swapless.errors import TraceFormatError, TraceValueError, message
from swapless.trace.header import TraceHeader
from swapless.trace.parquet import ALWAYS_BYTES, MOST_GROWTH, decoding
from swapless.trace.trace import Trace
from swapless.untrusted import shown

REQUIRED = ("expert_ids", "num_experts")
_FORMS = {
    "expert_ids": ((3,), "iu"),
    "num_experts": ((0,), "iu"),
    "offsets": ((1,), "iu"),
    "moe_blocks": ((1,), "iu"),
    "domain": ((1,), "Uiu"),
    "phase": ((0, 1), "Uiu"),
    "token_id": ((1,), "iu"),
    "gate_weights": ((2, 3), "fiu"),
}
"""Dimensions and kinds of each array that there may be."""


def matches(path: Path) -> bool:
    """Whether ``path`` is a zip archive of arrays, whole or not."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return True  # cut short or changed: nothing else that we read begins so


def load(path: Path, model_id: str | None = None) -> Trace:
    """The trace of an archive; without ``offsets`` all tokens are one document, without ``phase`` they are decode.

    Raises
    ------
    TraceFormatError
        Not such an archive, an array missing, unknown, or of the wrong shape.
    TraceValueError
        Offsets that do not run from 0 to T, an empty document, and all that a trace refuses.
    """
    with decoding(path, "Not an .npz archive of plain arrays."):
        _check_members(path)
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    missing = [name for name in REQUIRED if name not in arrays]
    unknown = [name for name in arrays if name not in _FORMS]
    if missing or unknown:
        got = f"missing {', '.join(missing) or 'none'}, unknown {', '.join(shown(name)[1:-1] for name in unknown) or 'none'}"
        raise TraceFormatError(message("The arrays of the archive are not those of a trace.", where=path, got=got))
    for name, array in arrays.items():
        dimensions, kinds = _FORMS[name]
        if array.ndim not in dimensions or array.dtype.kind not in kinds:
            what, got = f"{name} has the wrong shape or type.", f"{array.dtype} {array.shape}"
            raise TraceFormatError(message(what, where=path, got=got, step="See docs/formats/trace.md."))
    ids = arrays["expert_ids"]
    offsets = arrays.get("offsets", np.array([0, len(ids)])).astype(np.int64)
    steps = np.diff(offsets)
    if len(steps) == 0 or offsets[0] != 0 or offsets[-1] != len(ids):
        got, allowed = offsets[:8].tolist(), f"0 to {len(ids)}"
        raise TraceValueError(message("offsets must run from 0 to T.", where=path, got=got, allowed=allowed))
    if steps.min() < 1:
        where = f"{path}, document {int(np.argmax(steps < 1))}"
        raise TraceValueError(message("A document without tokens, or offsets that fall.", where=where))
    document = np.repeat(np.arange(len(steps)), steps)
    domain = arrays.get("domain")
    if domain is not None and len(domain) == len(steps) and len(steps) != len(ids):
        domain = domain[document]
    phase = arrays.get("phase", np.array("decode"))
    header = TraceHeader(
        model_id=model_id,
        num_experts=int(arrays["num_experts"]),
        top_k=ids.shape[2],
        moe_blocks=tuple(arrays.get("moe_blocks", np.arange(ids.shape[1])).tolist()),
        source="npz archive",
    )
    with decoding(path, "The arrays of the archive are not those of a trace."):
        return Trace.from_arrays(
            header,
            expert_ids=ids,
            document=document,
            domain=None if domain is None else [str(name) for name in domain],
            phase=phase.item() if phase.ndim == 0 else phase,
            token_id=arrays.get("token_id"),
            gate_weights=arrays.get("gate_weights"),
        )


def _check_members(path: Path) -> None:
    """Refuse an archive whose arrays claim more values than it holds, or that would grow beyond all measure."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > 2 * len(_FORMS) or len({member.filename for member in members}) != len(members):
            what = "The archive holds more files than a trace has arrays, or one twice."
            raise TraceFormatError(message(what, where=path, got=len(members)))
        total = sum(member.file_size for member in members)
        if total > max(ALWAYS_BYTES, MOST_GROWTH * path.stat().st_size):
            what, allowed = "The archive would grow beyond all measure.", f"up to {MOST_GROWTH} times its size"
            raise TraceFormatError(message(what, where=path, got=f"{total} bytes", allowed=allowed))
        for member in members:
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            if math.prod(shape) * max(dtype.itemsize, 1) > member.file_size:
                what, got = "An array of the archive claims more values than it has.", f"{shape} in {member.file_size} bytes"
                raise TraceFormatError(message(what, where=f"{shown(member.filename)[1:-1]} in {path}", got=got))


class IMPORTER:
    """What the registry hands out."""

    reads = "an archive of the arrays expert_ids, offsets and num_experts"
    matches = staticmethod(matches)
    load = staticmethod(load)
