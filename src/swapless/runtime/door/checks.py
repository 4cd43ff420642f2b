"""What can be wrong with the tensors that make up one expert parameter: refused by name, before a byte of them is read."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers.core_model_loading import Concatenate, Interleave, MergeModulelist, Transpose

from swapless.errors import CheckpointCorruptError, UnsupportedFamilyError, message
from swapless.runtime.door.dequantize import DEQUANTIZE
from swapless.runtime.door.layout import ExpertParameter
from swapless.runtime.door.origin import ALL_DTYPES, DTYPES, CheckpointOrigin
from swapless.store.headers import TensorRef

_SLICEABLE = (MergeModulelist, Concatenate, Transpose, Interleave, *DEQUANTIZE)
_AGAIN = "Download the checkpoint again."
_NUMBER = re.compile(r"\d+")
_OF_EXPERT = re.compile(r"\bexperts\.(\d+)\.")


def checked_origin(
    origin: CheckpointOrigin | None, full_name: str, parameter: ExpertParameter, num_experts: int
) -> CheckpointOrigin:
    """``origin`` as it is, once it is known to make up ``parameter`` of every expert.

    Raises
    ------
    UnsupportedFamilyError
        A conversion that cannot be done an expert at a time.
    CheckpointCorruptError
        Tensors are missing, too many, of other experts, or of a wrong shape or type.
    """
    if origin is None:
        raise CheckpointCorruptError(
            message("The checkpoint holds no weights for an expert parameter.", where=full_name, step=_AGAIN)
        )
    converter = origin.converter
    for op in converter.operations if converter is not None else ():
        if not isinstance(op, _SLICEABLE):
            raise UnsupportedFamilyError(
                message(
                    "The experts of this family cannot be cut out of the checkpoint one by one.",
                    where=full_name,
                    got=f"the conversion {type(op).__name__}",
                    allowed=", ".join(kind.__name__ for kind in _SLICEABLE),
                )
            )
    if None in origin.refs and len(origin.refs) > 1:
        both = " and ".join(refs[0].key for refs in list(origin.refs.values())[:2])
        raise CheckpointCorruptError(
            message("The checkpoint holds the experts twice, one by one and fused.", where=full_name, got=both)
        )
    bare = origin.without_scales()
    if bare is not None:
        raise CheckpointCorruptError(
            message("Quantised expert weights have no scales beside them.", where=bare.key, got=bare.dtype, step=_AGAIN)
        )
    for pattern, refs in origin.refs.items():
        _check_count(origin, f"{full_name} from {pattern or 'one fused tensor'}", refs, num_experts)
        _check_kind(origin, full_name, refs)
    shape = origin.shape()
    if shape != parameter.shape:
        raise CheckpointCorruptError(
            message(
                "An expert's weights have the wrong shape for this model.",
                where=full_name,
                got=" and ".join(str(list(refs[0].shape)) for refs in origin.refs.values()) + " in the checkpoint",
                allowed=f"what makes {list(parameter.shape)}",
            )
        )
    return origin


def _check_count(origin: CheckpointOrigin, where: str, refs: Sequence[TensorRef], num_experts: int) -> None:
    merges = origin.merges()
    count = len(refs) if merges else refs[0].shape[0] if refs[0].shape else 0
    what = "The checkpoint does not hold every expert exactly once."
    if count != num_experts or (not merges and len(refs) != 1):
        raise CheckpointCorruptError(message(what, where=where, got=f"{count} experts", allowed=f"{num_experts} experts"))
    numbers = _numbers(refs) if merges else list(range(num_experts))
    if numbers != list(range(num_experts)):
        odd = next(at for at, number in enumerate(numbers) if number != at)
        raise CheckpointCorruptError(
            message(what, where=where, got=refs[odd].key, allowed=f"experts 0 to {num_experts - 1}", step=_AGAIN)
        )


def _numbers(refs: Sequence[TensorRef]) -> list[int]:
    """The number of each tensor's expert, by its name: what follows the word, or else the number that differs."""
    named = [_OF_EXPERT.search(ref.key) for ref in refs]
    if all(named):
        return [int(found[1]) for found in named if found]
    columns = list(zip(*(_NUMBER.findall(ref.key) for ref in refs), strict=False))
    varying = [column for column in columns if len(set(column)) > 1]
    return [int(number) for number in varying[-1]] if varying else list(range(len(refs)))


def _check_kind(origin: CheckpointOrigin, full_name: str, refs: Sequence[TensorRef]) -> None:
    allowed = ALL_DTYPES if origin.dequantizes() else DTYPES
    for ref in refs:
        if ref.dtype not in allowed:
            raise CheckpointCorruptError(
                message(
                    "Expert weights of a type that cannot be computed with.",
                    where=f"{full_name} from {ref.key} in {ref.file}",
                    got=ref.dtype,
                    allowed=", ".join(allowed),
                )
            )
        if ref.shape != refs[0].shape:
            raise CheckpointCorruptError(
                message(
                    "Experts of one kind have different shapes.",
                    where=f"{ref.key} in {ref.file}",
                    got=list(ref.shape),
                    allowed=f"{list(refs[0].shape)}, as {refs[0].key}",
                )
            )
