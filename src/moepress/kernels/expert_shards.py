"""The experts of a layer divided over devices, whose outputs add up to those of the layer.

Either each device holds some experts whole (`keep_experts`: it has 0 bits of the others), or a part
of the inner units of every expert (`cut_experts`): some rows of gate and up, and the same columns
of down. Which is better for which model: docs/vllm.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.format.codec import LEFT_OUT, ROWS_PER_BLOCK, ROWS_PER_SLAB, Codec, PackedSpec
from moepress.kernels.modules import PackedExperts
from moepress.kernels.reference import gated
from moepress.kernels.shards import blocks_of, columns_part, from_blocks
from moepress.kernels.trellis import TILE_COLUMNS, run_length, split
from moepress.kernels.uncommon import UncommonExperts

# A part may be this many times an equal share of the inner units. Else whole experts are better.
LARGEST_PART = 1.5


def expert_bytes(module: PackedExperts) -> list[int]:
    """Bytes of each expert's two matrices, [E]."""
    offsets = (spec.offsets(*shape) for spec, shape in _specs(module))
    firsts, downs = ([stop - start for start, stop in pairwise(one)] for one in offsets)
    return [a + b for a, b in zip(firsts, downs, strict=True)]


def keep_experts(module: PackedExperts, kept: Collection[int]) -> None:
    """Leave out all experts but `kept`, and their bytes. The numbers of experts stay."""
    tensors = {}
    for (spec, shape), name in zip(_specs(module), _names(module), strict=True):
        matrices = _matrices(module.get_parameter(name), spec, shape)
        some = [matrix for expert, matrix in matrices if expert in kept]
        tensors[name] = torch.cat(some) if some else module.get_parameter(name)[:0].clone()
    module.become(module.intermediate_size, *kept_specs(module, kept), tensors)


def kept_specs(module: PackedExperts, kept: Collection[int]) -> tuple[PackedSpec, PackedSpec]:
    """How the two parameters are stored when all experts but `kept` are left out."""
    first, down = (
        replace(spec, bits=tuple(b if e in kept else LEFT_OUT for e, b in enumerate(spec.bits)))
        for spec in (module.gate_up, module.down)
    )
    return first, down


def cut_experts(module: PackedExperts, rank: int, ranks: int) -> bool:
    """Keep part `rank` of `ranks` of every expert.

    Returns:
        False if experts cannot be cut into parts that are much smaller; nothing is done then. Their
        inner size has too few units of the format, or a function of the model's own, or one that
        does not map 0 to 0, lies between their products.
    """
    parts = _parts(module, ranks)
    if parts is None:
        return False
    part, extra = parts[rank], _extra(module)
    inner = module.intermediate_size
    ranges = [
        range(k * inner + part.start, k * inner + part.stop) for k in range(module.gate.parts)
    ]
    (first, first_shape), (down, down_shape) = _specs(module)
    first_name, down_name = _names(module)
    firsts = [
        _rows(matrix, first_shape, first.codec(expert), ranges, extra)
        for expert, matrix in _matrices(module.get_parameter(first_name), first, first_shape)
    ]
    downs = [
        _columns(matrix, down_shape, down.codec(expert), part, extra)
        for expert, matrix in _matrices(module.get_parameter(down_name), down, down_shape)
    ]
    tensors = {first_name: torch.cat(firsts), down_name: torch.cat(downs)} if firsts else {}
    module.become(len(part) + extra, first, down, tensors | _biases(module, ranges, extra, rank))
    return True


def _parts(module: PackedExperts, ranks: int) -> list[range] | None:
    """The inner units of each of `ranks` parts; None: they cannot be cut, or it saves too little.

    Parts consist of whole units of the format, and a part of trellis codes is rotated like the
    matrix.
    """
    if isinstance(module, UncommonExperts) and module.own is not None:
        return None
    inner, trellis = module.intermediate_size, module.gate_up.family == "trellis"
    unit, extra = _unit(module), _extra(module)
    if inner % unit:
        return None
    edges = [unit * (inner // unit * i // ranks) for i in range(ranks + 1)]
    parts = [range(start, stop) for start, stop in pairwise(edges)]
    sizes = {len(part) for part in parts}
    if 0 in sizes or max(sizes) + extra > LARGEST_PART * inner / ranks:
        return None
    run = run_length(inner)
    if trellis and any({run_length(n), run_length(n + extra)} != {run} for n in sizes):
        return None
    nothing = gated(module.gate, torch.zeros(1, module.gate.parts))
    return None if extra and bool(nothing.any()) else parts


def _unit(module: PackedExperts) -> int:
    """Inner units that cannot be divided: rows of gate and up, and columns of down."""
    group = module.down.group_size
    if module.gate_up.family == "int":
        return max(group, ROWS_PER_BLOCK)
    return max(group, ROWS_PER_SLAB, run_length(module.intermediate_size))


def _extra(module: PackedExperts) -> int:
    """Inner units of zeros that a part of trellis codes has at its end, see `_slabs`."""
    return _unit(module) if module.gate_up.family == "trellis" else 0


def _rows(
    matrix: Tensor, shape: tuple[int, int], codec: Codec, ranges: Sequence[range], extra: int
) -> Tensor:
    """Some ranges of rows, each followed by `extra` rows of zeros, as one packed matrix."""
    if codec.family == "trellis":
        return _slabs(matrix, shape, codec, ranges, extra)
    blocks = blocks_of(matrix, *shape, codec)
    kept = [blocks[r.start // ROWS_PER_BLOCK : r.stop // ROWS_PER_BLOCK] for r in ranges]
    return from_blocks(torch.cat(kept))


def _slabs(
    matrix: Tensor, shape: tuple[int, int], codec: Codec, ranges: Sequence[range], extra: int
) -> Tensor:
    """`_rows` of trellis codes.

    A path comes to a slab from the slab above it, to the first slab from the last one. So the last
    of the slabs that follow a range is the one that was above the next range; scales of 0 make
    zeros of it.
    """
    codes, scales = split(matrix, *shape, codec)
    above = [codes[r.start // ROWS_PER_SLAB - 1, None] for r in ranges]
    empty = codes.new_zeros(extra // ROWS_PER_SLAB - 1, codes.shape[1])
    slabs, lengths = [], []
    for number, r in enumerate(ranges):
        kept = codes[r.start // ROWS_PER_SLAB : r.stop // ROWS_PER_SLAB]
        slabs += [kept, empty, above[(number + 1) % len(ranges)]]
        lengths.append(F.pad(scales[r.start : r.stop], (0, extra)))
    return torch.cat([torch.cat(slabs).flatten(), torch.cat(lengths).view(torch.uint8)])


def _columns(
    matrix: Tensor, shape: tuple[int, int], codec: Codec, part: range, extra: int
) -> Tensor:
    """Some columns, followed by `extra` columns whose inputs are zeros."""
    rows, cols = shape
    packed = columns_part(matrix, rows, cols, codec, part.start, part.stop)
    if not extra:
        return packed
    codes, scales = split(packed, rows, len(part), codec)
    tiles = codes.view(len(codes), len(part) // TILE_COLUMNS, -1)
    wider = F.pad(tiles, (0, 0, 0, extra // TILE_COLUMNS))
    return torch.cat([wider.flatten(), scales.view(torch.uint8)])


def _biases(
    module: PackedExperts, ranges: Sequence[range], extra: int, rank: int
) -> dict[str, Tensor]:
    """Biases of a part. Those of down are in the first part only: the sum has them once."""
    first, down = (f"{name}_bias" for name in _names(module))
    found = {}
    before = module._parameters[first]
    if before is not None:
        cut = [F.pad(before[:, r.start : r.stop], (0, extra)) for r in ranges]
        found[first] = torch.cat(cut, dim=1)
    after = module._parameters[down]
    if after is not None and rank > 0:
        found[down] = torch.zeros_like(after)
    return found


def _names(module: PackedExperts) -> tuple[str, str]:
    return module.first_name, "down_proj"


def _specs(module: PackedExperts) -> list[tuple[PackedSpec, tuple[int, int]]]:
    """How each of the two parameters is stored, and the shape of its matrices."""
    return list(zip((module.gate_up, module.down), module.shapes, strict=True))


def _matrices(
    packed: Tensor, spec: PackedSpec, shape: tuple[int, int]
) -> Iterator[tuple[int, Tensor]]:
    """(expert, packed matrix) of all experts that are not left out."""
    for expert, (start, stop) in enumerate(pairwise(spec.offsets(*shape))):
        if spec.bits[expert] != LEFT_OUT:
            yield expert, packed[start:stop]
