"""Numbers of bytes as text, in the unit that suits them. Imports nothing of moepress."""

from __future__ import annotations

import math

UNITS = ("bytes", "kB", "MB", "GB", "TB")


def byte_unit(most: float) -> tuple[float, str]:
    """The unit in which `most` bytes is a number of 1 to 999, and its name."""
    power = min(len(UNITS) - 1, max(0, int(math.log10(max(most, 1)) // 3)))
    return 1000.0**power, UNITS[power]


def size_text(number: float) -> str:
    """Bytes as text: "15.1 GB", "340 bytes"."""
    unit, name = byte_unit(number)
    return f"{number:.0f} {name}" if unit == 1 else f"{number / unit:.1f} {name}"
