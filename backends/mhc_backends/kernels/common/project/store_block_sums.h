// Stores the sums of a K block.

#pragma once

#include "k_block_sums.h"
#include "sums.h"
#include "dialect/lanes.h"
#include "dialect/words.h"

// Stores the sums of a K block, of `tokens` tokens: COLUMN_TILES tiles of columns from `column` on
// and, with column 0, the squares. `block` points to those of the first token; tokens are `stride`
// apart.
template <int M, int COLUMN_TILES, typename P>
FUNCTION void store_block_sums(P block, int64_t stride, Sums<COLUMN_TILES, 1> sums, int column,
                               int tokens, int lane) {
    UNROLL for (int h = 0; h < 2; h++) {
        UNROLL for (int j = 0; j < 2; j++) {
            const int row = 8 * h + sum_row(lane, j);
            UNROLL for (int tile = 0; tile < COLUMN_TILES; tile++) {
                const int at = column + tile * TILE_COLUMNS + sum_column(lane, j);
                if (row < tokens && at < BlockSums<M>::SQUARES)
                    block[row * stride + at] = sums.products.at[0].tile[tile].in_half[h].at[j];
            }
        }
        const int row = 8 * h + tile_row(lane);
        if (row < tokens && column == 0)
            block[row * stride + BlockSums<M>::SQUARES + tile_pair(lane) / 2] =
                sums.squares[0].at[h];
    }
}
