// Loads of a B operand whose columns are spread, so that a lane's sums are of adjacent channels.

#pragma once

#include "../operands.h"
#include "load_within.h"
#include "dialect/lanes.h"
#include "dialect/words.h"

// Loads 32 numbers from `at` on, of which a row has `rest`, of 8 COLUMN_TILES rows of factor[C, R]
// from row `first` on: column `column` of tile `tile` is row COLUMN_TILES column + tile. Rows beyond
// C load row C - 1: their sums are not used.
template <int COLUMN_TILES, typename P>
FUNCTION BTiles<COLUMN_TILES> load_adjacent_rows(P factor, int R, int C, int first, int at,
                                                 int rest, int lane) {
    BTiles<COLUMN_TILES> out;
    UNROLL for (int k = 0; k < 2 * COLUMN_TILES; k++) {
        const int tile = k / 2, e = k % 2, number = 4 * b_row(lane, e);
        const int row = first + COLUMN_TILES * b_column(lane, e) + tile;
        out.at[tile].run[e] = load_within<4>(
            factor + int64_t(row < C ? row : C - 1) * R + at + number, rest - number);
    }
    return out;
}
