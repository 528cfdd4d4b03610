// Stores the sums of a split as split-K partials.

#pragma once

#include "store_products.h"
#include "sums.h"
#include "dialect/lanes.h"
#include "dialect/simd.h"
#include "dialect/words.h"

// Stores the sums of the tokens from `first` on in partials[T, P, M + 1]: the products of
// COLUMN_TILES tiles of columns from `column` on and, with column 0, the squares in the last place.
template <int COLUMN_TILES, int TOKEN_TILES, typename P>
FUNCTION void store_sums(P partials, int64_t first, int64_t T, int count, int split,
                         Sums<COLUMN_TILES, TOKEN_TILES> sums, int column, int M, int lane) {
    store_products(partials, first, T, count, split, sums.products, column, M, M + 1, lane);
    UNROLL for (int k = 0; k < 2 * TOKEN_TILES; k++) {
        const int64_t token = first + 8 * k + tile_row(lane);
        const float squares = row_sum(sums.squares[k / 2].at[k % 2]);
        if (column == 0 && tile_pair(lane) == 0 && token < T)
            partials[(token * count + split) * (M + 1) + M] = squares;
    }
}
