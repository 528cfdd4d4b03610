// B operands in threadgroup memory.

#pragma once

#include "../operands.h"
#include "../position.h"
#include "../raw.h"
#include "dialect/operands.h"
#include "dialect/words.h"

template <typename F, typename S>
FUNCTION void put(S shared, F operand, int lane) {
    UNROLL for (int k = 0; k < F::FRAGMENTS; k++)
        shared[k * SIMD + lane] = operand.frag[k];
}

// The staged B operands from `from` on, for A operands of type T.
template <int COLUMN_TILES, typename T, typename S>
FUNCTION StagedOperand<BOperand<T, COLUMN_TILES>::FRAGMENTS, S> staged_operand(Raw<T, 8>, S from,
                                                                               int lane) {
    return {from, lane};
}

// Makes the B operand of phi's numbers, for A operands of type T.
template <int COLUMN_TILES, typename T>
FUNCTION BOperand<T, COLUMN_TILES> b_operand_for(Raw<T, 8>, BTiles<COLUMN_TILES> tiles) {
    return b_operand(tiles, T(0.0f));
}
