// Loads of a B operand from a factor whose rows the product adds up.

#pragma once

#include "../operands.h"
#include "dialect/lanes.h"
#include "dialect/words.h"

// Loads COLUMN_TILES tiles of columns of factor[., R] from `column` on, and 32 rows, of which there
// are `rest`; then come zeros. Columns beyond R load column R - 1: their sums are not stored.
template <int COLUMN_TILES, typename P>
FUNCTION BTiles<COLUMN_TILES> load_columns(P factor, int R, int column, int rest, int lane) {
    BTiles<COLUMN_TILES> out;
    UNROLL for (int k = 0; k < 2 * COLUMN_TILES; k++) {
        const int tile = k / 2, e = k % 2;
        const int at = column + tile * TILE_COLUMNS + b_column(lane, e);
        UNROLL for (int t = 0; t < 4; t++) {
            const int row = 4 * b_row(lane, e) + t;
            out.at[tile].run[e].at[t] =
                row < rest ? float(factor[int64_t(row) * R + (at < R ? at : R - 1)]) : 0.0f;
        }
    }
    return out;
}
