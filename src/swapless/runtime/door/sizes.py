"""How large a configuration may make a model: bounded by what the checkpoint's files hold, before anything is built.

Building a model takes time by its modules and memory by its configuration's lists, and a file of some hundred bytes can ask for
10^9 layers or labels. Nobody stores a model whose files have not at least a tensor a layer.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel

from swapless.errors import CheckpointCorruptError, message
from swapless.store.headers import TensorRef
from swapless.untrusted import shown

_COUNTS = re.compile(r"layer|depth|block|label|stage|stack|head|expert|group")
_MOST_COUNTED = 100_000
_MODULES_A_TENSOR, _MODULES_AT_LEAST, _MODULES_AT_MOST = 4, 4_000, 200_000
_VALUES_A_BYTE, _VALUES_AT_LEAST = 4, 2**26


def check_counts(config: Mapping[str, Any], where: object) -> None:
    """Refuse numbers in a configuration by which transformers would build endless lists.

    Raises
    ------
    CheckpointCorruptError
        More layers, heads, experts or labels than any model has.
    """
    for path, key, value in _numbers(config, ""):
        if abs(value) > _MOST_COUNTED and _COUNTS.search(key):
            what = f"A number in the configuration is impossible: {shown(path)[1:-1]}."
            raise CheckpointCorruptError(message(what, where=where, got=shown(value), allowed=f"up to {_MOST_COUNTED}"))


@contextmanager
def bounded_modules(refs: Mapping[str, TensorRef], where: object) -> Iterator[None]:
    """While a model is built within: end it once it has more modules than files of so many tensors can mean.

    Raises
    ------
    CheckpointCorruptError
        There were more.
    """
    most = min(_MODULES_AT_LEAST + _MODULES_A_TENSOR * len(refs), _MODULES_AT_MOST)
    mine, count = threading.get_ident(), 0

    def registered(module: Any, name: str, child: Any) -> None:
        nonlocal count
        if threading.get_ident() == mine:
            count += 1
            if count > most:
                raise CheckpointCorruptError(
                    message(
                        "The configuration describes a model far larger than the files.",
                        where=where,
                        got=f"more than {most} modules for {len(refs)} tensors",
                    )
                )

    hook: Any = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()


def check_values(meta: PreTrainedModel, experts: frozenset[str], refs: Mapping[str, TensorRef], where: object) -> None:
    """Refuse a model on the meta device whose weights beside the experts, or whose buffers, the files cannot hold.

    ``experts`` are names of parameters that nobody will allocate.

    Raises
    ------
    CheckpointCorruptError
        It is far larger.
    """
    held_bytes = sum(ref.nbytes for ref in refs.values())
    most = _VALUES_AT_LEAST + _VALUES_A_BYTE * held_bytes
    values = 0
    for name, tensor in (*meta.named_parameters(), *meta.named_buffers()):
        if name in experts:
            continue
        values += tensor.numel()
        if values > most:
            raise CheckpointCorruptError(
                message(
                    "The configuration describes a model far larger than the files.",
                    where=where,
                    got=f"{name} of {list(tensor.shape)} and others, beside {held_bytes} bytes in the files",
                )
            )


def _numbers(value: Any, path: str, key: str = "") -> Iterator[tuple[str, str, int]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(item, f"{path}.{name}" if path else str(name), str(name))
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield from _numbers(item, f"{path}[{at}]", key)
    elif type(value) is int:
        yield path, key, value
