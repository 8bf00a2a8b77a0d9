"""The operations on CPUs: C++ in this folder, compiled when moepress is installed.

Activations are rounded to integer codes, one scale for each group of columns, and multiplied with
the packed codes as they are: integer dot products, exact in 32 bits. The codes have 8 bits or 15.
For scalar matrices those of 15 bits are split into two of 8; for trellis matrices activations are
rotated first. The oracle of this arithmetic is `reference.linear(..., rounded=True)`. A token's
result depends neither on the other tokens of the call nor on the number of threads, with one
exception: the last bits of trellis weights, where activations have 8 bits. Up to 7 tokens in a
matrix take them from averages (trellis_product.h). From 8 tokens on CPUs that multiply bytes, as
all but avx2 and portable do, take them as one byte each (trellis_bytes.h); the others take them as
they are. In the oracle these are `values`. Up to 256 tokens of a call are taken at a time, with
scalar codes up to 4096.

From the C interface (moepress.h) down:

    scalar.cpp, trellis.cpp   the C functions; checks.h: what they check
    linear.h, experts.h       the driver: threads, items of work, weighting; gate_up.h: the first
                              half of the experts; biases.h; strip.h: a product of few rows
    routing.h                 (token, expert) pairs sorted by expert and cut into panels of tokens
    codec.h                   what the driver needs from a codec: *_codec.h
    *_matrix.h                where a packed matrix keeps what (docs/format.md); scalar_format.h and
                              trellis_code.h: sizes and constants; scalar_matrix.cpp: sizes, and
                              single rows for embeddings
    isa.h                     the functions that an instruction set provides:
      scalar_product.h        16 rows of a scalar matrix times a panel; `codes_of` decodes them
      trellis_product.h       64 rows of a trellis matrix times a panel; trellis_many.h: with many
                              tokens; trellis_many_neon.h: the same on ARM
      trellis_amx.h           the same with the tiles of AMX
      trellis_tile.h          what all of them decode: `state_at`; trellis_bytes.h: weights as one
                              byte, for many tokens
      *_activations.h         rounding and rotating activations; rounding.h: what they share
      activation_functions.h  gelu, silu and others; limits and softcaps of gates
      viterbi*.h              one step of the search for trellis codes (viterbi.cpp)
      floats.h                vectors of floats
    lanes_*.h                 registers of 16 rows: AVX-512 with VNNI, with or without VBMI2; AVX2,
                              with or without VNNI; NEON with dot products, with or without i8mm;
                              portable vectors
    avx512.cpp, ...           one table of those functions for each instruction set (make_isa.h)
    dispatch.cpp              which instruction set runs on this CPU; arm_features.h: what ARM CPUs
                              have
    attention.cpp             attention of few queries: chunks of positions, threads (attention.py
                              calls it)
      attention_mask.h        which positions a mask shows
      attention_chunk.h       some queries over a chunk, and chunks together (attention.h)
      vectors*.h              registers of floats, for attention
    expert_tables.h           which experts there are, found through their tables
    drop.cpp                  online pruning: which choices of a token are dropped
    small.cpp                 small operations of decoding (small.h), called by small.py; their
                              kernels: rms_norm.h, add.h, rotary.h
    route.cpp                 routers (route.py): logits, by route_product.h of an instruction set,
                              and the choice of experts, route_choice.h; route_numbers.h
    number_kinds.h            float32, bfloat16 and float16; numbers.h: inputs in bfloat16
    threads.h                 torch's OpenMP team, or a pool of our own
    store.h                   experts on disk: which are in memory, which are read (store_state.h);
                              store_interface.cpp: its C functions, called by expert_store.py;
                              store_missing.cpp: systems without mmap
    trellis_fit.cpp           for compression: sums for the best scales; trellis_pack.cpp: branches
                              as stored bytes; trellis_values.cpp: the values of paths;
                              trellis_rows.cpp: rows with drawn errors

interface.py loads and calls the library. One build serves every Python and every torch, since it is
called through C. ctypes releases the interpreter lock while it runs.
"""

from __future__ import annotations

from ctypes import Structure, byref, c_float, c_int32, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from moepress.errors import InputError, MoepressError
from moepress.format.codec import Codec, width_number
from moepress.kernels import reference
from moepress.kernels.cpu import interface
from moepress.kernels.cpu.attention import attention as attention
from moepress.kernels.cpu.small import add_into as add_into
from moepress.kernels.cpu.small import cache_write as cache_write
from moepress.kernels.cpu.small import rms_norm as rms_norm
from moepress.kernels.cpu.small import rotary as rotary
from moepress.kernels.experts_call import ExpertsCall
from moepress.kernels.gate import Gate
from moepress.kernels.stores import OPEN

ACTIVATIONS = (  # in the order of isa.h
    "gelu", "gelu_pytorch_tanh", "hardswish", "mish", "quick_gelu", "relu", "relu2", "sigmoid",
    "silu", "tanh",
)  # fmt: skip


class _Gate(Structure):
    """MoepressGate of moepress.h."""

    _fields_ = (
        ("activation", c_int32),
        ("gated", c_int32),
        ("limits_output", c_int32),
        ("limit", c_float),
        ("alpha", c_float),
        ("up_offset", c_float),
        ("gate_softcap", c_float),
        ("up_softcap", c_float),
    )


class _Biases(Structure):
    """MoepressBiases of moepress.h."""

    _fields_ = (("gate_up", c_void_p), ("down", c_void_p), ("bfloat16", c_int32))


_NO_BIASES = _Biases()


def missing() -> str | None:
    """The reason why the library cannot run, or None if it can."""
    try:
        interface.library()
    except MoepressError as error:
        return str(error)
    return None


def instruction_sets() -> tuple[str, ...]:
    """Instruction sets that were compiled and that this CPU has, best first. The first one runs.

    Raises:
        MoepressError: the library cannot run.
    """
    names: bytes = interface.library().moepress_instruction_sets()
    return tuple(names.decode().split())


def uses_openmp() -> bool:
    """Whether threads come from torch's OpenMP runtime, instead of the library's own pool."""
    return interface.openmp_team() is not None


def use(instruction_set: str) -> None:
    """Run on another instruction set from now on: for tests and comparisons.

    Raises:
        InputError: `instruction_set` is not one of `instruction_sets()`.
    """
    if not interface.library().moepress_use(instruction_set.encode()):
        raise InputError(
            f"Instruction set '{instruction_set}' is not here. Expected one of "
            f"{list(instruction_sets())}."
        )


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    codec: Codec,
    activation_bits: int,
) -> Tensor:
    """The op `moepress::linear`. Sums are in float32; float64 inputs go to the reference."""
    if x.dtype == torch.float64:
        return reference.linear(x, packed, bias, out_features, codec)
    cols = x.shape[-1]
    given = _given(x)
    bias = None if bias is None else bias.float().contiguous()
    out = given.new_empty((*x.shape[:-1], out_features))
    interface.call(
        "moepress_trellis_linear" if codec.family == "trellis" else "moepress_scalar_linear",
        given.data_ptr(),
        given.numel() // cols,
        cols,
        packed.data_ptr(),
        packed.numel(),
        out_features,
        codec.number,
        codec.group_size,
        None if bias is None else bias.data_ptr(),
        activation_bits,
        torch.get_num_threads(),
        given.dtype == torch.bfloat16,
        out.data_ptr(),
    )
    return out if out.dtype == x.dtype else out.to(x.dtype)


def _given(x: Tensor) -> Tensor:
    """Inputs as the library takes them: bfloat16 or floats, one after another."""
    return (x if x.dtype == torch.bfloat16 else x.float()).contiguous()


def experts(call: ExpertsCall) -> Tensor:
    """The op `moepress::experts`. Sums are in float32; float64 inputs go to the reference."""
    hidden, gate_up_table, down_table = call.hidden, call.gate_up_table, call.down_table
    if hidden.dtype == torch.float64:
        return reference.experts(call)
    reference.activation_function(call.activation)  # refuses unknown names
    if len(gate_up_table) != len(down_table):
        raise InputError(
            f"gate_up_table has {len(gate_up_table)} experts, down_table {len(down_table)}."
        )
    x = _given(hidden)
    index, weights = call.top_k_index.long().contiguous(), call.top_k_weights.float().contiguous()
    tables = gate_up_table.contiguous(), down_table.contiguous()
    gate = _gate(call.gate)
    biases, _kept = _biases(call.gate_up_bias, call.down_bias)
    out = torch.empty_like(x)
    store = OPEN[call.store] if call.store else None
    interface.call(
        "moepress_trellis_experts" if call.family == "trellis" else "moepress_scalar_experts",
        x.data_ptr(),
        *x.shape,
        index.data_ptr(),
        weights.data_ptr(),
        index.shape[1],
        call.gate_up.data_ptr(),
        call.gate_up.numel(),
        tables[0].data_ptr(),
        call.gate_up_group,
        call.down.data_ptr(),
        call.down.numel(),
        tables[1].data_ptr(),
        call.down_group,
        len(gate_up_table),
        call.intermediate_size,
        byref(gate),
        byref(biases),
        call.store or None,
        call.store_layer,
        call.activation_bits,
        torch.get_num_threads(),
        x.dtype == torch.bfloat16,
        out.data_ptr(),
        failures={} if store is None else {interface.READ_FAILED: store.failure},
    )
    return out if out.dtype == hidden.dtype else out.to(hidden.dtype)


@lru_cache(maxsize=64)
def _gate(gate: Gate) -> _Gate:
    """The gate as the library takes it."""
    return _Gate(
        ACTIVATIONS.index(gate.activation),
        gate.gated,
        gate.limits_output,
        gate.limit,
        gate.alpha,
        gate.up_offset,
        gate.gate_softcap,
        gate.up_softcap,
    )


def _biases(gate_up: Tensor | None, down: Tensor | None) -> tuple[_Biases, tuple[Tensor, ...]]:
    """Biases as the library takes them, and the tensors that must outlive the call.

    bfloat16 is read as it is: a conversion would read the biases of all experts.
    """
    given = [b for b in (gate_up, down) if b is not None]
    if not given:
        return _NO_BIASES, ()
    half = all(b.dtype == torch.bfloat16 for b in given)
    kept = tuple(b.contiguous() if half else b.float().contiguous() for b in given)
    first = None if gate_up is None else kept[0].data_ptr()
    second = None if down is None else kept[-1].data_ptr()
    return _Biases(first, second, half), kept


def embedding(
    ids: Tensor, packed: Tensor, rows: int, cols: int, codec: Codec, dtype: torch.dtype
) -> Tensor:
    """The op `moepress::embedding`."""
    wanted = ids.long().contiguous()
    out = wanted.new_empty((*ids.shape, cols), dtype=torch.float32)
    interface.call(
        "moepress_scalar_embedding",
        wanted.data_ptr(),
        wanted.numel(),
        packed.data_ptr(),
        packed.numel(),
        rows,
        cols,
        codec.number,
        codec.group_size,
        out.data_ptr(),
    )
    return out.to(dtype)


def drop(
    index: Tensor,
    weights: Tensor,
    thresholds: Tensor,
    renormalise: bool,
    keep: Tensor | None,
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `moepress::drop`. Weights are compared and scaled in float32."""
    chosen, given = index.long().contiguous(), weights.float().contiguous()
    thresholds, keep = thresholds.contiguous(), None if keep is None else keep.contiguous()
    ranked, kept = torch.empty_like(chosen), torch.empty_like(given)
    dropped = torch.empty_like(chosen, dtype=torch.bool)
    interface.call(
        "moepress_drop",
        chosen.data_ptr(),
        given.data_ptr(),
        *chosen.shape,
        num_experts,
        thresholds.data_ptr(),
        renormalise,
        None if keep is None else keep.data_ptr(),
        ranked.data_ptr(),
        kept.data_ptr(),
        dropped.data_ptr(),
    )
    return ranked, kept.to(weights.dtype), dropped


def trellis_search(target: Tensor, bits: float) -> Tensor:
    """The search of `rounding.methods.viterbi.search`, for a target on the CPU."""
    columns = target.float().contiguous()
    branches = torch.empty_like(columns, dtype=torch.uint8)
    _search(columns, None, bits, branches)
    return branches


def trellis_round(target: Tensor, feedback: Tensor, branches: Tensor, bits: float) -> None:
    """Round eight columns of one matrix as `rounding.methods.viterbi.round_together`, in place.

    Args:
        target, feedback: [8, 64 S] float32, contiguous.
        branches: [8, 64 S] uint8, contiguous.
    """
    _search(target, feedback, bits, branches)


def _search(target: Tensor, feedback: Tensor | None, bits: float, branches: Tensor) -> None:
    interface.call(
        "moepress_trellis_search",
        target.data_ptr(),
        None if feedback is None else feedback.data_ptr(),
        target.shape[1],
        width_number(bits),
        torch.get_num_threads(),
        branches.data_ptr(),
    )


def trellis_values(branches: Tensor, bits: float) -> Tensor:
    """The values that branches [64 S, K] choose, `trellis.code_matrix`: [64 S, K] float32."""
    given = branches.contiguous()
    values = torch.empty_like(given, dtype=torch.float32)
    threads = torch.get_num_threads()
    interface.call(
        "moepress_trellis_values",
        given.data_ptr(),
        *given.shape,
        width_number(bits),
        threads,
        values.data_ptr(),
    )
    return values


def trellis_pack(branches: Tensor, bits: float) -> Tensor:
    """The stored bytes of branches [64 S, K], `trellis.pack_codes`: [rows * K * bits / 8] uint8."""
    given = branches.contiguous()
    codes = given.new_empty(int(given.numel() * bits) // 8)
    threads = torch.get_num_threads()
    interface.call(
        "moepress_trellis_pack",
        given.data_ptr(),
        *given.shape,
        width_number(bits),
        threads,
        codes.data_ptr(),
    )
    return codes


def trellis_fit(
    weighted: Tensor,
    per_scale: Tensor | None,
    residual: Tensor,
    blocks: Tensor,
    curvature: Tensor,
    sums: Tensor,
) -> None:
    """Add what some columns give to `rounding.fit.plain_sums`; the oracle is `add_in_order` there.

    Args:
        weighted: [k, N] float32 or bfloat16, R^T w.
        per_scale: [N] float32, factors of w; None: 1.
        residual: [k, N] float32, contiguous.
        blocks: [k / 8, 8, 8] float32, on the diagonal of R.
        curvature: [k] float32.
        sums: [2, N] float32, contiguous: <w, c>_H and <c, c>_H; changed.
    """
    weighted, residual, blocks = weighted.contiguous(), residual.contiguous(), blocks.contiguous()
    curvature = curvature.contiguous()
    per_scale = None if per_scale is None else per_scale.contiguous()
    interface.call(
        "moepress_trellis_fit",
        weighted.data_ptr(),
        int(weighted.dtype == torch.bfloat16),
        None if per_scale is None else per_scale.data_ptr(),
        residual.data_ptr(),
        blocks.data_ptr(),
        curvature.data_ptr(),
        *weighted.shape,
        torch.get_num_threads(),
        sums[0].data_ptr(),
        sums[1].data_ptr(),
    )


def trellis_rows(target: Tensor, drawn: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`rounding.noise.plain_rows`, [N, K] with the same numbers.

    Args:
        target, drawn: [K, N] float32, contiguous; K a multiple of 32.
        scale: [N] float32.
        dtype: float32 or bfloat16.
    """
    target, drawn, scale = target.contiguous(), drawn.contiguous(), scale.contiguous()
    rows = target.new_empty(target.shape[::-1], dtype=dtype)
    interface.call(
        "moepress_trellis_rows",
        target.data_ptr(),
        drawn.data_ptr(),
        scale.data_ptr(),
        *target.shape,
        int(dtype == torch.bfloat16),
        torch.get_num_threads(),
        rows.data_ptr(),
    )
    return rows


def trellis_rotate(x: Tensor, back: bool) -> None:
    """`trellis.rotate`, or with `back` `trellis.rotate_back`, in place and with the same floats.

    Args:
        x: [N, K] float32, contiguous; K a multiple of 32.
    """
    threads = torch.get_num_threads()
    interface.call("moepress_trellis_rotate", x.data_ptr(), *x.shape, int(back), threads)
