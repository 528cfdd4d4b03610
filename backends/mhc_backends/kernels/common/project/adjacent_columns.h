// Loads of a B operand whose columns are spread, from rows that the product adds up.

#pragma once

#include "../operands.h"
#include "load_within.h"
#include "dialect/lanes.h"
#include "dialect/words.h"

// Loads 32 rows of factor[R, K] from row `first` on, zeros from row R on, and 8 COLUMN_TILES numbers
// of each from `at` on, of which a row has `rest`: column `column` of tile `tile` is number
// COLUMN_TILES column + tile.
template <int COLUMN_TILES, typename P>
FUNCTION BTiles<COLUMN_TILES> load_adjacent_columns(P factor, int64_t K, int R, int first,
                                                    int64_t at, int rest, int lane) {
    BTiles<COLUMN_TILES> out;
    UNROLL for (int k = 0; k < 8; k++) {
        const int e = k / 4, row = first + 4 * b_row(lane, e) + k % 4;
        const int number = COLUMN_TILES * b_column(lane, e);
        const Floats<COLUMN_TILES> v =
            load_within<COLUMN_TILES>(factor + row * K + at + number, row < R ? rest - number : 0);
        UNROLL for (int tile = 0; tile < COLUMN_TILES; tile++)
            out.at[tile].run[e].at[k % 4] = v.at[tile];
    }
    return out;
}
