// Copies of rows, 8 numbers for each lane, to threadgroup memory. There, 16-byte fragment k of a
// lane is next to fragment k of the next lane. Where a row is two fragments per lane, its four
// lanes copy four adjacent fragments at a time, because memory transfers at least 32 bytes: so a
// lane may take fragments that another lane copied.

#pragma once

#include "../position.h"
#include "../raw.h"
#include "dialect/copies.h"
#include "dialect/lanes.h"
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
    UNROLL for (int k = 0; k < RowFragments<R>::COUNT; k++)
        to[k * SIMD + lane] = uint4();
}

template <typename T, typename S>
FUNCTION Raw<T, 8> take_row(Raw<T, 8>, S from, int lane) {
    Raw<T, 8> out;
    UNROLL for (int k = 0; k < RowFragments<Raw<T, 8>>::COUNT; k++) {
        const uint4 frag = from[k * SIMD + lane];
        out.word[4 * k] = frag.x, out.word[4 * k + 1] = frag.y;
        out.word[4 * k + 2] = frag.z, out.word[4 * k + 3] = frag.w;
    }
    return out;
}
