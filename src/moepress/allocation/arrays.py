"""Types of arrays in the allocator, and the lookup of chosen options in a table."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

TOLERANCE = 1e-12  # Relative tolerance, so that floor(2.1 * 10) is 21
LEAST_PRICE = 1e-200  # so low that it only breaks ties, towards the smaller option


def at(table: npt.NDArray[Any], choice: Ints) -> npt.NDArray[Any]:
    """table[..., choice] along its last axis; [P, C] tables serve all layers and experts."""
    full = np.broadcast_to(table, (*choice.shape, table.shape[-1]))
    return np.take_along_axis(full, choice[..., None], axis=-1)[..., 0]
