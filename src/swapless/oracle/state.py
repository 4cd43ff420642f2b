"""What a sequence carries from one call to the next besides keys and values: its document, and what its routers remember."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from swapless.arrays import want
from swapless.errors import UnsupportedOperationError, message
from swapless.oracle._kernels import FIRST, follow_documents

__all__ = ["Documents", "OracleCache", "RouterState", "follow"]

RouterState = dict[str, Tensor]
"""One MoE layer's memory: tensors whose first axis is the sequence, by name. It lives on the CPU, beside the scans."""


class Documents(NamedTuple):
    """Where each token of a call stands; all int64 ndarrays of shape (B, N), -1 marking padding in the first three.

    ``number`` of its document in the sequence, ``start`` key of that document, ``grouped_from`` the same without the first
    key of the sequence (the attention sink), ``rank`` keys attended to, ``hashed`` first tokens, ``restart`` 1 where a
    document begins, 0 within, -1 for padding. ``past`` counts the keys before the call.
    """

    number: np.ndarray
    start: np.ndarray
    grouped_from: np.ndarray
    rank: np.ndarray
    hashed: np.ndarray
    restart: np.ndarray
    past: int


def follow(
    ids_BN: Tensor | None, valid_BN: Tensor, end: int | None, past: int, state_B7: Tensor | None
) -> tuple[Documents, Tensor]:
    """Number the documents of a call and return them with the state after it.

    Parameters
    ----------
    ids_BN : Tensor or None
        Token ids; without them (embeddings were given) nothing ends a document.
    valid_BN : Tensor of bool
        False for padding.
    end : int or None
        The token that ends a document and belongs to it.
    past : int
        Keys before the call, padding included.
    state_B7 : Tensor or None
        From the call before; None at the beginning. It is left as it is.
    """
    valid = valid_BN.cpu().numpy()
    ids = np.zeros(valid.shape, np.int64) if ids_BN is None else ids_BN.detach().cpu().numpy()
    if state_B7 is None:
        state_B7 = torch.zeros((len(valid), 7), dtype=torch.int64)
        state_B7[:, 3] = -1
    state_B7 = state_B7.clone()
    want(ids, "input_ids", (np.int32, np.int64), valid.shape)
    want(state_B7.numpy(), "documents so far", np.int64, (len(valid), 7))
    number, start, rank, hashed = (np.empty(valid.shape, np.int64) for _ in range(4))
    ends = -1 if end is None or ids_BN is None else end
    follow_documents(ids, valid, ends, past, state_B7.numpy(), number, start, rank, hashed)
    first = state_B7.numpy()[:, FIRST][:, None]
    restart = np.where(number < 0, -1, start == past + np.arange(valid.shape[1])).astype(np.int64)
    return Documents(number, start, np.where(start == first, start + 1, start), rank, hashed, restart, past), state_B7


class OracleCache(DynamicCache):
    """The KV cache of the family, and with it the state of every router; both grow, split and reorder together.

    Parameters
    ----------
    config : OracleMoeConfig
        Shape of the model.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.documents: Tensor | None = None
        self.routers: list[RouterState] = [{} for _ in config.moe_blocks]

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.documents is not None:
            self.documents = change(self.documents)
        self.routers = [{name: change(tensor) for name, tensor in state.items()} for state in self.routers]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the sequences in another order, some of them twice, as beam search asks."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        super().batch_select_indices(indices)
        self._each(lambda tensor: tensor[indices.to(tensor.device)])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.documents = None
        self.routers = [{} for _ in self.routers]

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a running mean cannot be taken back.

        Raises
        ------
        UnsupportedOperationError
            Always, but for 0 tokens.
        """
        if tokens_to_remove:
            raise UnsupportedOperationError(
                message(
                    "An Oracle-MoE cannot take tokens back: its groups keep means, not tokens.",
                    step="Generate without an assistant model, or compute the shorter text anew.",
                )
            )

    @property
    def is_croppable(self) -> bool:
        """Never."""
        return False
