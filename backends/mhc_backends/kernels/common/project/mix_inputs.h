// Copies of the inputs of mix.h to a pipeline buffer.

#pragma once

#include "../position.h"
#include "../streams.h"
#include "mix_loads.h"
#include "pipeline.h"
#include "starts.h"
#include "dialect/copies.h"
#include "dialect/words.h"

// Starts the copies of MixInputs, with all streams, to `buffer`; take_mix_inputs reads them.
template <int COUNT, typename R, typename S, typename P, typename Q>
FUNCTION void start_mix_inputs(R like, S buffer, Starts<1, P> x, Starts<1, Q> y, int C, int c,
                               int lane) {
    enum { STEP = RowFragments<R>::COUNT * SIMD };
    UNROLL for (int k = 0; k < 2 * COUNT + 2; k++) {
        const int r = k % 2, j = k / 2;
        if (j < COUNT)
            start_row(like, buffer + k * STEP, x.at[0][r] + int64_t(j) * C + c, lane);
        else
            start_row(like, buffer + k * STEP, y.at[0][r] + c, lane);
    }
    mark_copies();
}

template <int COUNT, typename R, typename S>
FUNCTION MixInputs<COUNT, R> take_mix_inputs(R like, S buffer, int lane) {
    enum { STEP = RowFragments<R>::COUNT * SIMD };
    MixInputs<COUNT, R> out;
    UNROLL for (int k = 0; k < 2 * COUNT + 2; k++) {
        const R row = take_row(like, buffer + k * STEP, lane);
        if (k / 2 < COUNT)
            out.streams[k % 2].at[k / 2 % COUNT] = row;
        else
            out.layer[k % 2] = row;
    }
    return out;
}
