"""A forward call of the whole model, read from its arguments: its sequences, what each continues, and what is padding."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch


def new_tokens(given: dict[str, Any]) -> torch.Tensor | None:
    """Ids (B, S) or embeddings (B, S, D) that the call is given; None if neither."""
    ids: torch.Tensor | None = given.get("input_ids")
    return ids if ids is not None else given.get("inputs_embeds")


def ids_of(given: dict[str, Any]) -> np.ndarray | None:
    """Token ids int32 (B, S), None where embeddings stand for them."""
    ids: torch.Tensor | None = given.get("input_ids")
    return None if ids is None else ids.detach().numpy().astype(np.int32)


def valid_places(mask: Any, batch: int, past: int, length: int) -> np.ndarray | None:
    """Which of the ``past + length`` places of each sequence are no padding, bool (B, past + length).

    Parameters
    ----------
    mask : Any
        The attention mask: 2 dimensions, of the new places or of all; or 4, of which the new places' view of themselves tells.

    Returns
    -------
    ndarray or None
        None where the mask does not tell. Of the past, a mask of the new places alone tells nothing: they count as valid.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return np.ones((batch, past + length), bool)
    if not isinstance(mask, torch.Tensor):
        return None
    valid = np.ones((batch, past + length), bool)
    if mask.dim() == 2 and mask.shape[0] == batch and mask.shape[1] >= length:
        known = min(mask.shape[1], past + length)
        valid[:, past + length - known :] = mask[:, mask.shape[1] - known :].bool().numpy()
        return valid
    if mask.dim() == 4 and mask.shape[2] == length and mask.shape[3] >= past + length:
        valid[:, past:] = _seen(mask, batch, past, length, back=0)
        return valid
    return None


def row_after_row(mask: Any, batch: int, past: int, length: int) -> bool:
    """Whether each new place that is no padding sees the one before it, as it does where a sequence is one text."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or length < 2 or mask.shape[3] < past + length:
        return True
    seen, itself = _seen(mask, batch, past, length, back=1), _seen(mask, batch, past, length, back=0)
    return bool((seen | ~itself[:, 1:] | ~itself[:, :-1]).all())


def _seen(mask: torch.Tensor, batch: int, past: int, length: int, *, back: int) -> np.ndarray:
    """Whether each new place sees the one ``back`` before it, bool (B, length - back)."""
    rows = torch.arange(back, length)
    seen = mask[:, 0, rows, past + rows - back]
    seen = seen if seen.dtype == torch.bool else seen > torch.finfo(torch.float16).min
    return np.asarray(seen.expand(batch, -1).numpy())


def packed_texts(given: dict[str, Any], batch: int, length: int, *, cached: bool) -> np.ndarray | None:
    """Number of the text that each place of a batch row belongs to, int64 (B, S), where several were packed into one row.

    transformers keeps them apart by positions that begin anew, and only without a mask and without a cache.
    """
    positions = given.get("position_ids")
    if cached or given.get("attention_mask") is not None or not isinstance(positions, torch.Tensor) or positions.dim() != 2:
        return None
    if positions.shape[1] != length:
        return None
    begins = np.diff(positions.numpy(), axis=1, prepend=positions[:, :1].numpy() - 1) != 1
    return np.broadcast_to(np.cumsum(begins, axis=1), (batch, length)) if begins.any() else None


class Paged(NamedTuple):
    """Where the rows of a continuously batched call are kept: ``write`` int64 (T,) places in the shared cache.

    ``first`` int64 (N,) is the first row of each sequence, ``position`` int64 (N,) that row's position, and ``before``
    int64 (N,) the place of the row before it, -1 where it is the first of its text.
    """

    cache: Any
    first: np.ndarray
    position: np.ndarray
    before: np.ndarray
    write: np.ndarray


def paged(given: dict[str, Any]) -> Paged | None:
    """The places of a continuously batched call; None of any other call."""
    if "write_index" not in given or "cu_seq_lens_q" not in given:
        return None
    starts = given["cu_seq_lens_q"].numpy().astype(np.int64)
    first = starts[:-1][np.diff(starts) > 0]
    position = given["position_ids"].reshape(-1).numpy()[first].astype(np.int64)
    before = np.full(len(first), -1)
    kinds = list(given["cache"].cache_allocators)
    kind = "full_attention" if "full_attention" in kinds else kinds[0]
    write, read = (given[name][kinds.index(kind)].numpy() for name in ("write_index", "read_index"))
    if len(read):
        lengths = np.diff(starts)
        last_kept = given["cu_seq_lens_k"][kind].numpy().astype(np.int64)[1:] - lengths - 1
        before[position > 0] = read[last_kept[lengths > 0][position > 0]]
    return Paged(given["cache"], first, position, before, write)
