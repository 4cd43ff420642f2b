"""An ``.npz`` of expert ids: ``expert_ids`` [T, L, K], ``offsets`` [D + 1], ``num_experts``; the rest is optional.

Optional: ``moe_blocks`` [L], ``domain`` [D] or [T], ``phase`` (one, or [T]), ``token_id`` [T], ``gate_weights`` [T, L, K].
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from swapless.errors import TraceFormatError, TraceValueError, message
from swapless.trace.header import TraceHeader
from swapless.trace.trace import Trace

REQUIRED = ("expert_ids", "num_experts")
OPTIONAL = ("offsets", "moe_blocks", "domain", "phase", "token_id", "gate_weights")


def matches(path: Path) -> bool:
    """Whether ``path`` is a zip archive that holds ``expert_ids``."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "expert_ids.npy" in archive.namelist()


def load(path: Path, model_id: str | None = None) -> Trace:
    """The trace of an archive; without ``offsets`` all tokens are one document, without ``phase`` they are decode.

    Raises
    ------
    TraceFormatError
        Not such an archive, an array missing, unknown, or of the wrong shape.
    TraceValueError
        Offsets that do not run from 0 to T, an empty document, and all that a trace refuses.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise TraceFormatError(message("Not an .npz archive of plain arrays.", where=path, got=str(error))) from error
    missing = [name for name in REQUIRED if name not in arrays]
    unknown = [name for name in arrays if name not in (*REQUIRED, *OPTIONAL)]
    if missing or unknown:
        got = f"missing {', '.join(missing) or 'none'}, unknown {', '.join(unknown) or 'none'}"
        raise TraceFormatError(message("The arrays of the archive are not those of a trace.", where=path, got=got))
    ids = arrays["expert_ids"]
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        got = f"{ids.dtype} {ids.shape}"
        raise TraceFormatError(message("expert_ids must be integers of shape [T, L, K].", where=path, got=got))
    offsets = arrays.get("offsets", np.array([0, len(ids)]))
    plain = offsets.ndim == 1 and offsets.dtype.kind in "iu"
    steps = np.diff(offsets.astype(np.int64)) if plain else np.zeros(0, np.int64)
    if len(steps) == 0 or offsets[0] != 0 or offsets[-1] != len(ids):
        got = offsets[:8].tolist() if offsets.ndim == 1 else offsets.shape
        raise TraceValueError(message("offsets must run from 0 to T.", where=path, got=got, allowed=f"0 to {len(ids)}"))
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
    return Trace.from_arrays(
        header,
        expert_ids=ids,
        document=document,
        domain=None if domain is None else [str(name) for name in domain],
        phase=phase.item() if phase.ndim == 0 else phase,
        token_id=arrays.get("token_id"),
        gate_weights=arrays.get("gate_weights"),
    )


class IMPORTER:
    """What the registry hands out."""

    matches = staticmethod(matches)
    load = staticmethod(load)
