// The last level of the sum tree (project/layout.h): adds the split-K partials.

#pragma once

#include "floats.h"
#include "position.h"
#include "dialect/words.h"

enum { PARTIALS_AT_ONCE = 8 };  // loads that a thread has in flight

// The sum of `count` numbers, `stride` apart, added one by one; AT_ONCE loads are in flight.
template <int AT_ONCE, typename P>
FUNCTION float sum_one_by_one(P from, int count, int stride) {
    float sum = 0.0f;
    int k = 0;
    for (; k + AT_ONCE <= count; k += AT_ONCE) {
        Floats<AT_ONCE> some;
        UNROLL for (int e = 0; e < AT_ONCE; e++)
            some.at[e] = from[(k + e) * stride];
        UNROLL for (int e = 0; e < AT_ONCE; e++)
            sum += some.at[e];
    }
    for (; k < count; k++) sum += from[k * stride];
    return sum;
}

// Adds the partials[T, count, NUMBERS] of TOKENS tokens from `first` on, one by one, to
// sums[k * NUMBERS + number]. All threads must come here, and a BARRIER must follow.
template <int TOKENS, int NUMBERS, typename P, typename S>
FUNCTION void sum_partials(P partials, int count, int64_t first, int64_t T, S sums, Position here) {
    const int tokens = T - first < TOKENS ? int(T - first) : TOKENS;
    for (int item = here.id; item < tokens * NUMBERS; item += here.threads) {
        const auto from = partials + (first + item / NUMBERS) * count * NUMBERS + item % NUMBERS;
        sums[item] = sum_one_by_one<PARTIALS_AT_ONCE>(from, count, NUMBERS);
    }
}
