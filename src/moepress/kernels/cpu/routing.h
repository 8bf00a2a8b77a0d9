// Which tokens are multiplied with which expert's matrices, and in which portions.
//
//     pair     a token and an expert that it chose, with a routing weight
//     panel    some pairs of one expert, whose tokens are multiplied together: their activations
//              are the narrow matrix, one column per token, of one matrix product
//
// Pairs are sorted by expert, and by token within an expert; panels cut this list:
//
//     pairs    | t0 e0 | t3 e0 | t5 e0 | t0 e2 | t4 e2 | ...
//     panels   [     0         ][  1  ][      2        ]       at most 2 tokens in a panel
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace moepress {

struct Panel {
    int64_t first;  // first pair
    int count;      // pairs
    size_t expert;
};

// The panels of one expert: first .. last - 1.
struct ExpertPanels {
    size_t expert, first, last;
};

struct Routing {
    int64_t tokens;
    std::vector<int64_t> token;         // [pairs]
    std::vector<float> weight;          // [pairs]
    std::vector<Panel> panels;          // in the order of the pairs
    std::vector<ExpertPanels> experts;  // that some token chose, in order

    int64_t pairs() const { return int64_t(token.size()); }
};

// Sort the choices index, weight [tokens][k] into pairs and cut them into panels of at most
// `panel_tokens`. An index that is no expert makes no pair; nor does an expert that is not
// `present`.
Routing route(const int64_t* index, const float* weight, int64_t tokens, int64_t k,
              const std::vector<bool>& present, int panel_tokens);

// [experts]: the pairs that `route` makes of the choices, by expert.
std::vector<int64_t> tokens_of(const int64_t* index, int64_t tokens, int64_t k,
                               const std::vector<bool>& present);

// Every token once, for a single matrix, which counts as expert 0: the routing of a linear.
Routing route_all(int64_t tokens, int panel_tokens);

}  // namespace moepress
