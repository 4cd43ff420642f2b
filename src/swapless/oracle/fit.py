"""Fit groups and spaces to a warmed-up model: what each router would see, on held-in text, once.

The fit looks through the blocks' ``watch``, so that the warm-up may be dense or have a learned gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from swapless.errors import UsageError, message
from swapless.oracle.config import OracleMoeConfig
from swapless.oracle.groups import extend_groups, largest_threshold
from swapless.oracle.model import OracleMoeForCausalLM
from swapless.oracle.space import FittedSpace, fit_space
from swapless.oracle.theme import View, theme_of

__all__ = ["RouterFit", "fit_routers"]

THRESHOLDS = np.geomspace(1e-3, 2.0, 24)
MOST_GROUPS_IN_1024 = 5.0
LEAST_MEMBERS = 8
"""Tokens of a group, or of a document, before its mean counts as a theme."""


class RouterFit(NamedTuple):
    """``tau`` (NaN where the router has no groups), the space (None where it needs none), and groups a sequence."""

    tau: float
    space: FittedSpace | None
    groups: float


def fit_routers(
    model: OracleMoeForCausalLM,
    config: OracleMoeConfig,
    batches: Sequence[Tensor],
    *,
    stride: int = 8,
    seed: int = 0,
    report: Callable[[float], None] = lambda done: None,
) -> list[RouterFit]:
    """Fit every MoE layer of ``config`` to what ``model`` shows on ``batches``.

    Parameters
    ----------
    model : OracleMoeForCausalLM
        Warmed up, dense or with a learned gate, of the same shape; it is left in evaluation mode.
    config : OracleMoeConfig
        The model to be.
    batches : sequence of int64 Tensor (B, T)
        Held-in token ids.
    stride : int
        Every how many tokens a theme is taken for the space. Running means are taken, as a router sees them.
    seed : int
        Of K-means.
    report : callable
        Told the share done.

    Returns
    -------
    list of RouterFit
        One a MoE layer.

    Raises
    ------
    UsageError
        Fewer groups, or themes, than experts.
    """
    model.eval()
    blocks = config.moe_blocks or []
    grouped = config.kind.theme == "group"
    taus = [float("nan")] * len(blocks)
    medians = [float("nan")] * len(blocks)
    if grouped:
        sample = batches[: max(1, len(batches) // 4)]
        tokens = int(batches[0].shape[1])
        most = max(2.0, MOST_GROUPS_IN_1024 * tokens / 1024)
        for moe_layer, counts in enumerate(_count_groups(model, blocks, config, sample)):
            taus[moe_layer] = largest_threshold(counts, THRESHOLDS, most)
            medians[moe_layer] = float(np.median(counts[np.searchsorted(THRESHOLDS, taus[moe_layer])]))
    report(0.3)
    themes = _themes(model, blocks, config, taus, batches, stride)
    report(0.8)
    fits = []
    for tau, median, (points, groups) in zip(taus, medians, themes, strict=True):
        if groups < config.num_experts:
            raise UsageError(
                message(
                    "There are fewer groups than experts.",
                    got=f"{groups} groups of at least {LEAST_MEMBERS} tokens, {config.num_experts} experts",
                    step="Fit on more or longer texts, or build the model with fewer experts.",
                )
            )
        space = fit_space(points, num_experts=config.num_experts, rank=config.space_rank, centre=config.centre, seed=seed)
        fits.append(RouterFit(tau, space, median))
    report(1.0)
    return fits


@torch.no_grad()
def _watched(
    model: OracleMoeForCausalLM, blocks: Iterable[int], batches: Iterable[Tensor], see: Callable[[int, View], None]
) -> None:
    layers = model.model.layers
    try:
        for moe_layer, block in enumerate(blocks):
            layers[block].watch = lambda view, moe_layer=moe_layer: see(moe_layer, view)
        for ids_BT in batches:
            model.model(ids_BT, use_cache=False)
    finally:
        for block in blocks:
            layers[block].watch = None


def _count_groups(
    model: OracleMoeForCausalLM, blocks: list[int], config: OracleMoeConfig, batches: Sequence[Tensor]
) -> list[np.ndarray]:
    """Groups a sequence under every threshold, int (H, B) a MoE layer."""
    found: list[list[np.ndarray]] = [[] for _ in blocks]

    def see(moe_layer: int, view: View) -> None:
        scores = view.probabilities().numpy()
        counts = []
        for threshold in THRESHOLDS:
            state: dict[str, Tensor] = {}
            extend_groups(scores, view.documents, threshold / view.documents.rank, config.group_fraction, state)
            counts.append(state["groups"].numpy())
        found[moe_layer].append(np.stack(counts))

    _watched(model, blocks, batches, see)
    return [np.concatenate(counts, axis=1) for counts in found]


def _themes(
    model: OracleMoeForCausalLM,
    blocks: list[int],
    config: OracleMoeConfig,
    taus: list[float],
    batches: Sequence[Tensor],
    stride: int,
) -> list[tuple[np.ndarray, int]]:
    """Themes (N, D) of every ``stride``-th token whose group or document is old enough, and how many of those there are."""
    points: list[list[np.ndarray]] = [[] for _ in blocks]
    groups = [0] * len(blocks)
    least = 1 if config.kind.theme == "paper-group" else LEAST_MEMBERS  # the paper's cliques hardly grow

    def see(moe_layer: int, view: View) -> None:
        state: dict[str, Tensor] = {}
        theme = theme_of(view, config, taus[moe_layer], state).detach().cpu().numpy()
        slot = state["gid"].numpy() if "gid" in state else view.documents.number
        for row_theme, row_slot in zip(theme, slot, strict=True):
            age = _age(row_slot)
            old = (age >= least) & (row_slot >= 0)
            groups[moe_layer] += len(np.unique(row_slot[old]))
            points[moe_layer].append(row_theme[old & (np.arange(len(age)) % stride == 0)])

    _watched(model, blocks, batches, see)
    return [(np.concatenate(rows), count) for rows, count in zip(points, groups, strict=True)]


def _age(slot: np.ndarray) -> np.ndarray:
    """How many tokens of its slot each token is the last of."""
    order = np.argsort(slot, kind="stable")
    ordered = slot[order]
    begins = np.r_[True, ordered[1:] != ordered[:-1]]
    place = np.arange(len(slot))
    age = np.empty(len(slot), np.int64)
    age[order] = place - np.maximum.accumulate(np.where(begins, place, 0)) + 1
    return age
