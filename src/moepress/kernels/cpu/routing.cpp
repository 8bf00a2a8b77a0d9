// Sorting (token, expert) pairs by expert, and cutting them into panels.

#include "routing.h"

#include <algorithm>
#include <numeric>

namespace moepress {
namespace {

// Append the panels of one expert, whose pairs are first .. last - 1.
void cut(size_t expert, int64_t first, int64_t last, int panel_tokens, Routing& routing) {
    if (first == last) return;
    const size_t before = routing.panels.size();
    for (; first < last; first += panel_tokens)
        routing.panels.push_back(
            {first, int(std::min<int64_t>(panel_tokens, last - first)), expert});
    routing.experts.push_back({expert, before, routing.panels.size()});
}

}  // namespace

Routing route(const int64_t* index, const float* weight, int64_t tokens, int64_t k,
              const std::vector<bool>& present, int panel_tokens) {
    const auto chosen = [&](int64_t e) {
        return e >= 0 && e < int64_t(present.size()) && present[size_t(e)];
    };
    std::vector<int64_t> starts(present.size() + 1, 0);  // first pair of each expert
    for (int64_t i = 0; i < tokens * k; ++i)
        if (chosen(index[i])) ++starts[size_t(index[i]) + 1];
    for (size_t e = 0; e < present.size(); ++e) starts[e + 1] += starts[e];

    Routing routing{tokens, {}, {}, {}, {}};
    routing.token.resize(size_t(starts.back()));
    routing.weight.resize(size_t(starts.back()));
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t i = 0; i < tokens * k; ++i)
        if (chosen(index[i])) {
            const size_t pair = size_t(next[size_t(index[i])]++);
            routing.token[pair] = i / k;
            routing.weight[pair] = weight[i];
        }
    for (size_t e = 0; e < present.size(); ++e)
        cut(e, starts[e], starts[e + 1], panel_tokens, routing);
    return routing;
}

std::vector<int64_t> tokens_of(const int64_t* index, int64_t tokens, int64_t k,
                               const std::vector<bool>& present) {
    std::vector<int64_t> found(present.size(), 0);
    for (int64_t i = 0; i < tokens * k; ++i)
        if (index[i] >= 0 && index[i] < int64_t(present.size()) && present[size_t(index[i])])
            ++found[size_t(index[i])];
    return found;
}

Routing route_all(int64_t tokens, int panel_tokens) {
    Routing routing{tokens, {}, {}, {}, {}};
    routing.token.resize(size_t(tokens));
    std::iota(routing.token.begin(), routing.token.end(), 0);
    cut(0, 0, tokens, panel_tokens, routing);
    return routing;
}

}  // namespace moepress
