// The product for one K step of the projection. The A operand is [16, 32]: a tile of 16 tokens, 32
// channels, of type T. The B operand is [32, 8 COLUMN_TILES]: as many columns of phi. A lane holds
//
// - of the A operand: 8 numbers of each of its two rows, from column 4 tile_pair on, as they are in
//   memory;
// - of each tile of the B operand: two runs of 4 numbers; run e is in rows 4 b_row(lane, e) to
//   4 b_row(lane, e) + 3 and column b_column(lane, e);
// - of each tile of the sum: two numbers in each half of the rows; number j of half h is in row
//   8 h + sum_row(lane, j) and column sum_column(lane, j).
//
// docs/images/fragments.svg draws this.

#pragma once

#include "floats.h"
#include "position.h"
#include "dialect/words.h"

// A lane's numbers of a B operand: of one tile, and of COLUMN_TILES tiles.
struct BNumbers {
    Floats<4> run[2];
};
template <int COLUMN_TILES>
struct BTiles {
    BNumbers at[COLUMN_TILES];
};

// A lane's sums: of one tile of tokens and one tile of columns, of COLUMN_TILES tiles of columns,
// and of TOKEN_TILES tiles of tokens.
struct Accumulator {
    Floats<2> in_half[2];
};
template <int COLUMN_TILES>
struct AccumulatorRow {
    Accumulator tile[COLUMN_TILES];
};
template <int COLUMN_TILES, int TOKEN_TILES>
struct Accumulators {
    AccumulatorRow<COLUMN_TILES> at[TOKEN_TILES];
};

// A lane's numbers of an A operand, as they are in memory: of STEPS K steps and TOKEN_TILES tiles.
template <typename R>
struct Halves {
    R in_half[2];
};
template <typename R, int STEPS, int TOKEN_TILES>
struct AOperand {
    Halves<R> at[STEPS][TOKEN_TILES];
};

// B operands in threadgroup memory: 16-byte fragment k of a lane is next to fragment k of the next
// lane, so that no two lanes use one bank. A product reads operands by frag(operands, k_step, k),
// which phi_registers.h defines for operands in registers.
template <int FRAGMENTS, typename S>
struct StagedOperand {
    S from;
    int lane;
};
template <int FRAGMENTS, typename S>
FUNCTION uint4 frag(StagedOperand<FRAGMENTS, S> operands, int k_step, int k) {
    return operands.from[(k_step * FRAGMENTS + k) * SIMD + operands.lane];
}
