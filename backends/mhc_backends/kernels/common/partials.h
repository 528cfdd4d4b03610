// The last level of the sum tree (project/layout.h): adds the split-K partials.

#pragma once

#include "floats.h"
#include "position.h"
#include "dialect/words.h"

enum { PARTIALS_AT_ONCE = 8 };  // loads that a thread has in flight

// Adds the partials[T, count, NUMBERS] of TOKENS tokens from `first` on, one by one, to
// sums[k * NUMBERS + number]. All threads must come here, and a BARRIER must follow.
template <int TOKENS, int NUMBERS, typename P, typename S>
FUNCTION void sum_partials(P partials, int count, int64_t first, int64_t T, S sums, Position here) {
    const int tokens = T - first < TOKENS ? int(T - first) : TOKENS;
    for (int item = here.id; item < tokens * NUMBERS; item += here.threads) {
        const auto from = partials + (first + item / NUMBERS) * count * NUMBERS + item % NUMBERS;
        float sum = 0.0f;
        int partial = 0;
        for (; partial + PARTIALS_AT_ONCE <= count; partial += PARTIALS_AT_ONCE) {
            Floats<PARTIALS_AT_ONCE> some;
            UNROLL for (int k = 0; k < PARTIALS_AT_ONCE; k++)
                some.at[k] = from[(partial + k) * NUMBERS];
            UNROLL for (int k = 0; k < PARTIALS_AT_ONCE; k++)
                sum += some.at[k];
        }
        for (; partial < count; partial++) sum += from[partial * NUMBERS];
        sums[item] = sum;
    }
}
