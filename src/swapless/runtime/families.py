"""Families that do not come through the door, each with what it would need: named, never loaded in full by accident."""

from __future__ import annotations

from typing import Any

from swapless.errors import UnsupportedFamilyError, message

NEEDS = {
    "llama4": "its block multiplies all experts at once; the block's forward would have to ask for the chosen ones",
    "llama4_text": "its block multiplies all experts at once; the block's forward would have to ask for the chosen ones",
    "dbrx": "its experts are flat [E*F, D] matrices cut up inside the forward; they would need a plan of their own",
    "jetmoe": "its experts are ParallelExperts, in attention too; both would need a hook of their own",
    "longcat_flash": "its experts module has the right form but no decorator, and zero experts that pass their input through",
    "step3p7": "its experts module has the right form but no decorator; a forward of its own would do",
    "switch_transformers": "its experts sit in a ModuleDict behind a capacity-limited router, in an encoder-decoder",
    "nllb-moe": "its experts sit in a ModuleDict behind a capacity-limited router, in an encoder-decoder",
    "nllb_moe": "its experts sit in a ModuleDict behind a capacity-limited router, in an encoder-decoder",
    "doge": "its experts are rows of an embedding chosen by product keys, not matrices",
}
"""Model type to what serving it would take."""

ACCUMULATE_IN = {"Inkling2Experts": "float32", "NemotronHExperts": "gate weights"}
"""Experts modules whose eager forward adds up its outputs in another type than the hidden states', which no flag says:
``float32``, or the type of the gate weights. The family sweep and ``swapless verify`` would show a missing entry."""


def unsupported_family(config: Any) -> UnsupportedFamilyError:
    """The error for a model without an experts module at the door."""
    model_type = config.model_type
    need = NEEDS.get(model_type)
    if need is None:
        return UnsupportedFamilyError(
            message(
                f"No experts module found in a model of type {model_type!r}.",
                got=", ".join(getattr(config, "architectures", None) or ["no architecture named"]),
                step="It is no Mixture-of-Experts model, or its experts do not use transformers' experts interface. "
                "Load it with transformers itself.",
            )
        )
    return UnsupportedFamilyError(message(f"The family {model_type!r} is not served yet: {need}."))
