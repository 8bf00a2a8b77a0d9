"""Which experts of a model go into the fastest memory: those that are chosen most often."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moepress.store.uses import Floats

Chosen = list[npt.NDArray[np.bool_]]  # [L] [E]


def hottest(frequency: Sequence[Floats], sizes: Sequence[Floats], budget: int) -> Chosen:
    """The most frequent experts of all layers that fit in a budget together, [L] [E].

    One that does not fit is passed over, and smaller ones after it may. Of equally frequent ones
    those of the first layers are taken, so that other layers need one memory only.

    Args:
        frequency: [L] [E] share of the calibration tokens that chose each expert.
        sizes: [L] [E] bytes. One of 0 bytes is always taken.
        budget: bytes.
    """
    often, nbytes = np.concatenate(frequency), np.concatenate(sizes)
    taken, left = np.zeros(len(often), dtype=np.bool_), budget
    for expert in np.argsort(-often, kind="stable"):
        if nbytes[expert] <= left:
            taken[expert] = True
            left -= int(nbytes[expert])
    return np.split(taken, np.cumsum([len(row) for row in sizes])[:-1])


def share_of(frequency: Sequence[Floats], chosen: Chosen) -> float:
    """Share of the calibration's choices that fell on the chosen experts.

    Without counts all experts are taken to be equally frequent.
    """
    often, taken = np.concatenate(frequency), np.concatenate(chosen)
    if not often.any():
        return float(taken.mean())
    return float(often[taken].sum() / often.sum())
