// Sums of K blocks in threadgroup memory, each made by one simdgroup.

#pragma once

#include "../position.h"
#include "layout.h"
#include "sums.h"
#include "dialect/lanes.h"
#include "dialect/words.h"

// The numbers of a token in threadgroup memory: its products, then its squares, one sum for each of
// the four lanes that hold a row.
template <int COLUMN_TILES>
struct Width {
    enum { NUMBERS = COLUMN_TILES * TILE_COLUMNS + 4 };
};

// Puts sums of one K block, of the first `tokens` rows, into threadgroup memory: those of SOME tiles
// of columns from tile `first` on, and with the first ones the squares.
template <int COLUMN_TILES, int SOME, typename S>
FUNCTION void put_block_sums(S k_block, Sums<SOME, 1> sums, int first, int tokens, int lane) {
    UNROLL for (int h = 0; h < 2; h++) {
        UNROLL for (int j = 0; j < 2; j++) {
            const int row = 8 * h + sum_row(lane, j);
            UNROLL for (int tile = 0; tile < SOME; tile++) {
                const int at = (first + tile) * TILE_COLUMNS + sum_column(lane, j);
                if (row < tokens)
                    k_block[row * Width<COLUMN_TILES>::NUMBERS + at] =
                        sums.products.at[0].tile[tile].in_half[h].at[j];
            }
        }
        const int row = 8 * h + tile_row(lane),
                  at = COLUMN_TILES * TILE_COLUMNS + tile_pair(lane) / 2;
        if (row < tokens && first == 0)
            k_block[row * Width<COLUMN_TILES>::NUMBERS + at] = sums.squares[0].at[h];
    }
}

// Adds `count` K blocks, one by one, to the totals of `tokens` tokens; each total belongs to one
// thread, the same in every call.
template <int COLUMN_TILES, typename S>
FUNCTION void add_k_blocks(S totals, S k_blocks, int count, int tokens, bool first, Position here) {
    const int NUMBERS = Width<COLUMN_TILES>::NUMBERS;
    for (int at = here.id; at < tokens * NUMBERS; at += here.threads) {
        float sum = first ? 0.0f : totals[at];
        for (int k_block = 0; k_block < count; k_block++)
            sum += k_blocks[k_block * TILE_TOKENS * NUMBERS + at];
        totals[at] = sum;
    }
}

// Stores the totals in the layout of store_sums. `partials` points to those of the first token;
// tokens are `stride` apart.
template <int COLUMN_TILES, typename S, typename P>
FUNCTION void store_totals(S totals, P partials, int64_t stride, int column, int M, int tokens,
                           Position here) {
    const int NUMBERS = Width<COLUMN_TILES>::NUMBERS, PRODUCTS = COLUMN_TILES * TILE_COLUMNS;
    for (int at = here.id; at < tokens * (PRODUCTS + 1); at += here.threads) {
        const int row = at / (PRODUCTS + 1), k = at % (PRODUCTS + 1);
        const auto own = totals + row * NUMBERS;
        if (k < PRODUCTS && column + k < M) partials[row * stride + column + k] = own[k];
        if (k == PRODUCTS && column == 0)
            partials[row * stride + M] = (own[k] + own[k + 1]) + (own[k + 2] + own[k + 3]);
    }
}
