// The sums of a split: products with phi, and squares.

#pragma once

#include "../floats.h"
#include "../norm.h"
#include "../operands.h"
#include "../raw.h"
#include "accumulate.h"
#include "dialect/operands.h"
#include "dialect/words.h"

// A lane's sums of TOKEN_TILES tiles of 16 tokens: products with COLUMN_TILES tiles of phi's
// columns, and the squares of this lane's own numbers.
template <int COLUMN_TILES, int TOKEN_TILES>
struct Sums {
    Accumulators<COLUMN_TILES, TOKEN_TILES> products;
    Floats<2> squares[TOKEN_TILES];
};

template <int COLUMN_TILES, int TOKEN_TILES>
FUNCTION Sums<COLUMN_TILES, TOKEN_TILES> zero_sums() {
    Sums<COLUMN_TILES, TOKEN_TILES> out;
    out.products = zero_accumulators<COLUMN_TILES, TOKEN_TILES>();
    UNROLL for (int tile = 0; tile < TOKEN_TILES; tile++)
        out.squares[tile] = zeros<2>();
    return out;
}

// Adds the sums of one K block, multiplied on its own because tensor cores truncate what they add.
template <int COLUMN_TILES, int TOKEN_TILES, int STEPS, typename R, typename F>
FUNCTION Sums<COLUMN_TILES, TOKEN_TILES> add_k_block(Sums<COLUMN_TILES, TOKEN_TILES> sums,
                                                     AOperand<R, STEPS, TOKEN_TILES> rows,
                                                     F operands) {
    UNROLL for (int k = 0; k < 2 * TOKEN_TILES; k++) {
        float squares = 0.0f;
        UNROLL for (int b = 0; b < STEPS; b++) {
            const Floats<8> row = floats(rows.at[b][k / 2].in_half[k % 2]);
            squares = add_dot(squares, row, row);
        }
        sums.squares[k / 2].at[k % 2] =
            fma(squares, squares_unit(), sums.squares[k / 2].at[k % 2]);  // see inverse_rms
    }
    sums.products = plus(sums.products, multiply<COLUMN_TILES>(rows, operands));
    return sums;
}
