// Accumulators: sums of products in registers.

#pragma once

#include "../floats.h"
#include "../operands.h"
#include "dialect/words.h"

template <int COLUMN_TILES, int TOKEN_TILES>
FUNCTION Accumulators<COLUMN_TILES, TOKEN_TILES> zero_accumulators() {
    Accumulators<COLUMN_TILES, TOKEN_TILES> out;
    UNROLL for (int k = 0; k < 2 * COLUMN_TILES * TOKEN_TILES; k++)
        out.at[k / 2 / COLUMN_TILES].tile[k / 2 % COLUMN_TILES].in_half[k % 2] = zeros<2>();
    return out;
}

template <int COLUMN_TILES, int TOKEN_TILES>
FUNCTION Accumulators<COLUMN_TILES, TOKEN_TILES> plus(Accumulators<COLUMN_TILES, TOKEN_TILES> a,
                                                      Accumulators<COLUMN_TILES, TOKEN_TILES> b) {
    Accumulators<COLUMN_TILES, TOKEN_TILES> out;
    UNROLL for (int k = 0; k < 2 * COLUMN_TILES * TOKEN_TILES; k++) {
        const int at = k / 2 / COLUMN_TILES, tile = k / 2 % COLUMN_TILES;
        out.at[at].tile[tile].in_half[k % 2] =
            plus(a.at[at].tile[tile].in_half[k % 2], b.at[at].tile[tile].in_half[k % 2]);
    }
    return out;
}
