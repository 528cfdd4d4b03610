// N tiles of the products whose results are streams: an N tile is 32 channels of one stream, for
// one simdgroup. Two N tiles of a stream come first, then two of the next stream, so that a
// threadgroup reads whole lines of memory and shares the inputs that all streams need.

#pragma once

#include "layout.h"
#include "dialect/words.h"

template <int N>
FUNCTION int n_tile_stream(int n_tile) {
    return n_tile / 2 % N;
}

template <int N>
FUNCTION int n_tile_channel(int n_tile) {
    return (n_tile / (2 * N) * 2 + n_tile % 2) * STEP_CHANNELS;
}

template <int N>
FUNCTION int n_tile_count(int C, int simdgroups) {
    const int n_tiles = (C + 2 * STEP_CHANNELS - 1) / (2 * STEP_CHANNELS) * 2 * N;
    return (n_tiles + simdgroups - 1) / simdgroups;
}
