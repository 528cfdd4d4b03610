// The inputs of mix.h: loads, and copies to a pipeline buffer.

#pragma once

#include "../load.h"
#include "../position.h"
#include "../streams.h"
#include "pipeline.h"
#include "raw_within.h"
#include "starts.h"
#include "dialect/copies.h"
#include "dialect/words.h"

// COUNT streams at 8 channels, of which the row has `rest`, in the format of memory.
template <int COUNT, typename P>
FUNCTION auto load_streams_within(P token, int C, int rest) {
    RawStreams<COUNT, decltype(load_raw<8>(token))> out;
    UNROLL for (int j = 0; j < COUNT; j++)
        out.at[j] = load_raw_within<8>(token + int64_t(j) * C, rest);
    return out;
}

// The inputs of a lane: COUNT streams of its two tokens, and the layer's output y of these tokens.
template <int COUNT, typename R>
struct MixInputs {
    RawStreams<COUNT, R> streams[2];
    R layer[2];
};

template <int COUNT, typename P, typename Q>
FUNCTION auto load_mix_inputs(Starts<1, P> x, Starts<1, Q> y, int C, int c, int rest) {
    MixInputs<COUNT, decltype(load_raw<8>(x.at[0][0]))> out;
    UNROLL for (int r = 0; r < 2; r++) {
        out.streams[r] = load_streams_within<COUNT>(x.at[0][r] + c, C, rest);
        out.layer[r] = load_raw_within<8>(y.at[0][r] + c, rest);
    }
    return out;
}

// Starts the copies of these inputs, with all streams, to `buffer`; take_mix_inputs reads them.
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
