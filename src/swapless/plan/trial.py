"""What only a run can tell: the memory of a process with a loaded model, and experts of three precisions at work.

As a module of its own, ``python -m swapless.plan.trial`` loads the embedded model in a fresh process and prints what it held.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers

from swapless import embedded
from swapless.plan.hub import write_ghost
from swapless.plan.precision import as_packed
from swapless.plan.products import ColdExperts, expert_time
from swapless.runtime.door import experts_of, model_class, skeleton
from swapless.runtime.hollow import hollow_model
from swapless.runtime.model import load
from swapless.runtime.open import OpenCheckpoint, open_checkpoint
from swapless.store.headers import SINGLE_NAME


def process_bytes() -> tuple[int, int]:
    """Bytes of a fresh process with all libraries, and what loading the embedded model left behind beside its weights."""
    done = subprocess.run([sys.executable, "-m", "swapless.plan.trial"], capture_output=True, text=True, check=True)
    parts = json.loads(done.stdout)
    return int(parts["base"]), int(parts["loading"])


def _trial() -> dict[str, Any]:
    import rich.progress  # noqa: F401  the command line holds these too
    import typer  # noqa: F401

    transformers.utils.logging.set_verbosity_error()
    model: Any = load(embedded.path(), resident=1.0)
    with model:
        return dict(model.swapless.budget.parts)


def expert_weights_per_s() -> Iterator[tuple[str, float]]:
    """Weights a second of experts in each precision, by its name, in a model of OLMoE's shape that is nowhere."""
    with TemporaryDirectory(prefix="swapless-") as folder:
        opened = example(Path(folder))
        module = next(module for _, module in experts_of(hollow_model(opened)))
        weights = opened.layout.moe_layers[0].expert_bytes // opened.layout.dtype.itemsize
        for bits in (16, 8, 4):
            with ColdExperts(opened if bits == 16 else as_packed(opened, bits, 16)) as cold:
                seconds = expert_time(cold, module).together_s
            yield ("bf16" if bits == 16 else f"int{bits}"), weights / seconds


def example(folder: Path, **sizes: int) -> OpenCheckpoint:
    """One MoE layer of OLMoE's shape (or of other ``sizes``), with 16 experts, as ghosts in ``folder``."""
    shape: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 1, "num_experts": 16}
    shape |= {"vocab_size": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = transformers.OlmoeConfig(**shape | sizes, dtype="bfloat16", architectures=["OlmoeForCausalLM"])
    config.save_pretrained(folder)
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in skeleton(model_class(config), config).state_dict().items():
        first, end = end, end + 2 * tensor.numel()
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [first, end]}
    write_ghost(folder / SINGLE_NAME, json.dumps(entries).encode())
    return open_checkpoint(folder)


if __name__ == "__main__":
    json.dump(_trial(), sys.stdout)
