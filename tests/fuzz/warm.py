"""Imported by the server that calls are forked from, so that what most of them need is there already. It starts no thread."""

from __future__ import annotations

import numpy as np
import torch
from numba.core.registry import cpu_target
from transformers import AutoConfig, GenerationConfig, OlmoeConfig, OlmoeForCausalLM  # noqa: F401

import swapless.cli.session
import swapless.runtime.packing
import swapless.runtime.verification_packed
import swapless.store.verify
import swapless.trace  # noqa: F401
from swapless.cache import DEFAULT_POLICY, POLICIES
from swapless.runtime.linear import QuantizedLinear  # noqa: F401
from swapless.runtime.model import _warm_kernels
from swapless.runtime.quantized import QuantizedExperts  # noqa: F401
from swapless.store.matrix import MatrixLayout
from swapless.store.quantize import quantize

torch.set_num_threads(1)
cpu_target.target_context.refresh()
_warm_kernels(POLICIES.get(DEFAULT_POLICY)())
for _bits in (8, 4):
    _layout = MatrixLayout(rows=32, columns=32, bits=_bits, group=32)
    for _kind in (np.uint16, np.float32):
        quantize(np.zeros((32, 32), _kind), _layout, np.zeros(_layout.nbytes, np.uint8))
