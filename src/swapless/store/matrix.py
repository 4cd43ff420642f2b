"""How a quantised matrix lies in memory: the order in which the kernel walks it, page after page, without a jump.

Rows of the output stand side by side in blocks of 32, one row a vector lane of four bytes, so that four input bytes serve 32
rows and nothing is ever summed across lanes. A matrix is one run of bytes of up to three planes, each at a multiple of 64::

    bits  values                                  scales                        zeros
    8     int8  [row blocks, columns / 4, 32, 4]  float32  [row blocks, 32]     -
    4     uint8 [row blocks, columns / 8, 32, 4]  bfloat16 [row blocks, G, 32]  uint8 [row blocks, G, 16]

The last axis of the values counts columns: in 4 bits, byte j holds 8c + j in its low half and 8c + 4 + j in its high half.
G counts groups of columns, and a byte of zeros holds that of row r in its low half and that of row r + 16 in its high half. A
weight is ``scale * (value - zero)``, without zero in 8 bits. Rows and columns are padded with weights of zero to whole blocks
and whole groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from swapless.errors import UsageError, message

ROW_BLOCK = 32
"""Rows that are computed side by side."""

COLUMN_BLOCK = 32
"""Columns that are summed before they are scaled; groups are a multiple of it."""

GROUPS = (32, 64, 128)
"""Columns that may share a scale in 4 bits."""

BITS = (16, 8, 4)
"""Bits a weight that a packed store may have; 16 is the checkpoint's own type."""

_PLANE_ALIGNMENT = 64


def check_precision(bits: int, group: int) -> None:
    """Refuse bits and groups that no kernel knows.

    Raises
    ------
    UsageError
        Not among :data:`BITS` and :data:`GROUPS`.
    """
    for name, value, allowed in (("bits", bits, BITS), ("group", group, GROUPS)):
        if value not in allowed:
            raise UsageError(message(f"No packed store has this {name}.", got=value, allowed=", ".join(map(str, allowed))))


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixLayout:
    """Where the planes of one quantised matrix lie: ``rows`` outputs, ``columns`` inputs, 8 or 4 ``bits``."""

    rows: int
    columns: int
    bits: int
    group: int

    @property
    def row_blocks(self) -> int:
        """Blocks of rows, the last one padded."""
        return -(-self.rows // ROW_BLOCK)

    @property
    def padded_rows(self) -> int:
        """Rows with their padding."""
        return self.row_blocks * ROW_BLOCK

    @property
    def padded_columns(self) -> int:
        """Columns with their padding: whole groups in 4 bits."""
        unit = self.group if self.bits == 4 else COLUMN_BLOCK
        return -(-self.columns // unit) * unit

    @property
    def groups(self) -> int:
        """Scales a row."""
        return self.padded_columns // self.group if self.bits == 4 else 1

    @property
    def scales_offset(self) -> int:
        """Byte at which the scales begin."""
        return _aligned(self.padded_rows * self.padded_columns * self.bits // 8)

    @property
    def zeros_offset(self) -> int:
        """Byte at which the zeros begin; the end where there are none."""
        return self.scales_offset + _aligned(self.padded_rows * self.groups * (2 if self.bits == 4 else 4))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole matrix."""
        return self.zeros_offset + (_aligned(self.padded_rows * self.groups // 2) if self.bits == 4 else 0)

    def planes(self, memory: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values, scales and zeros as views of ``memory`` (uint8, at least ``nbytes``), in the shapes of the table above.

        Scales in 4 bits come as uint16, the upper half of a float32; zeros in 8 bits as an empty array.
        """
        values = memory[: self.padded_rows * self.padded_columns * self.bits // 8]
        shape = (self.row_blocks, self.padded_columns * self.bits // 32, ROW_BLOCK, 4)
        if self.bits == 8:
            scales = memory[self.scales_offset :][: self.padded_rows * 4].view(np.float32)
            return values.view(np.int8).reshape(shape), scales.reshape(self.row_blocks, ROW_BLOCK), memory[:0]
        scales = memory[self.scales_offset :][: self.padded_rows * self.groups * 2].view(np.uint16)
        zeros = memory[self.zeros_offset :][: self.padded_rows * self.groups // 2]
        return (
            values.reshape(shape),
            scales.reshape(self.row_blocks, self.groups, ROW_BLOCK),
            zeros.reshape(self.row_blocks, self.groups, ROW_BLOCK // 2),
        )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _PLANE_ALIGNMENT) * _PLANE_ALIGNMENT
