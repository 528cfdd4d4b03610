// Loads of the inputs of mix.h.

#pragma once

#include "../load.h"
#include "../streams.h"
#include "raw_within.h"
#include "starts.h"
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
