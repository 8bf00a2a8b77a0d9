// Makes the table of an instruction set (isa.h) from its types.
//
// To add an instruction set: write lanes_NAME.h, with a struct `NameLanes` that has the members of
// `PortableLanes` (lanes_portable.h); write NAME.cpp like avx2.cpp; add its flags to
// CMakeLists.txt, and its table and the test for it to dispatch.cpp. `Search` is the type with the
// steps of Viterbi's algorithm: viterbi_avx512.h, viterbi_avx2.h, viterbi_neon.h or
// viterbi_portable.h. `python -m tests.kernels.arm.run` checks those of ARM in an emulator.
//
// Everything that this file includes is compiled once for each instruction set. So all of it must
// have internal linkage (an unnamed namespace; a template over such a type has it too): of two
// functions with the same name the linker would keep one, and CPUs without its instructions would
// fail.
#pragma once

#include <cstddef>
#include <utility>

#include "activation_functions.h"
#include "add.h"
#include "attention_chunk.h"
#include "isa.h"
#include "rms_norm.h"
#include "rotary.h"
#include "route_product.h"
#include "scalar_activations.h"
#include "scalar_product.h"
#include "trellis_activations.h"
#include "trellis_product.h"
#include "viterbi.h"

namespace moepress {
namespace {

template <class Lanes, int bits, int width>
constexpr ScalarDot scalar_dot_or_null() {
    if constexpr (width <= Lanes::max_width) return scalar_dot<Lanes, bits, width>;
    return nullptr;
}

template <class Lanes, int bits, size_t... i>
constexpr void set_scalar_dots(Isa& isa, std::index_sequence<i...>) {
    ((isa.scalar_dot[bits][i] = scalar_dot_or_null<Lanes, bits, kWidths[i]>()), ...);
}

template <class Lanes, int bits>
constexpr void set_scalar(Isa& isa) {
    set_scalar_dots<Lanes, bits>(isa, std::make_index_sequence<kWidthCount>());
}

template <class Search, int... width>
constexpr void set_search(Isa& isa, std::integer_sequence<int, width...>) {
    ((isa.viterbi_step[width][0] = Search::template step<width, 0>), ...);
    ((isa.viterbi_step[width][1] = Search::template step<width, phase_of(width, 1)>), ...);
    ((isa.viterbi_best[width] = best_state<width>), ...);
    ((isa.viterbi_trace[width] = trace_back<Search, width>), ...);
}

template <class Lanes, class Search>
constexpr Isa make_isa(const char* name) {
    Isa isa{};
    isa.name = name;
    isa.glu = glu;
    isa.max_width = Lanes::max_width;
    set_scalar<Lanes, 1>(isa);
    set_scalar<Lanes, 2>(isa);
    set_scalar<Lanes, 3>(isa);
    set_scalar<Lanes, 4>(isa);
    set_scalar<Lanes, 8>(isa);
    isa.scalar_round = scalar_round;
    set_trellis_dots<Lanes>(isa, TrellisWidths());
    set_search<Search>(isa, TrellisWidths());
    isa.trellis_rotate = trellis_rotate<false>;
    isa.trellis_rotate_back = trellis_rotate<true>;
    isa.trellis_round = trellis_round<Lanes::sums_any_byte>;
    isa.subtract_least = subtract_least;
    isa.norm_rows = norm_rows;
    isa.add = add;
    isa.turn_tokens = turn_tokens;
    isa.route_product[kFloat32] = route_product<Lanes, kFloat32>;
    isa.route_product[kBfloat16] = route_product<Lanes, kBfloat16>;
    isa.route_product[kFloat16] = route_product<Lanes, kFloat16>;
    isa.attend = attend;
    isa.merge_attention = merge_attention;
    return isa;
}

}  // namespace
}  // namespace moepress
