"""``load``: from a checkpoint and a budget to an ordinary transformers model whose experts stay on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from swapless.cache import DEFAULT_POLICY, POLICIES
from swapless.cache.policy import Policy
from swapless.cache.residency import layer_pools
from swapless.cache.serve import ExpertCache
from swapless.errors import BudgetError, CheckpointCorruptError, UsageError, message
from swapless.notation import Phase
from swapless.runtime.ahead import Lookahead
from swapless.runtime.allocator import give_back
from swapless.runtime.budget import SLACK_BYTES, Budget, plan_budget
from swapless.runtime.compute import Experts
from swapless.runtime.door import (
    experts_of,
    foreign_errors,
    generation_config,
    group_heads,
    load_non_experts,
    part_heads,
)
from swapless.runtime.engine import Engine
from swapless.runtime.forecast import Forecast, forecast
from swapless.runtime.memory import CODE_BYTES, MemoryMeter, available_bytes, drop_unused_cache
from swapless.runtime.offloaded import offloaded_class
from swapless.runtime.open import OpenCheckpoint, open_checkpoint
from swapless.runtime.parts import budget_shape, computation, context_of, open_store, parts_to_come, sample_extents
from swapless.runtime.pool import SlotPool
from swapless.runtime.prefetch import prefetch_of
from swapless.runtime.routing import RoutingLog
from swapless.runtime.shape import trace_header
from swapless.runtime.source import checkpoint_folder
from swapless.runtime.steps import StepHooks
from swapless.runtime.store import Store
from swapless.runtime.turns import Turn
from swapless.store.packed import Check, Manifest, check_dense_file
from swapless.store.probe import DEPTHS, HELD_BYTES, Probe, probe
from swapless.store.read import FileReader
from swapless.store.tensors import TensorReader
from swapless.units import parse_share, parse_size

_AUTO_SHARE = 0.8
"""Of what is available, the part that ``memory="auto"`` takes."""

_DIFFER_BYTES = 8 << 20
"""What the kernel's figures of two processes that do the same differ by."""

_SELDOM = ("prediction", "code")
"""Parts of a budget that are left out where there is nothing of them."""

_LOADING = Turn()
"""transformers changes switches of the whole process while it builds a model, and memory is measured by differences."""

Progress = Callable[[str, float], None]


def load(
    checkpoint: str | Path,
    memory: str | int | None = None,
    *,
    resident: str | float | None = None,
    policy: str | Policy = DEFAULT_POLICY,
    prefetch: str | Path | None = None,
    context: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    local_files_only: bool = False,
    check: str | bool | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """An ordinary transformers model that holds its experts in a byte budget and reads the rest when needed.

    Its output equals transformers' with ``experts_implementation="eager"`` bit for bit, at one thread and with reference
    weights aligned to 64 bytes. A packed store of 8 or 4 bits gives what its rounded weights give, computed in float32.

    Parameters
    ----------
    checkpoint : str or Path
        Local folder (a checkpoint or a packed store), or hub id.
    memory : str or int, optional
        What the whole process may hold: ``"8GiB"``, bytes, or ``"auto"`` (the default where no ``resident`` is given): most
        of what is available now.
    resident : str or float, optional
        Instead of ``memory``: the share of all experts to keep, ``"25%"`` or 0.25.
    policy : str or Policy
        Who goes when a slot is needed: a name from the registry, or a policy of your own.
    prefetch : str or Path, optional
        Read ahead what the routers of the next MoE layers say of this one's input: ``"gate"``, or ``"gate:2"`` for two layers
        ahead; or what a saved predictor says: its file. Output stays the same, bit for bit. It switches itself off while it
        does not pay. The memory that a predictor takes is part of the budget. ``"auto"`` is ``"gate"`` where it leaves the
        cache most of its slots and where the family's routers can be asked, else nothing; ``"none"`` is None.
    context : int, optional
        Most tokens a sequence may have; the KV cache and activations of so many are set aside. Default: 4096, or the
        model's own limit if that is less.
    revision, token, local_files_only
        For a hub id, as in ``from_pretrained``.
    dtype : str or torch.dtype
        Type to compute in; ``"auto"`` takes the checkpoint's own, and only that reads experts without conversion.
    attn_implementation : str, optional
        As in ``from_pretrained``, which decides by itself; of a packed store with rounded weights, ``"swapless_grouped"``
        where the family has ``"sdpa"``: the same attention, faster in decode steps.
    check : str, optional
        When weights of a packed store are held against their checksums: ``"first"`` (the default), a block of an expert at
        its first read and all else when it is loaded; ``"always"``, a block at each read; or ``"none"``.
    progress : callable of (str, float), optional
        Told what is going on and the share done.

    Returns
    -------
    PreTrainedModel
        With ``model.swapless`` (:class:`~swapless.runtime.engine.Engine`): ``stats()``, ``trace()``, ``close()``. The model
        is a context manager that closes itself.

    Raises
    ------
    CheckpointError
        Something is wrong with the files; the subclass says what.
    UnsupportedFamilyError
        The family does not come through transformers' experts interface. Nothing is ever loaded in full instead.
    BudgetError
        The budget is below the floor, which the message names.
    PredictorError
        ``prefetch`` is a file that is no predictor, or (PredictorMismatchError) a predictor of another model.
    UsageError
        Unknown policy, malformed size, both ``memory`` and ``resident``, unknown ``prefetch``.
    """
    with _LOADING.lock, ExitStack() as opening:
        model = _load(
            checkpoint,
            memory,
            resident=resident,
            policy=policy,
            prefetch=prefetch,
            context=context,
            revision=revision,
            token=token,
            dtype=dtype,
            attn_implementation=attn_implementation,
            local_files_only=local_files_only,
            check=check,
            progress=progress,
            opening=opening,
        )
        opening.pop_all()  # from here on it is the model's to close
        return model


def _load(
    checkpoint: str | Path,
    memory: str | int | None,
    *,
    resident: str | float | None,
    policy: str | Policy,
    prefetch: str | Path | None,
    context: int | None,
    revision: str | None,
    token: str | None,
    dtype: str | torch.dtype,
    attn_implementation: str | None,
    local_files_only: bool,
    check: str | bool | None,
    progress: Progress | None,
    opening: ExitStack,
) -> PreTrainedModel:
    chosen: Policy = POLICIES.get(policy)() if isinstance(policy, str) else policy
    total_bytes, share = _target(memory, resident)
    report = progress or (lambda stage, done: None)
    meter = opening.enter_context(closing(MemoryMeter()))
    meter.begin()
    dropped_bytes = drop_unused_cache()
    report("reading headers", 0.0)
    folder = checkpoint_folder(checkpoint, revision=revision, token=token, local_files_only=local_files_only)
    opened = open_checkpoint(folder, dtype)
    when = Check.of(check)
    if check and check != Check.NONE and opened.manifest is None:
        raise UsageError(message("Only a packed store has checksums to check.", got=folder, step="Leave check out."))
    model_id = _model_id(checkpoint)
    ahead = prefetch_of(prefetch, opened, model_id)
    context_tokens = context_of(context, opened.config)
    layers = opened.layout.moe_layers
    if_worth = ahead is not None and ahead.if_worth
    shape = budget_shape(opened, context_tokens, ahead.leads if ahead else [], ahead_if_worth=if_worth)

    report("trying out the model without its weights", 0.05)
    _warm_kernels(chosen)
    compute = computation(opened)
    found = forecast(opened, context_tokens, attn_implementation, total_bytes)
    lookahead_bytes = read_bytes = 0
    if ahead is not None and not if_worth:
        before_bytes = meter.now_bytes()
        ahead.read()
        read_bytes = max(0, meter.now_bytes() - before_bytes)
        lookahead_bytes = ahead.growth_bytes(context_tokens)
    if memory == "auto" or (total_bytes is None and share is None):
        total_bytes = meter.now_bytes() + int(_AUTO_SHARE * available_bytes())
    store = opening.enter_context(closing(open_store(opened, when)))
    fixed = {
        "base": meter.base_bytes() - read_bytes,
        "non_expert": opened.layout.non_expert_bytes,
        "loading": found.loading_bytes,
        "prediction": read_bytes + lookahead_bytes,
        "code": min(dropped_bytes, CODE_BYTES),
    }
    come = parts_to_come(opened, chosen, found, context_tokens, max(DEPTHS) * store.bounce_bytes)
    divide = partial(plan_budget, total_bytes=total_bytes, resident_share=share, prompt_bytes=found.needs.prompt_bytes, **shape)

    def hope(**parts: int) -> Budget:
        least_bytes = max(meter.anonymous_peak_bytes(), sum(fixed.values()) + found.converting_bytes)
        return divide(fixed_parts=fixed | come | parts, least_bytes=least_bytes)

    # The smallest budget is this one, whatever is found out later: refused here or not at all.
    hoped: Budget | None = None
    try:
        hoped = hope()
    except BudgetError:
        meter.leave_files()
        fixed |= {"base": meter.base_bytes() - read_bytes, "code": 0}
        try:
            hoped = hope()
        except BudgetError:
            # The same floor as another process named, but for what measurements differ by.
            with suppress(BudgetError):
                hoped = hope(slack=SLACK_BYTES - _DIFFER_BYTES)
            if hoped is None:
                raise

    report("loading non-expert weights", 0.1)
    model = _load_non_experts(opened, attn_implementation, when)
    part_heads(model)
    report("measuring", 0.7)
    lookahead = None
    if ahead is not None and not if_worth:
        before_bytes = meter.now_bytes()
        lookahead = ahead.open(model)
        fixed["prediction"] += max(0, meter.now_bytes() - before_bytes)
    held_bytes = min(HELD_BYTES, hoped.slots * hoped.slot_bytes // 2)  # no more than slots take later
    measured = probe(store.reader, sample_extents(store, layers), copied=store.bounce_bytes > 0, held_bytes=held_bytes)
    dropped_bytes += drop_unused_cache()
    fixed["code"] = min(dropped_bytes, CODE_BYTES) if meter.files_count else 0
    give_back()
    meter.settle()
    there = fixed["base"] + fixed["non_expert"] + fixed["prediction"] - lookahead_bytes
    fixed["loading"] = max(0, meter.base_bytes() - there)
    come["io_buffers"] = measured.depth * store.bounce_bytes
    come["slack"] = max(0, hoped.parts["slack"] - max(0, fixed["loading"] - found.loading_bytes))
    parts = {name: size for name, size in (fixed | come).items() if size or name not in _SELDOM}
    budget = divide(fixed_parts=parts, least_bytes=hoped.floor_bytes)
    budget = replace(
        budget, floor_bytes=hoped.floor_bytes, warnings=(*budget.warnings, *opened.notes, *(ahead.notes if ahead else ()))
    )
    if ahead is not None and if_worth and budget.ahead_slots:
        lookahead = ahead.open(model)
    report("opening slots", 0.9)
    pool = SlotPool(layers, budget.slots + budget.staging_blocks + budget.ahead_slots)
    engine = _engine(opened, chosen, store, pool, compute.of(pool), budget, measured, meter, model_id, found, lookahead)
    opening.enter_context(closing(engine))
    for moe_layer, (_, module) in enumerate(experts_of(model)):
        module.swapless_engine = engine  # type: ignore[assignment]
        module.swapless_moe_layer = moe_layer  # type: ignore[assignment]
    for module in model.modules():
        if hasattr(module, "take_turns"):  # layers with scratch memory of their own
            module.take_turns(engine.turn)  # type: ignore[operator]
    StepHooks(engine, context_tokens, rounded=opened.rounded).attach(model)
    model.swapless = engine  # type: ignore[assignment]
    report("ready", 1.0)
    return model


def _target(memory: str | int | None, resident: str | float | None) -> tuple[int | None, float | None]:
    if memory is not None and resident is not None:
        raise UsageError(message("Give either memory or resident, not both.", got=f"memory={memory!r}, resident={resident!r}"))
    if resident is not None:
        return None, parse_share(resident)
    return (None if memory is None or memory == "auto" else parse_size(memory)), None


def _load_non_experts(opened: OpenCheckpoint, attn_implementation: str | None, check: Check) -> PreTrainedModel:
    checksums: Mapping[str, str] = {}
    if opened.manifest is not None and check != Check.NONE:
        checksums = opened.manifest.tensors
        if not checksums:
            check_dense_file(opened.folder, opened.manifest)
    bars = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    reader = FileReader(opened.files)
    tensors = TensorReader(reader, checksums)
    try:
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        with foreign_errors("Weights do not fit the model.", opened.folder):
            if opened.manifest is not None and opened.manifest.dense:
                model, wrong = _load_quantized_linears(opened, opened.manifest, tensors, attn_implementation)
            else:
                cls = offloaded_class(opened.cls)
                model, wrong = load_non_experts(cls, opened.config, opened.layout, opened.refs, tensors, attn_implementation)
        tensors.check()
    except CheckpointCorruptError:
        tensors.check()
        raise
    finally:
        try:
            if bars:
                transformers_logging.enable_progress_bar()
            transformers_logging.set_verbosity(verbosity)
        finally:
            reader.close()
    if wrong:
        raise CheckpointCorruptError(
            message(
                "The checkpoint lacks weights of the model, or has them in a wrong shape.",
                where=opened.folder,
                got=", ".join(wrong[:4]),
                step="Download the checkpoint again.",
            )
        )
    model.generation_config = generation_config(opened.folder) or model.generation_config
    if attn_implementation is None and opened.rounded:
        group_heads(model, True)  # no last bit is to be kept
    return model.eval()


def _load_quantized_linears(
    opened: OpenCheckpoint, manifest: Manifest, tensors: TensorReader, attn_implementation: str | None
) -> tuple[PreTrainedModel, list[str]]:
    from swapless.runtime.linear import quantize_linears, quantized_linear  # kernels are compiled when they are imported

    cls = offloaded_class(opened.cls, lambda model: quantize_linears(model, manifest.linear_layouts))
    model, wrong = load_non_experts(
        cls, opened.config, opened.layout, opened.refs, tensors, attn_implementation, apart=manifest.dense
    )
    for key, entry in manifest.dense.items():
        quantized_linear(model, entry["module"]).fill(torch.from_numpy(tensors.read(opened.refs[key])))
    return model, wrong


def _warm_kernels(policy: Policy) -> None:
    cache = ExpertCache(policy, 1, 2, [0], [1])
    for phase in Phase:
        cache.request(0, np.zeros((1, 1), np.int64), phase)
    cache.forget(0, np.zeros(1, np.int32))


def _model_id(checkpoint: str | Path) -> str:
    # A trace must not carry a path of this machine: of a local folder it keeps the name.
    return Path(checkpoint).resolve().name if Path(checkpoint).exists() else str(checkpoint)


def _engine(
    opened: OpenCheckpoint,
    policy: Policy,
    store: Store,
    pool: SlotPool,
    experts: Experts,
    budget: Budget,
    measured: Probe,
    meter: MemoryMeter,
    model_id: str,
    found: Forecast,
    lookahead: Lookahead | None,
) -> Engine:
    layers = opened.layout.moe_layers
    num_experts = max(layer.num_experts for layer in layers)
    pool_of_layer, pool_slots = layer_pools(len(layers), num_experts, budget.slots)
    return Engine(
        store=store,
        cache=ExpertCache(policy, len(layers), num_experts, pool_of_layer, pool_slots),
        pool=pool,
        experts=experts,
        budget=budget,
        probe=measured,
        meter=meter,
        routing=RoutingLog(trace_header(opened, store, model_id, found.top_k)),
        lookahead=lookahead,
        needs=found.needs,
    )
