"""What torch cannot see into is refused what it would need to see: gradients, transforms and tracing.

Experts are read into slots that the next expert overwrites, and rounded weights are multiplied by code of our own. A graph
that torch keeps of either would hold other weights by the time it is used, or constants where a product was: results that are
wrong without a word. So each of these is an error, by name, where it reaches such code.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._C import _functorch
from torch.autograd import forward_ad

from swapless.errors import UnsupportedOperationError, message

_READ = "its experts are read while it runs"
_TRACERS = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def check_untraced() -> None:
    """Refuse a forward call that somebody compiles, traces, exports or transforms.

    Raises
    ------
    UnsupportedOperationError
        torch.compile, torch.export, torch.jit.trace, make_fx, fake tensors or a transform of torch.func are at work.
    """
    if torch.compiler.is_compiling():
        raise UnsupportedOperationError(
            message(f"An offloaded model cannot be compiled: {_READ}.", step="Leave compile and export out.")
        )
    if torch.jit.is_tracing() or any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS):
        raise UnsupportedOperationError(message(f"An offloaded model cannot be traced: {_READ}.", step="Call it as it is."))
    if _functorch.peek_interpreter_stack() is not None:
        raise UnsupportedOperationError(
            message(f"An offloaded model cannot be transformed by torch.func: {_READ}.", step="Use transformers for that.")
        )


def check_plain(what: str, *tensors: torch.Tensor) -> None:
    """Refuse tensors that gradients are wanted of, or that are no plain tensors; ``what`` gets them is named.

    Raises
    ------
    UnsupportedOperationError
        Gradients are enabled and one of ``tensors`` requires one, carries a tangent, or is of a subclass of its own.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise _no_gradient(what, "an input that requires a gradient")
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise _no_gradient(what, "an input that carries a tangent")
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            raise UnsupportedOperationError(
                message(
                    f"The {what} of an offloaded model take plain tensors only.",
                    got=type(tensor).__name__,
                    step="Give the model torch.Tensor in memory of the CPU.",
                )
            )


class Graphless:
    """Lets no graph grow where nobody asked for one: it would hold what the budget does not count.

    Weights come as transformers leaves them, each with a gradient to be had: by that flag alone torch chooses between two ways
    to multiply, which differ in the last bit. So the flags stay, and gradients are off while all of them are up and no input
    wants one.

    Parameters
    ----------
    model : torch.nn.Module
        As it was loaded.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def __call__(self, given: Iterable[Any]) -> AbstractContextManager[Any]:
        """Context of a forward call that is ``given`` this."""
        if not torch.is_grad_enabled() or any(isinstance(value, torch.Tensor) and value.requires_grad for value in given):
            return nullcontext()
        return torch.no_grad() if all(parameter.requires_grad for parameter in self._parameters) else nullcontext()


def output_type(given: torch.dtype) -> torch.dtype:
    """Type in which torch's own layer answers inputs of type ``given``: under autocast, autocast's."""
    if torch.is_autocast_enabled("cpu") and given.is_floating_point and given != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return given


def _no_gradient(what: str, got: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        message(
            f"No gradient goes through the {what} of an offloaded model: their weights are gone by the time it is computed.",
            got=got,
            step="Run it under torch.no_grad(), or compute gradients with transformers, all weights in memory.",
        )
    )
