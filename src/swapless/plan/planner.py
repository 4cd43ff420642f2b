"""What a checkpoint would do on this machine under a memory budget, in each precision that it could be packed in.

Nothing is loaded: sizes come from headers, the KV cache and the time beside products from a hollow model, products and reads
are timed at the checkpoint's own shapes, and hits come from a replay of the engine's policy in the engine's slots, or from the
nearest stored curve. The budget is divided by the engine's own function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from swapless.cache import DEFAULT_POLICY, POLICIES
from swapless.errors import BudgetError, UsageError, message
from swapless.plan.commands import commands
from swapless.plan.hits import Hits
from swapless.plan.hollow import HollowRun
from swapless.plan.machine import Machine
from swapless.plan.precision import as_packed, disk_bytes
from swapless.plan.reads import Reads
from swapless.plan.set_ups import Plan, SetUp
from swapless.plan.speed import GATE_RECALL
from swapless.plan.timing import Expectation, Timing
from swapless.runtime.budget import Budget, plan_budget
from swapless.runtime.door import experts_of
from swapless.runtime.forecast import Forecast, forecast
from swapless.runtime.hollow import hollow_model
from swapless.runtime.memory import MemoryMeter
from swapless.runtime.open import OpenCheckpoint
from swapless.runtime.parts import AUTO_PREFETCH, budget_shape, context_of, gate_leads, parts_to_come
from swapless.store.packed import Check
from swapless.units import format_size

PRECISIONS = ((16, 16), (8, 16), (8, 8), (4, 16), (4, 8), (4, 4))
"""Bits of experts and of all other weights that a checkpoint is planned for."""

WORTH_BITS = 1.1
"""A set-up must be this much faster than one with more bits to be recommended before it."""

_TENSOR_BYTES = 3 << 10
"""What a tensor of the checkpoint takes in the interpreter: its name, its place, its part in the plan of reads."""

Progress = Callable[[str, float], None]


def plan(
    opened: OpenCheckpoint,
    name: str,
    memory_bytes: int,
    machine: Machine,
    hits: Hits,
    *,
    whole: bool = True,
    context: int | None = None,
    policy: str = DEFAULT_POLICY,
    precisions: Sequence[tuple[int, int]] = PRECISIONS,
    recall: float = GATE_RECALL,
    check: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Foresee what ``opened`` would do with ``memory_bytes``.

    Parameters
    ----------
    opened : OpenCheckpoint
        A checkpoint or a packed store, or ghosts of one.
    name : str
        What it is called in commands.
    memory_bytes : int
        What the whole process may hold.
    machine : Machine
        Where it would run.
    hits : Hits
        Where hit rates come from.
    whole : bool
        Whether its weights lie there too, so that their disk can be probed; else the machine's figures stand in.
    context : int, optional
        As of :func:`swapless.load`.
    policy : str
        Name of the cache policy.
    precisions : sequence of (int, int)
        Bits of experts and of all else to plan for; a packed store has its own alone.
    recall : float
        Share of the next MoE layer's experts that its router foresees.
    check : str, optional
        As of :func:`swapless.load`.
    progress : callable of (str, float), optional
        Told what is going on and the share done.

    Raises
    ------
    BudgetError
        No set-up works; the message names the smallest budget that does, and in which.
    UsageError
        A context that the model cannot have, or a recall that is no share.
    UnknownNameError
        No such policy, or one of which there is neither a trace nor a curve.
    """
    report = progress or (lambda stage, done: None)
    context_tokens = context_of(context, opened.config)
    if not 0 <= recall <= 1:
        raise UsageError(message("The recall is a share of experts.", got=str(recall), allowed="0 to 1"))
    report("measuring the model without its weights", 0.1)
    model = hollow_model(opened)
    found = forecast(opened, context_tokens, budget_bytes=memory_bytes)
    if opened.manifest is None:
        forms = [(opened if bits == dense == 16 else as_packed(opened, bits, dense, model)) for bits, dense in precisions]
    else:
        forms = [opened]
    reads = Reads(opened, machine, whole, Check.of(check))
    divide = partial(
        _budget,
        found=found,
        reads=reads,
        machine=machine,
        memory_bytes=memory_bytes,
        context_tokens=context_tokens,
        policy=policy,
    )
    cases = [case for form in forms for case in _cases(form, divide)]
    largest = next((case.budget for case in cases if case.budget is not None), None)
    if largest is None:
        raise _too_small(memory_bytes, cases)
    module = next(module for _, module in experts_of(model))
    rows: list[SetUp] = []
    with HollowRun(model, opened, POLICIES.get(policy)(), largest) as hollow:
        timing = Timing(hollow, module, reads, recall)
        if not hollow.foresees:  # a run sets the slots aside, and reads nothing ahead
            cases = [case._replace(prefetch=None) for case in cases if case.default]
        for number, form in enumerate(forms):
            report("timing products and reads", 0.2 + 0.8 * number / len(forms))
            mine = [case for case in cases if case.form is form]
            wanted = {case.prefetch: hits.of(case.budget.slots) for case in mine if case.budget is not None}
            expected = timing.expected(form, wanted)
            rows += [_set_up(case, name, policy, expected.get(case.prefetch), memory_bytes, context, check) for case in mine]
    return Plan(
        memory_bytes=memory_bytes,
        context_tokens=context_tokens,
        hits_from=hits.source,
        reads_from=reads.source,
        set_ups=tuple(rows),
        lossless=next((row for row in rows if row.lossless and row.default and row.budget), None),
        best=_best(rows),
    )


class _Case(NamedTuple):
    """A precision with and without reading ahead: what it may hold, None where the memory is not enough; and what it needs."""

    form: OpenCheckpoint
    prefetch: str | None
    default: bool
    budget: Budget | None
    needs_bytes: int


def _cases(form: OpenCheckpoint, divide: Callable[..., tuple[Budget | None, int]]) -> list[_Case]:
    """A run reads ahead where that leaves the cache most of its slots, and there the case without is shown beside it."""
    plain, ahead = (divide(form, leads) for leads in ([], gate_leads("gate")))
    if ahead[0] is None or not ahead[0].ahead_slots:
        return [_Case(form, None, True, *plain)]
    return [_Case(form, None, False, *plain), _Case(form, "gate", True, *ahead)]


def _budget(
    form: OpenCheckpoint,
    leads: Sequence[int],
    *,
    found: Forecast,
    reads: Reads,
    machine: Machine,
    memory_bytes: int,
    context_tokens: int,
    policy: str,
) -> tuple[Budget | None, int]:
    """The engine's budget of one set-up, None where the memory is not enough; and the smallest that is."""
    base = machine.base_bytes
    meter = MemoryMeter()
    if meter.source == "cgroup":  # what a run would find in use already
        base = max(base, meter.now_bytes())
    meter.close()
    fixed = {
        "base": base,
        "non_expert": form.layout.non_expert_bytes,
        "loading": machine.loading_bytes + _TENSOR_BYTES * len(form.refs),
    }
    shape = budget_shape(form, context_tokens, leads, ahead_if_worth=True)
    come = parts_to_come(form, POLICIES.get(policy)(), found, context_tokens, reads.io_bytes(form))
    # How many reads are in flight is probed anew by each load, so what is promised holds for the most of them.
    most = fixed | come | {"io_buffers": reads.most_io_bytes(form)}
    prompt = {"prompt_bytes": found.needs.prompt_bytes}
    needs = plan_budget(total_bytes=None, resident_share=1.0, fixed_parts=most, **prompt, **shape).floor_bytes
    if memory_bytes < needs:
        return None, needs
    return plan_budget(total_bytes=memory_bytes, resident_share=None, fixed_parts=fixed | come, **prompt, **shape), needs


def _set_up(
    case: _Case,
    name: str,
    policy: str,
    expected: Expectation | None,
    memory_bytes: int,
    context: int | None,
    check: str | None,
) -> SetUp:
    manifest, budget = case.form.manifest, case.budget
    bits, dense_bits = case.form.bits
    perplexity = 1.0 if bits == dense_bits == 16 else None
    if manifest is not None and manifest.perplexity:
        perplexity = manifest.perplexity["packed"] / manifest.perplexity["original"]
    there = manifest is not None and bool(manifest.source)
    return SetUp(
        bits=bits,
        dense_bits=dense_bits,
        packed=manifest is not None,
        policy=policy,
        prefetch=case.prefetch,
        default=case.default,
        budget=budget,
        needs_bytes=case.needs_bytes,
        hit_rate=None if expected is None else expected.hits.hit_rate,
        speed=None if expected is None else expected.speed(),
        expected=expected,
        perplexity_ratio=perplexity,
        disk_bytes=disk_bytes(case.form),
        commands=commands(
            name,
            memory_bytes,
            pack=None if manifest is None or there else (bits, dense_bits),
            prefetch=AUTO_PREFETCH if case.default else "none",
            policy=policy,
            context=context,
            check=check if manifest is not None else None,
        ),
    )


def _best(rows: Sequence[SetUp]) -> SetUp:
    """The fastest, held against those with more bits: fewer must be worth it. A run tries whether reading ahead pays."""
    best: SetUp | None = None
    fit = (row for row in rows if row.speed and row.default)
    for row in sorted(fit, key=lambda row: (-row.bits, -row.dense_bits)):
        assert row.speed is not None
        if best is None or best.speed is None or row.speed.tokens_per_s > WORTH_BITS * best.speed.tokens_per_s:
            best = row
    assert best is not None, "some set-up fits"
    return best


def _too_small(memory_bytes: int, cases: Sequence[_Case]) -> BudgetError:
    least = {case.form.bits: case.needs_bytes for case in cases}
    bits, dense = min(least, key=lambda key: least[key])
    unpacked = least.get((16, 16))
    allowed = f"at least {format_size(least[bits, dense])} ({least[bits, dense]} bytes), with experts of {bits} bits"
    allowed += f" and all else of {dense}"
    if unpacked is not None and (bits, dense) != (16, 16):
        allowed += f"; unpacked, {format_size(unpacked)} ({unpacked} bytes)"
    return BudgetError(
        message(
            "The memory budget is too small for this model, whatever its precision.",
            got=f"{format_size(memory_bytes)} ({memory_bytes} bytes)",
            allowed=allowed,
            step="Raise --memory, or lower --context.",
        )
    )
