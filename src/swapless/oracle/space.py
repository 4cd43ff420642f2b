"""The oracle space: themes in few dimensions, cut into one region an expert; fitted once, then frozen in the checkpoint."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from swapless.errors import UsageError, message

__all__ = ["FittedSpace", "OracleSpace", "fit_space"]

LEAST_SHARE, MOST_SHARE = 0.25, 4.0
"""Bounds of an expert's share of the points, in units of an equal share."""


class FittedSpace(NamedTuple):
    """``projection`` (D, R), ``offset`` (R,), ``centroids`` (E, R), ``bias`` (E,), all float32; and what came of it.

    ``shares`` (E,) of the points' weight, and ``distance``, the mean distance of a point from its centroid.
    """

    projection: np.ndarray
    offset: np.ndarray
    centroids: np.ndarray
    bias: np.ndarray
    shares: np.ndarray
    distance: float


class OracleSpace(nn.Module):
    """Nearest-centroid choice in the fitted space (equation 1 of the paper); buffers alone, nothing to train.

    ``spread`` is the squared mean radius of a region at the fit, the unit of its scores.

    Parameters
    ----------
    hidden_size, rank, num_experts : int
        D, R and E.
    """

    projection: Tensor
    offset: Tensor
    centroids: Tensor
    bias: Tensor
    spread: Tensor

    def __init__(self, hidden_size: int, rank: int, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("projection", torch.full((hidden_size, rank), torch.nan))
        self.register_buffer("offset", torch.full((rank,), torch.nan))
        self.register_buffer("centroids", torch.full((num_experts, rank), torch.nan))
        self.register_buffer("bias", torch.full((num_experts,), torch.nan))
        self.register_buffer("spread", torch.tensor(torch.nan))

    @property
    def fitted(self) -> bool:
        """Whether the space holds a fit."""
        return bool(self.centroids.isfinite().all())

    def put(self, fitted: FittedSpace) -> None:
        """Take over a fit."""
        for name in ("projection", "offset", "centroids", "bias"):
            getattr(self, name).copy_(torch.from_numpy(getattr(fitted, name)))
        self.spread.fill_(fitted.distance**2)

    def scores(self, theme_BND: Tensor) -> Tensor:
        """Minus the squared distance to each centroid, less its bias: float32 (B, N, E), the highest is the expert."""
        q_BNR = theme_BND.float() @ self.projection.float() - self.offset.float()
        return -(
            torch.cdist(q_BNR, self.centroids.float()[None], compute_mode="donot_use_mm_for_euclid_dist").square() + self.bias
        )


def fit_space(
    points: np.ndarray, *, num_experts: int, rank: int, centre: bool = False, seed: int = 0, rounds: int = 200
) -> FittedSpace:
    """Fit projection and regions to themes.

    Parameters
    ----------
    points : float ndarray of shape (N, D)
        Themes as a router sees them, each token counting alike, so that a large group weighs more than a small one.
    num_experts : int
        E, regions.
    rank : int
        R, dimensions of the space; fewer where fewer points or dimensions allow no more.
    centre : bool
        Subtract the mean first (principal components instead of the paper's plain SVD).
    seed : int
        Of K-means.
    rounds : int
        Most steps of the balancing.

    Returns
    -------
    FittedSpace
        Balanced: no region holds less than a quarter or more than four times an equal share, by a bias on its distance, which
        is 0 where K-means is balanced by itself.

    Raises
    ------
    UsageError
        More experts than points, or scikit-learn is not installed.

    References
    ----------
    .. [1] Zhou et al., "Oracle-MoE", ICML 2025, PMLR 267, sections 2.2 and 3.
    """
    try:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError as error:
        raise UsageError(message("The fit needs scikit-learn.", step="pip install scikit-learn")) from error

    if num_experts > len(points):
        raise UsageError(
            message(
                "There are fewer themes than experts.",
                got=f"{len(points)} themes, {num_experts} experts",
                step="Fit on more or longer texts, or build the model with fewer experts.",
            )
        )
    points = np.asarray(points, np.float64)
    mean = points.mean(axis=0) if centre else np.zeros(points.shape[1])
    _, _, directions = np.linalg.svd(points - mean, full_matrices=False)
    projection = np.zeros((points.shape[1], rank))
    projection[:, : len(directions[:rank])] = directions[:rank].T
    offset = mean @ projection
    reduced = points @ projection - offset
    with threadpool_limits(limits=1):  # sums of several threads come in any order
        centroids = KMeans(num_experts, n_init=10, random_state=seed).fit(reduced).cluster_centers_
        for _ in range(min(rounds, 4 * num_experts)):  # a region of a few far points is worth no expert: split a crowded one
            labels = ((reduced[:, None, :] - centroids[None]) ** 2).sum(axis=2).argmin(axis=1)
            counts = np.bincount(labels, minlength=num_experts)
            if counts.min() >= LEAST_SHARE * len(reduced) / num_experts or counts.max() < 2:
                break
            halves = KMeans(2, n_init=4, random_state=seed).fit(reduced[labels == counts.argmax()]).cluster_centers_
            centroids[[counts.argmin(), counts.argmax()]] = halves
            centroids = KMeans(num_experts, init=centroids, n_init=1, max_iter=10).fit(reduced).cluster_centers_
    centroids, bias, labels = _balance(reduced, centroids, rounds)
    distance = float(np.linalg.norm(reduced - centroids[labels], axis=1).mean())
    shares = np.bincount(labels, minlength=num_experts) / len(labels)
    single = [array.astype(np.float32) for array in (projection, offset, centroids, bias)]
    return FittedSpace(single[0], single[1], single[2], single[3], shares, distance)


def _balance(points: np.ndarray, centroids: np.ndarray, rounds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Raise the price of crowded regions and lower that of empty ones until all are within bounds."""
    E = len(centroids)
    squared = ((points[:, None, :] - centroids[None]) ** 2).sum(axis=2)
    bias = np.zeros(E)
    step = 0.2 * float(np.mean(squared.min(axis=1))) + 1e-12
    for _ in range(rounds):
        labels = (squared + bias).argmin(axis=1)
        shares = np.bincount(labels, minlength=E) / len(points)
        if shares.min() >= LEAST_SHARE / E and shares.max() <= MOST_SHARE / E:
            break
        bias += step * np.clip(np.log(np.maximum(shares, 1e-3 / E) * E), -2, 2)
    return centroids, bias, (squared + bias).argmin(axis=1)
