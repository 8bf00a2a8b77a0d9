"""Where a card's memory lies in pieces, fewer matrices are rounded together: the same codes."""

from __future__ import annotations

import pytest
import torch

from moepress.format.codec import Codec
from moepress.rounding.methods import Unrounded, trellis
from tests.card.tensors import Card

pytestmark = pytest.mark.card


@pytest.mark.parametrize("most", [0, 1, 2])
def test_fewer_matrices_at_a_time(card: Card, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(64, 128, generator=generator).to("cuda") for _ in range(5)]
    given: list[Unrounded] = [Unrounded(w, Codec(2, 128, "trellis"), None) for w in weights]
    expected = trellis.quantize_together(given)
    plain, sizes = trellis._quantize, []

    def quantize(matrices: list[Unrounded]) -> list[trellis.TrellisMatrix]:
        sizes.append(len(matrices))
        if len(matrices) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(matrices)

    monkeypatch.setattr(trellis, "_quantize", quantize)
    if not most:
        with pytest.raises(torch.OutOfMemoryError):
            trellis.quantize_together(given)
        assert sizes == [5, 3, 2, 1]
        return
    found = trellis.quantize_together(given)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.branches.cpu(), other.branches.cpu())
        assert torch.equal(one.scales.cpu(), other.scales.cpu())
    assert sizes == ([5, 3, 2, 1, 1, 1, 1, 1] if most == 1 else [5, 3, 2, 2, 1])
