// All streams of a token at W channels.

#pragma once

#include "floats.h"
#include "load.h"
#include "raw.h"
#include "dialect/words.h"

template <int N, int W>
struct Streams {
    Floats<W> at[N];
};

// The same numbers in the format of memory.
template <int N, typename R>
struct RawStreams {
    R at[N];
};

// The streams of C channels each, at channels c, c + 1, ...; zeros if c is beyond C.
template <int N, int W, typename P>
FUNCTION auto load_raw_streams(P token, int C, int c) {
    RawStreams<N, decltype(load_raw<W>(token))> out = {};
    if (c < C) {
        UNROLL for (int i = 0; i < N; i++)
            out.at[i] = load_raw<W>(token + int64_t(i) * C + c);
    }
    return out;
}

template <int N, typename T, int W>
FUNCTION Streams<N, W> floats(RawStreams<N, Raw<T, W>> raw) {
    Streams<N, W> out;
    UNROLL for (int i = 0; i < N; i++)
        out.at[i] = floats(raw.at[i]);
    return out;
}

template <int N, int W, typename P>
FUNCTION Streams<N, W> load_streams(P token, int C, int c) {
    return floats(load_raw_streams<N, W>(token, C, c));
}
