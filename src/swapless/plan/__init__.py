"""Which budget, slots and precision suit a machine, and the speed to expect: told from headers, nothing loaded.

``swapless.plan(checkpoint, "8GiB")`` says it: the package is called like the function that one asks it for, so it can be
called as well.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swapless.plan.set_ups import Plan


class _Plan(ModuleType):
    def __call__(self, checkpoint: Any, memory: str | int, **options: Any) -> Plan:
        """The plan of ``checkpoint`` within ``memory``; see :func:`swapless.plan.whole.plan`."""
        from swapless.plan.whole import plan

        return plan(checkpoint, memory, **options)


sys.modules[__name__].__class__ = _Plan
