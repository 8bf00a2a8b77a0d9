"""The layout of a part says where every number of an expert's matrix lies."""

from __future__ import annotations

import pytest
import torch

from moepress.blocks.layout import Part, padded_bias, padded_matrix, widened

E, INNER, H = 3, 4, 6
GATE, UP = torch.randn(E, INNER, H), torch.randn(E, INNER, H)
WANTED = torch.cat([GATE, UP], dim=1)  # [E, 2I, H], gate rows first
IN_TURNS = torch.stack([GATE, UP], dim=2).flatten(1, 2)  # gate 0, up 0, gate 1, ...
LAYOUTS = {
    "as packed": (Part(("a",)), {"a": WANTED}),
    "transposed": (Part(("a",), transposed=True), {"a": WANTED.mT}),
    "interleaved": (Part(("a",), interleaved=True), {"a": IN_TURNS}),
    "both": (Part(("a",), transposed=True, interleaved=True), {"a": IN_TURNS.mT}),
    "two flat parameters": (
        Part(("a", "b"), flat=INNER),
        {"a": GATE.flatten(0, 1), "b": UP.flatten(0, 1)},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_matrix_comes_out_in_order_and_goes_back(name: str) -> None:
    part, stored = LAYOUTS[name]
    for expert in range(E):
        rows = slice(expert * part.rows, (expert + 1) * part.rows)
        assert torch.equal(part.matrix([stored[n][rows] for n in part.names]), WANTED[expert])
    again = part.parameters(WANTED)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[n], stored[n]) for n in stored)


def test_biases_follow_the_rows() -> None:
    part = Part(("a",), "a_bias", interleaved=True)
    gate, up = torch.randn(E, INNER), torch.randn(E, INNER)
    stored = torch.stack([gate, up], dim=2).flatten(1, 2)
    assert torch.equal(part.in_order(stored, 1), torch.cat([gate, up], dim=1))
    assert torch.equal(part.biases(part.in_order(stored, 1)), stored)
    assert part.stored == ("a", "a_bias")


def test_padding_adds_zeros_to_each_part() -> None:
    padded = padded_matrix(WANTED[0], 2, 5, 8)
    assert padded.shape == (10, 8)
    assert torch.equal(padded[:4, :6], GATE[0]) and torch.equal(padded[5:9, :6], UP[0])
    assert not padded[[4, 9]].any() and not padded[:, 6:].any()
    bias = padded_bias(torch.arange(1.0, 9.0), 2, 5)
    assert bias.tolist() == [1, 2, 3, 4, 0, 5, 6, 7, 8, 0]
    whole = WANTED[0]
    assert padded_matrix(whole, 2, 4, 6) is whole
    x = torch.ones(2, 6)
    assert widened(x, 6) is x and widened(x, 8).sum() == 12
