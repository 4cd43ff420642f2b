"""Open a checkpoint without loading it: its configuration, its layout, and what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from swapless.errors import (
    CheckpointCorruptError,
    CheckpointError,
    PackMismatchError,
    UnsupportedFamilyError,
    UsageError,
    message,
)
from swapless.runtime.door import (
    Layout,
    bounded_modules,
    check_block_size,
    check_packed_model,
    check_values,
    checkpoint_layout,
    computable,
    dequantize_on_load,
    expert_parameters,
    experts_of,
    foreign,
    foreign_errors,
    is_served,
    model_class,
    model_config,
    own_config,
    packed_layout,
    refuse_unknown,
    skeleton,
    stated_dtype,
)
from swapless.runtime.families import NEEDS, unsupported_family
from swapless.runtime.pool import slot_bytes
from swapless.store.headers import CONFIG_NAME, TensorRef, first_shard, local_folder, read_config, read_header, read_headers
from swapless.store.packed import DENSE, Manifest, check_dense, is_packed, read_manifest
from swapless.units import format_size
from swapless.untrusted import shown

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class OpenCheckpoint(NamedTuple):
    """A checkpoint whose headers were read: folder, configuration, model class, layout and tensors.

    Of a packed store, ``manifest`` is its manifest, and ``refs`` hold no experts. ``notes`` are sentences on what is left out.
    """

    folder: Path
    config: Any
    cls: type[PreTrainedModel]
    layout: Layout
    refs: dict[str, TensorRef]
    experts_a_token: int
    manifest: Manifest | None = None
    notes: tuple[str, ...] = ()

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
    notes: tuple[str, ...] = ()

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
    _refuse_quantised(folder, raw)
    refuse_unknown(folder, raw)
    manifest = read_manifest(folder) if is_packed(folder) else None
    refs = read_headers(folder) if manifest is None else read_header(folder / DENSE)
    if manifest is not None:
        check_dense(folder, manifest, refs)
    config = model_config(folder, raw)
    if config.model_type in NEEDS:
        raise unsupported_family(config)
    with foreign_errors("transformers cannot build the model that config.json describes.", folder):
        cls = model_class(config)
        config = own_config(config, cls)
        refs |= _further_files(folder, config)
        dequantize_on_load(config)
        with bounded_modules(refs, folder):
            meta = skeleton(cls, config)
        if manifest is not None:
            own = getattr(torch, manifest.dtype) if dtype == "auto" else resolve_dtype(dtype, config, folder)
            _check_dtype(folder, config, manifest)
            layout = packed_layout(meta, manifest, refs, own)
            check_packed_model(meta, manifest, refs)
        else:
            layout = _layout(folder, raw, meta, refs, resolve_dtype(dtype, config, folder))
        check_values(meta, _expert_names(meta), refs, folder)
    _check_top_k(layout, folder, config)
    assert layout.top_k is not None
    notes = tuple(_notes(layout, refs, cls, config))
    return OpenCheckpoint(folder, config, cls, layout, refs, layout.top_k * len(layout.moe_layers), manifest, notes)


def _check_dtype(folder: Path, config: Any, manifest: Manifest) -> None:
    stated = stated_dtype(config, folder / CONFIG_NAME)
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


def _refuse_quantised(folder: Path, raw: Mapping[str, Any]) -> None:
    for part in (raw, raw.get("text_config")):
        given = part.get("quantization_config") if isinstance(part, dict) else None
        if not given:
            continue
        if is_served(given):
            check_block_size(given, folder)
            continue
        try:
            keys: Iterable[str] = read_headers(folder)
        except CheckpointError:
            keys = ()  # the method alone is reason enough
        named = foreign(folder, {"quantization_config": given, **raw}, keys)
        assert named is not None
        raise named


def _layout(
    folder: Path, raw: Mapping[str, Any], meta: PreTrainedModel, refs: dict[str, TensorRef], own: torch.dtype
) -> Layout:
    """The layout, or the name of the tool in whose form the checkpoint is, where that is why there is none."""
    try:
        layout = checkpoint_layout(meta, refs, own)
    except CheckpointCorruptError as error:
        named = foreign(folder, {key: value for key, value in raw.items() if not is_served(value)}, refs)
        if named is not None:
            raise named from error
        raise
    named = foreign(Path(), {}, layout.unused_keys)
    if named is not None:
        raise named
    return layout


def _further_files(folder: Path, config: Any) -> dict[str, TensorRef]:
    """Tensors of the files that the family keeps beside its weights."""
    found: dict[str, TensorRef] = {}
    for name in getattr(type(config), "extra_files", ()):
        if (folder / name).is_file():
            found |= read_header(folder / name)
    return found


def _expert_names(meta: PreTrainedModel) -> frozenset[str]:
    return frozenset(f"{path}.{name}" for path, module in experts_of(meta) for name in expert_parameters(module))


def _check_top_k(layout: Layout, folder: Path, config: Any) -> None:
    experts = min(layer.num_experts for layer in layout.moe_layers)
    if layout.top_k is None:
        raise UnsupportedFamilyError(
            message("The configuration does not say how many experts a token uses.", where=folder, got=config.model_type)
        )
    if layout.top_k > experts:
        raise CheckpointCorruptError(
            message(
                "A token would use more experts than a MoE layer has.",
                where=folder / CONFIG_NAME,
                got=f"{layout.top_k} of {experts}",
                allowed=f"1 to {experts}",
            )
        )


def _notes(layout: Layout, refs: Mapping[str, TensorRef], cls: Any, config: Any) -> Iterator[str]:
    """What of the files is left out, as transformers leaves it out, where it does not foresee that itself."""
    foreseen = [re.compile(pattern) for pattern in getattr(cls, "_keys_to_ignore_on_load_unexpected", None) or ()]
    unused = [key for key in layout.unused_keys if not any(pattern.search(key) for pattern in foreseen)]
    if not unused:
        return
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    beyond = sorted({int(found[1]) for key in unused if (found := _LAYER.search(key))} - set(range(layers or 0)))
    nbytes = sum(refs[key].nbytes for key in unused)
    text = f"{len(unused)} tensors ({format_size(nbytes)}) are not part of the model and left out, as transformers does: "
    text += f"{shown(unused[0])[1:-1]}" + (" and others." if len(unused) > 1 else ".")
    if beyond and isinstance(layers, int):
        text += f" The files hold layers up to {beyond[-1]}, and the configuration has {layers} (0 to {layers - 1})."
    yield text


_LAYER = re.compile(r"\b(?:layers|blocks|h)\.(\d+)\.")


def resolve_dtype(dtype: str | torch.dtype, config: Any, folder: Path) -> torch.dtype:
    """The type to compute in: as asked, or what transformers takes.

    That is the configuration's; or that in the index' metadata; or of the first shard, in the order of its keys, that of the
    first floating tensor of 16 bits or more.

    Raises
    ------
    UsageError
        No type that was asked for.
    CheckpointCorruptError
        The checkpoint's is none that a model is computed in.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype) or not computable(named):
            raise UsageError(message("Unknown dtype.", got=repr(dtype), allowed="auto, bfloat16, float16, float32"))
        return named
    stated = stated_dtype(config, folder / CONFIG_NAME)
    if stated is not None:
        return stated
    shard, metadata = first_shard(folder)
    named = getattr(torch, str(metadata["dtype"]), None) if "dtype" in metadata else None
    refs = sorted(read_header(shard).values())
    found = named or next((_FLOATS[ref.dtype] for ref in refs if ref.dtype in _FLOATS), None)
    if not isinstance(found, torch.dtype) or not computable(found):
        raise CheckpointCorruptError(
            message("The checkpoint does not say what type to compute in.", where=shard, step='Add "dtype" to config.json.')
        )
    return found


def describe(folder: str | Path) -> CheckpointInfo:
    """What a checkpoint folder holds, without loading it.

    Raises
    ------
    CheckpointError, UnsupportedFamilyError
        See :func:`open_checkpoint`.
    """
    opened = open_checkpoint(local_folder(Path(folder)))
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
        notes=opened.notes,
    )
