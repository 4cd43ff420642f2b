"""Token after token, one sequence: what a checkpoint's generation settings may ask for beyond that, and how it is left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

_PLAIN: dict[str, tuple[Any, str]] = {
    "num_beams": (1, "{} beams"),
    "num_beam_groups": (1, "{} groups of beams"),
    "num_return_sequences": (1, "{} answers to a prompt"),
    "penalty_alpha": (None, "contrastive search"),
    "constraints": (None, "constrained search"),
    "force_words_ids": (None, "words that must come"),
    "dola_layers": (None, "decoding that contrasts layers"),
    "prompt_lookup_num_tokens": (None, "drafts looked up in the prompt"),
    "assistant_early_exit": (None, "drafts of early layers"),
    "use_mtp": (None, "drafts of extra layers"),
    "return_dict_in_generate": (None, ""),
}
"""Setting, its value for one plain sequence, and how another value is told (the empty text: it changes nothing one sees)."""


def plain_settings(config: Any) -> tuple[dict[str, Any], list[str]]:
    """Arguments for ``generate`` that leave one sequence, and what ``config`` asked for instead, in words.

    Parameters
    ----------
    config : GenerationConfig
        The checkpoint's own.
    """
    settings: dict[str, Any] = {}
    asked = []
    for name, (plain, words) in _PLAIN.items():
        value = getattr(config, name, None)
        if value in (None, False, plain):
            continue
        settings[name] = plain
        if words:
            asked.append(words.format(value))
    return settings, asked


@torch.no_grad()
def decode_steps(model: Any, ids: Sequence[int]) -> Iterator[Any]:
    """Output of ``model`` after each of ``ids``, given one at a time on the state of those before it."""
    cache = None
    for token in ids:
        output = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        yield output
