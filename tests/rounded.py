"""Slow twin of how kernels round inputs: plain array operations that know nothing of vectors and layouts."""

from __future__ import annotations

import torch

COLUMN_BLOCK = 32


def rounded_inputs(x: torch.Tensor) -> torch.Tensor:
    """``x`` (..., columns) as float64, each block of 32 columns rounded to 255 steps of its largest magnitude."""
    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x.float(), (0, -columns % COLUMN_BLOCK)).unflatten(-1, (-1, COLUMN_BLOCK))
    peak = padded.abs().amax(dim=-1, keepdim=True)
    steps = torch.where(peak > 1e-30, padded * (127 / peak), 0.0).round()
    return (steps.double() * (peak / 127).double()).flatten(-2)[..., :columns]
