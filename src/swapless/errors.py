"""Every error the project raises on purpose, as one tree.

::

    SwaplessError
    |-- UsageError (ValueError)              a wrong argument: what, got, allowed
    |   |-- UnitError                        a size without a unit, a share outside (0, 1]
    |   |-- UnknownNameError (KeyError)      no such policy, predictor, device: lists the names, suggests the closest
    |   |-- CapacityError                    a cache too small for the request model
    |   `-- OutputExistsError (FileExistsError)   an output is there already, and --force is not given
    |-- CheckpointError (ValueError)         the checkpoint on disk is not what it says
    |   |-- CheckpointMissingError (FileNotFoundError)   folder, index or shard is not there
    |   |-- CheckpointCorruptError           truncated, overlapping or malformed header
    |   |-- PackMismatchError                a packed store, or a part of one, of another checkpoint or precision
    |   `-- UnsupportedCheckpointError       a format we do not serve: names it and what would be needed
    |-- UnsupportedFamilyError (TypeError)   a model family without an experts module at the door
    |-- UnsupportedOperationError (RuntimeError)   what an offloaded model cannot do (save, move, train, compile)
    |-- BudgetError (MemoryError)            the memory budget is below the floor
    |-- ContextError (ValueError)            prompt or generation longer than the context
    |-- ReadError (OSError)                  a read failed while running: short, vanished, I/O error
    |-- WriteError (OSError)                 an output cannot be written: the disk is full, or not ours to write
    |-- LockedError (BlockingIOError)        another process is at work on the same folder: names it
    |-- ClosedError (RuntimeError)           used after close()
    |-- VerifyError (AssertionError)         ours and the reference differ
    |-- IntegrityError (AssertionError)      parts of a running model disagree: a bug of ours, or memory that was written to
    |-- TraceError (ValueError)
    |   |-- TraceMissingError (FileNotFoundError)   there is no such trace
    |   |-- TraceFormatError                 not a trace, wrong version, wrong column type, missing header
    |   |-- TraceValueError                  an id out of range, ragged K, empty document
    |   `-- TraceMismatchError               traces of different models or shapes put together
    |-- PredictorError (ValueError)
    |   |-- PredictorMismatchError           predictor of another model
    |   `-- NotFittedError (AttributeError)  used before fit
    `-- DeviceProfileError (ValueError)      a device profile that cannot be (zero bandwidth)

Each class also inherits the standard exception its users would catch. A message says what, where, got, allowed and the
next step; :func:`message` builds it so that none is forgotten.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def message(what: str, *, where: object = None, got: object = None, allowed: object = None, step: str | None = None) -> str:
    """Join the parts of an error message in their fixed order.

    Examples
    --------
    >>> message("The capacity is too small.", got=0, allowed="1 to 64", step="Raise --capacity.")
    'The capacity is too small. Got: 0. Allowed: 1 to 64. Raise --capacity.'
    """
    parts = [what]
    for label, value in (("Where", where), ("Got", got), ("Allowed", allowed)):
        if value is not None:
            parts.append(f"{label}: {value}.")
    if step:
        parts.append(step)
    return written_out(" ".join(parts))


UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys or cannot show: control characters but newline and tab, turns of the writing direction, halves of
surrogate pairs (a byte of a name that is not UTF-8)."""


def written_out(text: str) -> str:
    """``text`` with everything that a terminal would obey as an escape; a name out of a file may hold anything.

    Examples
    --------
    >>> print(written_out("a" + chr(27) + "[31mb"))
    a\\x1b[31mb
    """
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Sentence that suggests the closest known name, or the empty string.

    Examples
    --------
    >>> did_you_mean("lur", ["lru", "lfu"])
    "Did you mean 'lru'?"
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else ""


class SwaplessError(Exception):
    """Root of the tree: catch it to catch all that this project raises on purpose."""

    def __str__(self) -> str:  # KeyError prints the repr of its argument, which would hide a readable message
        return str(self.args[0]) if self.args else ""


class UsageError(SwaplessError, ValueError):
    """A wrong argument."""


class UnitError(UsageError):
    """A size without a unit, or a share outside (0, 1]."""


class UnknownNameError(UsageError, KeyError):
    """A name that no registry knows."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
        """Error for the unknown ``name`` of a ``kind``, with the known names and the closest one."""
        names = sorted(known)
        return cls(message(f"Unknown {kind} {name!r}.", allowed=", ".join(names), step=did_you_mean(name, names) or None))


class CapacityError(UsageError):
    """A cache capacity that the request model cannot work with."""


class OutputExistsError(UsageError, FileExistsError):
    """An output stands there already, and replacing it was not asked for."""


class CheckpointError(SwaplessError, ValueError):
    """The checkpoint on disk is not what it says."""


class CheckpointMissingError(CheckpointError, FileNotFoundError):
    """The folder, the index or a shard is not there or cannot be read."""


class CheckpointCorruptError(CheckpointError):
    """A truncated file, or a malformed header or index."""


class PackMismatchError(CheckpointError):
    """A packed store, or a part of one, that belongs to another checkpoint or was packed in another way."""


class UnsupportedCheckpointError(CheckpointError):
    """A checkpoint format that is not served."""


class UnsupportedFamilyError(SwaplessError, TypeError):
    """A model family that does not come through the experts door."""


class UnsupportedOperationError(SwaplessError, RuntimeError):
    """Something a model without its experts in memory cannot do."""


class BudgetError(SwaplessError, MemoryError):
    """The memory budget is below what the model needs at the least."""


class ContextError(SwaplessError, ValueError):
    """More tokens than the context that the budget was made for."""


class ReadError(SwaplessError, OSError):
    """A read of expert weights failed while the model was running."""


class WriteError(SwaplessError, OSError):
    """An output could not be written."""


class LockedError(SwaplessError, BlockingIOError):
    """Another process is at work on the same folder."""


class ClosedError(SwaplessError, RuntimeError):
    """The model was used after ``close()``."""


class VerifyError(SwaplessError, AssertionError):
    """Our output and the reference differ."""


class IntegrityError(SwaplessError, AssertionError):
    """Slots, cache and reads of a model do not agree with each other."""


class TraceError(SwaplessError, ValueError):
    """Something is wrong with a trace."""


class TraceMissingError(TraceError, FileNotFoundError):
    """There is no such trace."""


class TraceFormatError(TraceError):
    """Not a trace, an unknown version, a wrong column type, or no header."""


class TraceValueError(TraceError):
    """A value of a trace that cannot be."""


class TraceMismatchError(TraceError):
    """Traces that do not belong together."""


class PredictorError(SwaplessError, ValueError):
    """Something is wrong with a predictor."""


class PredictorMismatchError(PredictorError):
    """A predictor that was fitted for another model."""


class NotFittedError(PredictorError, AttributeError):
    """A predictor used before ``fit``."""


class DeviceProfileError(SwaplessError, ValueError):
    """A device profile with impossible figures."""
