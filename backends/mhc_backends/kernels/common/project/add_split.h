// The sum of a stream's splits.

#pragma once

#include "../floats.h"
#include "accumulate.h"
#include "sums.h"
#include "dialect/lanes.h"
#include "dialect/simd.h"
#include "dialect/words.h"

// Adds a split's sums to those of the splits before it. Its squares are whole before they are added,
// as if each split were stored by itself (store_sums.h): the first of a row's lanes has them all.
template <int COLUMN_TILES, int TOKEN_TILES>
FUNCTION Sums<COLUMN_TILES, TOKEN_TILES> add_split(Sums<COLUMN_TILES, TOKEN_TILES> total,
                                                   Sums<COLUMN_TILES, TOKEN_TILES> split,
                                                   int lane) {
    total.products = plus(total.products, split.products);
    UNROLL for (int k = 0; k < 2 * TOKEN_TILES; k++) {
        const float squares = row_sum(split.squares[k / 2].at[k % 2]);
        total.squares[k / 2].at[k % 2] += tile_pair(lane) == 0 ? squares : 0.0f;
    }
    return total;
}
