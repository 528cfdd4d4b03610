// Stores the products of a split as split-K partials.

#pragma once

#include "../operands.h"
#include "dialect/lanes.h"
#include "dialect/words.h"

// Stores the products of the tokens from `first` on with COLUMN_TILES tiles of columns from
// `column` on, of which there are M, in partials[T, count, width].
template <int COLUMN_TILES, int TOKEN_TILES, typename P>
FUNCTION void store_products(P partials, int64_t first, int64_t T, int count, int split,
                             Accumulators<COLUMN_TILES, TOKEN_TILES> products, int column, int M,
                             int width, int lane) {
    UNROLL for (int k = 0; k < 4 * TOKEN_TILES; k++) {
        const int h = k / 2, j = k % 2;
        const int64_t token = first + 8 * h + sum_row(lane, j);
        UNROLL for (int tile = 0; tile < COLUMN_TILES; tile++) {
            const int at = column + tile * TILE_COLUMNS + sum_column(lane, j);
            if (at < M && token < T)
                partials[(token * count + split) * width + at] =
                    products.at[h / 2].tile[tile].in_half[h % 2].at[j];
        }
    }
}
