// pipeline

#pragma once

#include "../raw.h"
#include "dialect/copies.h"
#include "dialect/lanes.h"
#include "dialect/operands.h"
#include "dialect/words.h"

template <typename R>
struct RowFragments;

template <typename T>
struct RowFragments<Raw<T, 8>> {
    enum { COUNT = Raw<T, 8>::WORDS / 4 };
};

template <typename R, typename S, typename P>
FUNCTION void start_row(R, S to, P from, int lane) {
    enum { COUNT = RowFragments<R>::COUNT, NUMBERS = 8 / COUNT };
    const int own = tile_pair(lane) / 2;
    UNROLL for (int k = 0; k < COUNT; k++) {
        const int frag = 4 * k + own, owner = row_lane(lane, frag / COUNT);
        start_copy(to + frag % COUNT * SIMD + owner, from + (frag - COUNT * own) * NUMBERS);
    }
}

template <typename R, typename S>
FUNCTION void put_nothing(R, S to, int lane) {
    UNROLL for (int k = 0; k < RowFragments<R>::COUNT; k++) to[k * SIMD + lane] = uint4();
}

template <typename T, typename S>
FUNCTION Raw<T, 8> take_row(Raw<T, 8>, S from, int lane) {
    uint4 frags[RowFragments<Raw<T, 8>>::COUNT];
    UNROLL for (int k = 0; k < RowFragments<Raw<T, 8>>::COUNT; k++) frags[k] = from[k * SIMD + lane];
    return raw_of(frags, T(0.0f));
}
