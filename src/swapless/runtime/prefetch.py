"""What ``prefetch`` may be: the routers of the next layers, or a saved predictor, which must be of this model."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import final

import numpy as np
from transformers import PreTrainedModel

from swapless.errors import CheckpointError, PredictorMismatchError, UsageError, message
from swapless.notation import NO_EXPERT
from swapless.predict.saved import load_predictor, read_header
from swapless.predict.token_stream import TokenStream, open_stream
from swapless.predict.vocabulary import Vocabulary
from swapless.runtime.ahead import Lookahead
from swapless.runtime.door import tokenizer_of
from swapless.runtime.lookahead import GateLookahead
from swapless.runtime.open import OpenCheckpoint
from swapless.runtime.parts import AUTO_PREFETCH, gate_leads
from swapless.runtime.predicted import LAYERS_AHEAD, PredictedLookahead

_KNOWN_SHARE = 0.5
"""Of a predictor's vocabulary that the model's tokenizer must know: another tokenizer shares its plain English words."""


class Prefetch(ABC):
    """What was asked for, checked as far as headers go.

    Attributes
    ----------
    leads : list of int
        How many MoE layers ahead may be read, each once.
    if_worth : bool
        Whether it is left out where it would take too many slots from the cache, or where a router cannot be asked.
    notes : tuple of str
        What the user should know, a sentence each.
    """

    leads: list[int]
    if_worth: bool = False
    notes: tuple[str, ...] = ()

    def read(self) -> None:
        """Take what it takes of memory without a model; :meth:`open` does it otherwise."""
        return

    @abstractmethod
    def open(self, model: PreTrainedModel) -> Lookahead:
        """Make it ready; call it after a dry run."""

    def growth_bytes(self, context_tokens: int) -> int:
        """What it may yet add, once read, to the process while a document of so many tokens runs."""
        return 0


def prefetch_of(prefetch: str | Path | None, opened: OpenCheckpoint, model_id: str) -> Prefetch | None:
    """The source of look-ahead that ``prefetch`` names.

    Parameters
    ----------
    prefetch : str or Path or None
        ``"auto"``, ``"gate"``, ``"gate:N"``, or a file of a saved predictor; ``"none"`` is None.
    opened : OpenCheckpoint
        The checkpoint.
    model_id : str
        What traces call it.

    Raises
    ------
    UsageError
        Neither, or a predictor of a kind that cannot follow a running model.
    PredictorError
        Not a predictor's file; :class:`~swapless.errors.PredictorMismatchError` if it is of another model.
    """
    if prefetch is None or prefetch == "none":
        return None
    if prefetch == AUTO_PREFETCH:
        return _Gate([1], if_worth=True)
    if str(prefetch).partition(":")[0] == "gate":
        return _Gate(gate_leads(str(prefetch)))
    if not Path(prefetch).is_file():
        what = "Unknown prefetch, and no file of that name."
        allowed = '"auto", "none", "gate", "gate:N", or the file of a saved predictor'
        raise UsageError(message(what, got=repr(str(prefetch)), allowed=allowed, step="Make one: swapless predict train."))
    return _Saved(Path(prefetch), opened, model_id)


@final
class _Gate(Prefetch):
    def __init__(self, leads: list[int], *, if_worth: bool = False) -> None:
        self.leads, self.if_worth = leads, if_worth

    def open(self, model: PreTrainedModel) -> Lookahead:
        return GateLookahead(model, self.leads, required=not self.if_worth)


@final
class _Saved(Prefetch):
    def __init__(self, path: Path, opened: OpenCheckpoint, model_id: str) -> None:
        self.leads = list(range(1, LAYERS_AHEAD + 1))
        self._path, self._opened = path, opened
        header, layers = read_header(path), opened.layout.moe_layers
        for key, what, ours in (
            ("num_moe_layers", "MoE layers", len(layers)),
            ("num_experts", "experts a MoE layer", max(layer.num_experts for layer in layers)),
            ("top_k", "experts a token", opened.experts_a_token // len(layers)),
        ):
            if header.get(key) != ours:
                raise self._mismatch(f"The predictor's model has another number of {what}.", header.get(key), ours)
        trained_for = header.get("model_id")
        names = {model_id, opened.folder.resolve().name}
        if opened.manifest is not None:
            names.add(opened.manifest.source["name"])
        if trained_for is None:
            self.notes = (f"The predictor {path.name} names no model; shapes agree, and it is taken for this one.",)
        elif _last(trained_for) not in {_last(name) for name in names}:
            step = "Train one for this model: swapless predict train. If it is the same model, give its folder that name."
            raise self._mismatch("The predictor was fitted for another model.", trained_for, " or ".join(sorted(names)), step)

    def read(self) -> None:
        self._stream = open_stream(load_predictor(self._path))
        gc.collect()  # what training had and a stream has not

    def open(self, model: PreTrainedModel) -> Lookahead:
        if not hasattr(self, "_stream"):
            self.read()
        stream = self._stream
        token = self._naming(stream.vocabulary, model)
        _rehearse(stream, token(-1))
        return PredictedLookahead(stream, token)

    def growth_bytes(self, context_tokens: int) -> int:
        return self._stream.growth_bytes(context_tokens)

    def _naming(self, vocabulary: Vocabulary | None, model: PreTrainedModel) -> Callable[[int], str | int]:
        """From token ids to the predictor's words."""
        if vocabulary is None:
            return lambda number: number
        if vocabulary.kind == "token_id":
            size = model.config.get_text_config().vocab_size
            if max(vocabulary.words, default=0) >= size:
                what = "The predictor has token ids that this model has not."
                raise self._mismatch(what, max(vocabulary.words), f"below {size}")
            return lambda number: number
        texts = self._texts(vocabulary)
        return lambda number: texts[number] if 0 <= number < len(texts) else ""

    def _texts(self, vocabulary: Vocabulary) -> list[str]:
        """Text of every token id as the predictor's trace had it: as the tokenizer keeps it, or as it decodes it."""
        folder = self._opened.folder
        try:
            tokenizer = tokenizer_of(folder)
        except CheckpointError as error:
            what = "The predictor reads token texts, and the tokenizer of this checkpoint cannot be read."
            step = "Put the tokenizer's files beside config.json, or train a predictor on a trace with token ids."
            raise CheckpointError(message(what, where=folder, got=error, step=step)) from error
        words, share = set(vocabulary.words), 0.0
        for form in (tokenizer.convert_ids_to_tokens, lambda ids: [tokenizer.decode([number]) for number in ids]):
            texts = [text or "" for text in form(list(range(len(tokenizer))))]
            share = max(share, len(words.intersection(texts)) / max(1, len(words)))
            if share >= _KNOWN_SHARE:
                return texts
        what = "The predictor's tokens are not those of this model's tokenizer."
        raise self._mismatch(what, f"{share:.0%} of its {len(words)} words known", f"at least {_KNOWN_SHARE:.0%}")

    def _mismatch(self, what: str, got: object, allowed: object, step: str | None = None) -> PredictorMismatchError:
        step = step or "Train one for this model: swapless predict train."
        return PredictorMismatchError(message(what, where=self._path, got=got, allowed=allowed, step=step))


def _last(name: str) -> str:
    """Name of a model without its owner, since a folder on disk has none."""
    return name.rpartition("/")[2].casefold()


def _rehearse(stream: TokenStream, token: str | int) -> None:
    """Compile all that a token runs through: the first one must not pay for it."""
    shape = stream.fitted
    nothing = np.full((1, shape.num_moe_layers, shape.top_k), NO_EXPERT, np.int16)
    stream.take_in([token], nothing)
    stream.begin_token(token)
    for moe_layer in range(shape.num_moe_layers):
        stream.observe(moe_layer, nothing[0, moe_layer])
    stream.begin_document()
