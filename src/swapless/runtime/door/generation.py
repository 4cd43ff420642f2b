"""``generation_config.json``: checked value by value, since ``generate`` would trip over a wrong one much later."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from swapless.errors import CheckpointMissingError, message
from swapless.runtime.door.foreign import foreign_errors
from swapless.untrusted import Table, read_json

GENERATION_NAME = "generation_config.json"
_MAX_BYTES = 2**20

_COUNTS = (
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "num_beams",
    "num_return_sequences",
    "top_k",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "prompt_lookup_num_tokens",
    "num_assistant_tokens",
    "prefill_chunk_size",
)
_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "length_penalty",
    "guidance_scale",
    "max_time",
)
_FLAGS = (
    "do_sample",
    "use_cache",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "return_dict_in_generate",
    "renormalize_logits",
    "remove_invalid_values",
    "disable_compile",
)
_TOKENS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "stop_strings")


def generation_config(folder: Path) -> GenerationConfig | None:
    """How the checkpoint wants its text to be chosen, None where it does not say.

    Raises
    ------
    CheckpointMissingError
        The file cannot be read.
    CheckpointCorruptError
        It is no JSON, holds a value of a wrong type, or transformers refuses it.
    """
    file = folder / GENERATION_NAME
    if not file.exists():
        return None
    try:
        table = read_json(file, what=GENERATION_NAME, max_bytes=_MAX_BYTES, special_floats=True)
    except OSError as error:
        raise CheckpointMissingError(message("A file cannot be read.", where=file, got=error.strerror or str(error))) from error
    for names, check in ((_COUNTS, table.integer), (_NUMBERS, table.number), (_FLAGS, table.flag), (_LISTS, table.items)):
        for name in names:
            if table.raw(name, None) is not None:
                check(name)
    for name in _TOKENS:
        _check_tokens(table, name)
    with foreign_errors("transformers cannot make sense of generation_config.json.", file):
        found: Any = GenerationConfig.from_dict(copy.deepcopy(table.value))
    return found


def _check_tokens(table: Table, name: str) -> None:
    value = table.raw(name, None)
    if isinstance(value, list):
        table.integers(name, minimum=-1)
    elif value is not None:
        table.integer(name, minimum=-1)
