"""Forward calls as steps: which phase, which documents, which rows are padding; seen from hooks on the whole model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from swapless.errors import ContextError, UnsupportedOperationError, message
from swapless.notation import Phase
from swapless.runtime.engine import Engine
from swapless.runtime.routing import Step
from swapless.runtime.rows import single_rows


class StepHooks:
    """Tells the engine where a forward call begins and ends, and keeps the documents of the batch apart.

    A call whose KV cache is empty begins new documents, one a sequence; a later call with one token a sequence is decode.

    Parameters
    ----------
    engine : Engine
        What is told.
    context_tokens : int
        Most tokens a sequence may have, prompt and generated ones.
    rounded : bool
        Whether the model's weights are, so that a step of a single row need not keep the last bit of torch's products.

    Attributes
    ----------
    rounded : bool
        As above; may be changed between steps.
    """

    def __init__(self, engine: Engine, context_tokens: int, *, rounded: bool) -> None:
        self._engine = engine
        self._context_tokens = context_tokens
        self.rounded = rounded
        self._single_row = False
        self._first_document = 0
        self._length = np.zeros(0, np.int32)

    def attach(self, model: torch.nn.Module) -> None:
        """Hook ``model``; the hooks live as long as it does."""
        self._signature = inspect.signature(type(model).forward)
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after, with_kwargs=True)
        model.forward = MethodType(self._forward_of(type(model)), model)  # a method, so that a copy of the model has its own

    def _before(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._single_row = False
        if callable(get_eval_frame_callback()):  # torch.compile leaves out what it cannot trace, and never says that it did
            raise UnsupportedOperationError(
                message("An offloaded model cannot be compiled: its experts are read while it runs.", step="Leave compile out.")
            )
        given = self._signature.bind_partial(model, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        tokens = ids if ids is not None else embeds
        if tokens is None:
            return
        batch, length = tokens.shape[:2]
        past = given.get("past_key_values")
        past_length = int(past.get_seq_length()) if past is not None and hasattr(past, "get_seq_length") else 0
        if past_length + length > self._context_tokens:
            raise ContextError(
                message(
                    "More tokens than the context that the memory budget was made for.",
                    got=f"{past_length + length} tokens",
                    allowed=f"{self._context_tokens} tokens",
                    step="Load with a larger context, or shorten the prompt or --max-new-tokens.",
                )
            )
        if past_length == 0 or batch != len(self._length):
            self._first_document += len(self._length)
            self._length = np.zeros(batch, np.int32)
        phase = Phase.DECODE if past_length and length == 1 else Phase.PREFILL
        valid = np.ones((batch, length), bool)
        mask = given.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[0] == batch and mask.shape[1] >= length:
            valid = mask[:, -length:].bool().numpy()
        position = self._length[:, None] + np.cumsum(valid, axis=1, dtype=np.int32) - valid
        self._length = self._length + valid.sum(axis=1, dtype=np.int32)
        document = np.repeat(np.arange(batch, dtype=np.int32) + self._first_document, length)
        token_id = None if ids is None else ids.reshape(-1).numpy().astype(np.int32)
        self._engine.begin_step(Step(phase, document, position.reshape(-1).astype(np.int32), valid.reshape(-1), token_id))
        self._single_row = self.rounded and phase is Phase.DECODE and batch == 1

    def _after(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._engine.end_step()

    def _forward_of(self, cls: type[torch.nn.Module]) -> Callable[..., Any]:
        """Forward of ``cls``, a single row in the way that is fast for it. A hook could not undo that: Ctrl-C passes it by."""

        @functools.wraps(cls.forward)
        def forward(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            with single_rows() if self._single_row else nullcontext():
                return cls.forward(model, *args, **kwargs)

        return forward
