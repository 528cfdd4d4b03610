// operands

#pragma once

#include "floats.h"
#include "dialect/words.h"

struct BNumbers {
    Floats<4> run[2];
};

template <int COLUMN_TILES>
struct BTiles {
    BNumbers at[COLUMN_TILES];
};

// A lane's share of 16 rows and of a tile's columns: of the rows 8 numbers of each of its two.
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

template <typename R>
struct Halves {
    R in_half[2];
};

// TOKEN_TILES times 16 rows, STEPS times 32 numbers of each.
template <typename R, int STEPS, int TOKEN_TILES>
struct AOperand {
    Halves<R> at[STEPS][TOKEN_TILES];
};

// BOperands in threadgroup memory, where quad k of a lane is beside the next one's, so that no two lanes
// meet in a bank. (Others may be in registers: four(factors, block, k) is what a product asks for.)
template <int FRAGMENTS, typename S>
struct StagedOperand {
    S from;
    int lane;
};

template <int FRAGMENTS, typename S>
FUNCTION uint4 frag(StagedOperand<FRAGMENTS, S> operands, int k_step, int k) {
    return operands.from[(k_step * FRAGMENTS + k) * SIMD + operands.lane];
}
