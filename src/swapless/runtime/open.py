"""Open a checkpoint without loading it: its configuration, its layout, and what is wrong with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PreTrainedModel

from swapless.errors import (
    CheckpointCorruptError,
    PackMismatchError,
    UnsupportedFamilyError,
    UsageError,
    message,
)
from swapless.runtime.door import (
    Layout,
    check_packed_model,
    check_quantization,
    checkpoint_layout,
    dequantize_on_load,
    model_class,
    packed_layout,
    skeleton,
)
from swapless.runtime.families import NEEDS, unsupported_family
from swapless.runtime.pool import slot_bytes
from swapless.store.headers import TensorRef, read_config, read_header, read_headers
from swapless.store.packed import DENSE, Manifest, check_dense, is_packed, read_manifest

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class OpenCheckpoint(NamedTuple):
    """A checkpoint whose headers were read: folder, configuration, model class, layout and tensors.

    Of a packed store, ``manifest`` is its manifest, and ``refs`` hold no experts.
    """

    folder: Path
    config: Any
    cls: type[PreTrainedModel]
    layout: Layout
    refs: dict[str, TensorRef]
    experts_a_token: int
    manifest: Manifest | None = None

    @property
    def files(self) -> list[Path]:
        """The shards, each once."""
        return sorted({ref.file for ref in self.refs.values()})

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of a weight of experts and of all else; 16 stands for the checkpoint's own type."""
        return (16, 16) if self.manifest is None else (self.manifest.bits, self.manifest.dense_bits)

    @property
    def rounded(self) -> bool:
        """Whether some of its weights were rounded to fewer bits, so that results are not those of the original."""
        return self.manifest is not None and (self.manifest.bits < 16 or bool(self.manifest.dense))


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint holds, by its configuration and headers alone; sizes in bytes.

    ``smallest_budget_bytes`` is an estimate of the floor before anything is loaded (the base of the interpreter and its
    libraries, non-expert weights, one wave of slots); ``token_cycle_bytes`` is what one decoded token asks for.
    """

    family: str
    num_moe_layers: int
    num_experts: int
    top_k: int
    dtype: str
    layout: str
    shards: int
    expert_bytes: int
    total_bytes: int
    non_expert_bytes: int
    token_cycle_bytes: int
    smallest_budget_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


BASE_BYTES = 330 << 20
"""Interpreter, torch and transformers, before any weight: what an estimate takes; a load measures."""


def open_checkpoint(folder: Path, dtype: str | torch.dtype = "auto") -> OpenCheckpoint:
    """Read configuration and headers of ``folder`` and match them with the model's experts.

    Raises
    ------
    CheckpointMissingError, CheckpointCorruptError, UnsupportedCheckpointError, UnsupportedFamilyError
        Whatever is wrong with the folder or the family.
    """
    raw = read_config(folder)
    _refuse_unserved(folder, raw)
    manifest = read_manifest(folder) if is_packed(folder) else None
    refs = read_headers(folder) if manifest is None else read_header(folder / DENSE)
    if manifest is not None:
        check_dense(folder, manifest, refs)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # configuration classes check themselves, each with errors of its own
        raise CheckpointCorruptError(
            message("transformers cannot make sense of config.json.", where=folder, got=str(error).splitlines()[0])
        ) from error
    if config.model_type in NEEDS:
        raise unsupported_family(config)
    dequantize_on_load(config)
    cls = model_class(config)
    if manifest is not None:
        own = getattr(torch, manifest.dtype) if dtype == "auto" else resolve_dtype(dtype, config, refs)
        _check_dtype(folder, config, manifest)
        meta = skeleton(cls, config)
        layout = packed_layout(meta, manifest, refs, own)
        check_packed_model(meta, manifest, refs)
    else:
        layout = checkpoint_layout(skeleton(cls, config), refs, resolve_dtype(dtype, config, refs))
    if layout.top_k is None:
        raise UnsupportedFamilyError(
            message("The configuration does not say how many experts a token uses.", where=folder, got=config.model_type)
        )
    return OpenCheckpoint(folder, config, cls, layout, refs, layout.top_k * len(layout.moe_layers), manifest)


def _check_dtype(folder: Path, config: Any, manifest: Manifest) -> None:
    stated = stated_dtype(config)
    if stated is not None and str(stated).removeprefix("torch.") != manifest.dtype:
        raise PackMismatchError(
            message(
                "The packed store is of another type than its configuration.",
                where=folder,
                got=manifest.dtype,
                allowed=stated,
                step="Pack the checkpoint again.",
            )
        )


def _refuse_unserved(folder: Path, raw: dict[str, Any]) -> None:
    for part in (raw, raw.get("text_config")):
        if isinstance(part, dict) and part.get("quantization_config"):
            check_quantization(part["quantization_config"], folder)
    from transformers import CONFIG_MAPPING

    model_type = raw.get("model_type")
    for point in entry_points(group="swapless.models", name=str(model_type)):
        point.load()()  # a family from outside transformers registers itself with the Auto classes
    if model_type in CONFIG_MAPPING:
        return
    if raw.get("auto_map"):
        raise UnsupportedFamilyError(
            message(
                f"The checkpoint brings its own code for {model_type!r}, and remote code is not run.",
                where=folder,
                step="Swapless serves the families that transformers itself ships; a newer transformers may have this one.",
            )
        )
    raise UnsupportedFamilyError(
        message("The installed transformers does not know this model type.", where=folder, got=repr(model_type))
    )


def resolve_dtype(dtype: str | torch.dtype, config: Any, refs: dict[str, TensorRef]) -> torch.dtype:
    """The type to compute in: as asked, or the configuration's, or that of the checkpoint's first floating tensor."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise UsageError(message("Unknown dtype.", got=repr(dtype), allowed="auto, bfloat16, float16, float32"))
        return named
    return stated_dtype(config) or next((_FLOATS[ref.dtype] for ref in refs.values() if ref.dtype in _FLOATS), torch.float32)


def stated_dtype(config: Any) -> torch.dtype | None:
    """The type that the configuration itself names, if it does."""
    stated = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return stated if isinstance(stated, torch.dtype) else None


def describe(folder: str | Path) -> CheckpointInfo:
    """What a checkpoint folder holds, without loading it.

    Raises
    ------
    CheckpointError, UnsupportedFamilyError
        See :func:`open_checkpoint`.
    """
    opened = open_checkpoint(Path(folder))
    layers = opened.layout.moe_layers
    expert_bytes = max(layer.expert_bytes for layer in layers)
    form = "per-expert" if opened.layout.per_expert else "fused"
    total_bytes = sum(ref.nbytes for ref in opened.refs.values())
    if opened.manifest is not None:
        form = f"packed, {opened.manifest.bits} bits"
        total_bytes += sum(layer.num_experts * layer.block_bytes for layer in opened.manifest.moe_layers)
    return CheckpointInfo(
        family=opened.config.model_type,
        num_moe_layers=len(layers),
        num_experts=layers[0].num_experts,
        top_k=opened.experts_a_token // len(layers),
        dtype=str(opened.layout.dtype).removeprefix("torch."),
        layout=form,
        shards=len(opened.files),
        expert_bytes=expert_bytes,
        total_bytes=total_bytes,
        non_expert_bytes=opened.layout.non_expert_bytes,
        token_cycle_bytes=opened.experts_a_token * expert_bytes,
        smallest_budget_bytes=BASE_BYTES + opened.layout.non_expert_bytes + 5 * slot_bytes(layers),
    )
