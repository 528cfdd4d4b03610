// Copies of a tile to threadgroup memory.

#pragma once

#include "../../common/access.h"
#include "../../common/load.h"
#include "../../common/project/layout.h"
#include "dialect/copies.h"
#include "dialect/words.h"

// Copies 16 bytes, W numbers; from an address that is not known to be aligned, at once.
template <int W, typename P>
FUNCTION void copy_numbers(uint4* to, P from) {
    const auto raw = load_raw<W>(from);
    *to = make_uint4(raw.word[0], raw.word[1], raw.word[2], raw.word[3]);
}
template <int W, typename P>
FUNCTION void copy_numbers(uint4* to, AlignedAddress<P> from) {
    start_copy(to, from);
}

// Copies CHANNELS numbers of each token and stream, from `from` on; rows of a stream follow each
// other. The last of the `left` tokens stands in for those after it, whose du is zero.
template <int N, int CHANNELS, int THREADS, typename P>
FUNCTION void copy_streams(uint4* to, P from, int C, int left, int id) {
    enum { PARTS = CHANNELS / 8, ROW = PARTS + 1 };
    const uint K = N * uint(C);
    const int last = left - 1;
    UNROLL for (int k = 0; k < N * TILE_TOKENS * PARTS / THREADS; k++) {
        const int part = id % PARTS, i = id / PARTS % N;
        const int t = id / PARTS / N + k * (THREADS / PARTS / N), there = t < last ? t : last;
        copy_numbers<8>(to + i * TILE_TOKENS * ROW + t * ROW + part,
                        from + (there * K + uint(i * C + 8 * part)));
    }
}

// Copies CHANNELS numbers of each token, W in 16 bytes.
template <int W, int CHANNELS, int THREADS, typename P>
FUNCTION void copy_layers(uint4* to, P from, int C, int left, int id) {
    enum { PARTS = CHANNELS / W, ROW = PARTS + 1, ALL = TILE_TOKENS * PARTS };
    const int last = left - 1;
    UNROLL for (int k = 0; k < ALL; k += THREADS) {
        const int part = (k + id) % PARTS, t = (k + id) / PARTS, there = t < last ? t : last;
        if (k + THREADS <= ALL || k + id < ALL)
            copy_numbers<W>(to + t * ROW + part, from + (there * uint(C) + uint(W * part)));
    }
}

template <int SIZE, int THREADS, typename P>
FUNCTION void copy_record(uint4* to, P from, int id) {
    UNROLL for (int k = 0; k < SIZE; k += THREADS)
        if (k + THREADS <= SIZE || k + id < SIZE)
            copy_numbers<4>(to + k + id, from + 4 * uint(k + id));
}
