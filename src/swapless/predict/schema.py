"""What each kind of predictor's file holds: names, types, shapes and ranges, looked at before anything is made of it.

Compiled loops walk these tensors and do not ask whether an index lies within them, so none reaches one that was not looked
at here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from swapless.errors import PredictorError, message
from swapless.predict.network_shape import NetworkShape, sizes_of
from swapless.predict.predictor import Fitted
from swapless.untrusted import Table

Arrays = Mapping[str, np.ndarray]
Size = int | None
SOME = -1

MOST_LAYERS, MOST_EXPERTS, MOST_PLACES = 10_000, 32_767, 1 << 28
"""Of what a header may claim: MoE layers, experts whose ids fit int16, and their product, the length of a token's scores."""


class Tensor(NamedTuple):
    """Types, the length of each axis (None: any, SOME: any but 0), and least and greatest value."""

    kinds: tuple[Any, ...]
    sizes: tuple[Size, ...]
    least: float = -np.inf
    most: float = np.inf


def fitted_of(header: Table) -> Fitted:
    """What the header says that the predictor was fitted for.

    Raises
    ------
    PredictorError
        A key that is missing, of another type or out of range.
    """
    experts = header.integer("num_experts", minimum=1, maximum=MOST_EXPERTS)
    layers = header.integer("num_moe_layers", minimum=1, maximum=min(MOST_LAYERS, MOST_PLACES // experts))
    leads = header.items("leads", maximum=layers + 1)
    for number, lead in enumerate(leads):
        if lead != "token" and (type(lead) is not int or not 1 <= lead <= layers):
            header.refuse("leads", f"counts of MoE layers up to {layers}, or token")
        if lead in leads[:number]:
            header.refuse("leads", "each lead once")
    kind: Any = None if header.raw("vocabulary") is None else header.text("vocabulary", choices=("token", "token_id"))
    return Fitted(
        model_id=None if header.raw("model_id") is None else header.text("model_id"),
        num_experts=experts,
        top_k=header.integer("top_k", minimum=1, maximum=experts),
        num_moe_layers=layers,
        vocabulary=kind,
        leads=tuple(leads),
    )


def check_file(kind: str, fitted: Fitted, arrays: Arrays, settings: Table, *, where: object) -> None:
    """Hold settings and tensors of a built-in kind against its schema; other kinds look at their own.

    Raises
    ------
    PredictorError
        A setting or a tensor that is missing, unknown, of another type or shape, or out of range.
    """
    if kind not in _KINDS:
        return
    schema = _KINDS[kind]
    if (fitted.vocabulary is not None) != schema.reads_tokens:
        allowed = "token or token_id" if schema.reads_tokens else "null"
        raise PredictorError(message("The header's vocabulary is wrong.", where=where, got=fitted.vocabulary, allowed=allowed))
    if bool(fitted.leads) != schema.has_leads:
        raise PredictorError(message("The header's leads do not go with its kind.", where=where, got=list(fitted.leads)))
    wanted = schema.wanted(fitted, arrays, settings)
    missing, unknown = sorted(wanted.keys() - arrays.keys()), sorted(arrays.keys() - wanted.keys())
    if missing or unknown:
        got = f"missing {', '.join(missing[:4]) or 'none'}, unknown {', '.join(unknown[:4]) or 'none'}"
        raise PredictorError(message(f"The tensors are not those of {kind}.", where=where, got=got))
    for name, tensor in wanted.items():
        _check(arrays[name], name, tensor, where)
    if schema.reads_tokens:
        _check_words(fitted, arrays, where)
    for name in ("single", "pair"):
        if f"{name}.keys" in wanted:
            _check_table(name, arrays, fitted.num_moe_layers * fitted.top_k, where)


def _check(array: np.ndarray, name: str, tensor: Tensor, where: object) -> None:
    kinds = [np.dtype(kind) for kind in tensor.kinds]
    fits = array.ndim == len(tensor.sizes) and all(
        size in (None, own) or (size == SOME and own) for size, own in zip(tensor.sizes, array.shape)
    )
    if array.dtype not in kinds or not fits:
        shape = "(" + ", ".join("any" if size in (None, SOME) else str(size) for size in tensor.sizes) + ")"
        allowed = f"{' or '.join(map(str, kinds))} {shape}"
        got, what = f"{array.dtype} {array.shape}", f"{name} has the wrong type or shape."
        raise PredictorError(message(what, where=where, got=got, allowed=allowed))
    if not array.size:
        return
    low, high = array.min(), array.max()  # not a number, if any is
    if not (np.isfinite(low) and np.isfinite(high) and tensor.least <= low and high <= tensor.most):
        allowed = f"finite, {tensor.least} to {tensor.most}"
        raise PredictorError(message(f"{name} holds what cannot be.", where=where, got=f"{low} to {high}", allowed=allowed))


def _check_words(fitted: Fitted, arrays: Arrays, where: object) -> None:
    if fitted.vocabulary == "token_id" or "vocabulary.ends" not in arrays:
        return
    ends, size = arrays["vocabulary.ends"], len(arrays["vocabulary.bytes"])
    if (ends[-1] if len(ends) else 0) != size or (np.diff(ends, prepend=0) < 0).any():
        got = ends[:8].tolist()
        allowed = f"rising to {size}"
        raise PredictorError(message("vocabulary.ends do not cut the texts.", where=where, got=got, allowed=allowed))


def _check_table(name: str, arrays: Arrays, choices: int, where: object) -> None:
    """Keys ascend, the bits say where as many counts as there are go, and no row has more than its tokens chose."""
    keys, totals, some = (arrays[f"{name}.{part}"] for part in ("keys", "totals", "some"))
    rows, width = len(keys), arrays["popularity"].size
    wrong: Any = len(totals) != rows or some.shape != (rows, -(-width // 8)) or (np.diff(keys) <= 0).any()
    if not wrong:
        counts, held = arrays[f"{name}.counts"], np.bitwise_count(some).sum(axis=1, dtype=np.int64)
        wrong = held.sum() != len(counts)
        if not wrong and rows:
            sums = np.bincount(np.repeat(np.arange(rows), held), counts, minlength=rows)
            wrong = bool((sums > totals.astype(np.float64) * choices).any())
    if not wrong and width % 8 and rows:
        wrong = bool((some[:, -1] & ((1 << (8 - width % 8)) - 1)).any())
    if wrong:
        raise PredictorError(message(f"The counts of {name} do not fit each other.", where=where))


class _Schema(NamedTuple):
    wanted: Callable[[Fitted, Arrays, Table], dict[str, Tensor]]
    reads_tokens: bool = False
    has_leads: bool = False


_MOST = 65504.0
"""What half precision holds; trained weights stay far below it, and sums of larger ones may be no numbers."""


def _popularity(fitted: Fitted) -> dict[str, Tensor]:
    return {"popularity": Tensor((np.float32,), (fitted.num_moe_layers, fitted.num_experts), 0, 1)}


def _words(fitted: Fitted) -> dict[str, Tensor]:
    if fitted.vocabulary == "token_id":
        return {"vocabulary.ids": Tensor((np.int64,), (None,), -1)}
    return {"vocabulary.bytes": Tensor((np.uint8,), (None,)), "vocabulary.ends": Tensor((np.int64,), (None,), 0)}


def _table(name: str) -> dict[str, Tensor]:
    return {
        f"{name}.keys": Tensor((np.int64,), (None,), 0),
        f"{name}.totals": Tensor((np.int64,), (None,), 1),
        f"{name}.some": Tensor((np.uint8,), (None, None)),
        f"{name}.counts": Tensor((np.uint8, np.uint16), (None,), 1),
    }


def _memory(fitted: Fitted) -> dict[str, Tensor]:
    return {**_words(fitted), **_popularity(fitted), **_table("single"), **_table("pair")}


def _plain(fitted: Fitted, arrays: Arrays, settings: Table) -> dict[str, Tensor]:
    settings.only()
    return _popularity(fitted)


def _previous_token(fitted: Fitted, arrays: Arrays, settings: Table) -> dict[str, Tensor]:
    settings.only("fade")
    settings.number("fade", minimum=0, maximum=1)
    return _popularity(fitted)


def _token_prior(fitted: Fitted, arrays: Arrays, settings: Table) -> dict[str, Tensor]:
    settings.only()
    return {**_words(fitted), **_popularity(fitted), **_table("single")}


def _eam(fitted: Fitted, arrays: Arrays, settings: Table) -> dict[str, Tensor]:
    settings.only("neighbours", "capacity")
    capacity = settings.integer("capacity", minimum=1)
    settings.integer("neighbours", minimum=1, maximum=capacity)
    places = fitted.num_moe_layers * fitted.num_experts
    return {**_popularity(fitted), "matrices": Tensor((np.float32,), (SOME, places), 0)}


def _expert_map(fitted: Fitted, arrays: Arrays, settings: Table) -> dict[str, Tensor]:
    from swapless.predict.expert_map import BUCKETS, OVER

    settings.only("over", "capacity", "offered", "seed")
    over = settings.text("over", choices=OVER)
    for name in ("capacity", "offered", "seed"):
        settings.integer(name, minimum=0 if name == "seed" else 1)
    stored = len(arrays["texts"]) if "texts" in arrays and arrays["texts"].ndim else None
    kind, ends = (np.uint8, (0, 1)) if over == "expert_ids" else (np.float32, (-np.inf, np.inf))
    maps = Tensor((kind,), (stored, fitted.num_moe_layers, fitted.num_experts), *ends)
    return {**_popularity(fitted), "maps": maps, "texts": Tensor((np.uint8,), (SOME, BUCKETS))}


def _linear(fitted: Fitted, arrays: Arrays, settings: Table) -> dict[str, Tensor]:
    from swapless.predict._linear_kernels import FED_BLOCKS, OWN_LAYERS

    settings.only()
    leads, layers, experts = len(fitted.leads), fitted.num_moe_layers, fitted.num_experts
    fed = (len(FED_BLOCKS) + OWN_LAYERS) * experts
    return {
        **_memory(fitted),
        "weight": Tensor((np.float16,), (leads, layers, fed, experts)),
        "bias": Tensor((np.float16,), (leads, layers, 1, experts)),
    }


def _transformer(fitted: Fitted, arrays: Arrays, settings: Table) -> dict[str, Tensor]:
    settings.only("network")
    sizes = settings.table("network")
    names = NetworkShape.__dataclass_fields__
    sizes.only(*names)
    shape = NetworkShape(**{name: sizes.integer(name, minimum=name != "attention_layers", maximum=1 << 24) for name in names})
    for name in ("num_moe_layers", "num_experts", "top_k"):
        if getattr(shape, name) != getattr(fitted, name):
            sizes.refuse(name, f"{getattr(fitted, name)}, as in the header")
    if shape.attention_layers > len(arrays):
        sizes.refuse("attention_layers", "as many as there are tensors for")
    if shape.width % shape.heads:
        sizes.refuse("heads", f"what divides the width, {shape.width}")
    weights = {f"network.{name}": Tensor((np.float16,), size) for name, size in sizes_of(shape).items()}
    return {**_memory(fitted), **weights}


def _paper(fitted: Fitted, arrays: Arrays, settings: Table) -> dict[str, Tensor]:
    from swapless.predict.paper import sizes_of as paper_sizes

    names = ("width", "depth", "heads", "epochs", "batch_tokens", "learning_rate", "seed")
    settings.only(*names)
    width, depth, heads, _, _ = (settings.integer(name, minimum=1, maximum=1 << 20) for name in names[:5])
    settings.number("learning_rate", minimum=0)
    settings.integer("seed")
    if depth > len(arrays):
        settings.refuse("depth", "as many layers as there are tensors for")
    if width % heads:
        settings.refuse("heads", f"what divides the width, {width}")
    ends = "vocabulary.ids" if fitted.vocabulary == "token_id" else "vocabulary.ends"
    words = len(arrays[ends]) + 1 if ends in arrays and arrays[ends].ndim else None
    sizes = paper_sizes(words, fitted.num_moe_layers, fitted.num_experts, width, depth)
    return {**_words(fitted), **{f"network.{name}": Tensor((np.float32,), size, -_MOST, _MOST) for name, size in sizes.items()}}


_KINDS = {
    "eam": _Schema(_eam),
    "expert_map": _Schema(_expert_map, reads_tokens=True),
    "linear": _Schema(_linear, reads_tokens=True, has_leads=True),
    "paper": _Schema(_paper, reads_tokens=True),
    "popularity": _Schema(_plain),
    "previous_token": _Schema(_previous_token),
    "token_prior": _Schema(_token_prior, reads_tokens=True),
    "transformer": _Schema(_transformer, reads_tokens=True),
}
