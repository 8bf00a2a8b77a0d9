// What the driver (linear.h, experts.h) needs from a codec. ScalarCodec and TrellisCodec are two
// types with these members; the driver is a template over them. Such a type is the
// compute policy of a codec family: how its matrices are multiplied, and how activations are
// prepared for that.
//
//     Matrix                     ScalarMatrix, TrellisMatrix
//     kStripRows                 Rows of a strip, the part of a matrix that one call of `multiply`
//                                takes: 16 (a block) or 64 (a slab).
//     kMixesColumns              Whether preparing activations mixes the columns of a token. If
//                                not, a group of columns can be prepared as soon as it is computed.
//     kRunWidth, panels_per_run()      Unless kMixesColumns: bounds of an item of gate_up.h.
//     kChunkTokens               Most tokens that the driver takes at a time.
//     kProductTokens             Tokens for which `multiply` needs room in `out`.
//     panel_tokens()             Most tokens of a panel (routing.h).
//     strips(w)                  The number of strips of a matrix.
//     multiply(w, strip, activations, i, panel, out)
//                                out [panel.count][kStripRows] = strip of w times panel number i
//     linear_grain, gate_up_grain, down_grain
//                                Strips, or items of work, that a thread takes at a time.
//     glu(gate, g, up, n)        as Glu in isa.h
//     Activations                The prepared activations of all panels of a routing:
//         Activations(codec, routing, cols, group, of)     allocates
//         items(), fill(item, x)        prepare x [tokens][cols] in items() items of work
//         fill_group(i, t, j, h)        unless kMixesColumns: group j of token t of panel i
//         fill_row(pair, row)           if kMixesColumns: all columns of a pair; overwrites row
#pragma once

#include <cstdint>

namespace moepress {

// Whose activations: of tokens, the same for all experts that a token chose (the input of gate and
// up), or of pairs (the input of down).
enum class Of { kTokens, kPairs };

// How many of `tokens` the driver takes at a time: at most `most`, and equal portions, since the
// last one would be slow with few tokens.
inline int64_t portion(int64_t tokens, int64_t most) {
    const int64_t portions = (tokens - 1) / most + 1;
    return (tokens - 1) / portions + 1;
}

}  // namespace moepress
