// The product that the projection is made of. Its A operand is 16 rows (a tile of tokens) of a K
// step, which is 32 numbers of T; its B operand [32, 8 COLUMN_TILES], of as many columns of phi. A
// lane holds 8 numbers of each of its two rows, those from 4 tile_pair on, as they are in memory;
// and of each tile of the B operand two runs of 4 numbers, run e in rows 4 b_row(lane, e) to 4
// b_row(lane, e) + 3 and column b_column(lane, e). Of the sum it gets two numbers of each tile in
// each half of the rows: number j of half h is in row 8 h + sum_row(lane, j) and column
// sum_column(lane, j). docs/images/fragments.svg draws this.

#pragma once

#include "floats.h"
#include "position.h"
#include "dialect/words.h"

// A lane's numbers of a B operand: of one tile, and of some.
struct BNumbers {
    Floats<4> run[2];
};
template <int COLUMN_TILES>
struct BTiles {
    BNumbers at[COLUMN_TILES];
};

// A lane's sums: of a tile of tokens and a tile of columns, of a row of such tiles, and of some
// rows.
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

// A lane's numbers of an A operand, as they are in memory: of STEPS K steps of TOKEN_TILES tiles.
template <typename R>
struct Halves {
    R in_half[2];
};
template <typename R, int STEPS, int TOKEN_TILES>
struct AOperand {
    Halves<R> at[STEPS][TOKEN_TILES];
};

// B operands in threadgroup memory, where 16-byte fragment k of a lane is beside the next lane's,
// so that no two lanes meet in a bank. (Others may be in registers: frag(operands, k_step, k) is
// what a product asks for.)
template <int FRAGMENTS, typename S>
struct StagedOperand {
    S from;
    int lane;
};
template <int FRAGMENTS, typename S>
FUNCTION uint4 frag(StagedOperand<FRAGMENTS, S> operands, int k_step, int k) {
    return operands.from[(k_step * FRAGMENTS + k) * SIMD + operands.lane];
}
