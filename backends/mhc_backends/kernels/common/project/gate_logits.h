// The logits of the gates: z = low @ up.T for a tile of tokens and some channels of a stream.

#pragma once

#include "../load.h"
#include "../operands.h"
#include "accumulate.h"
#include "adjacent_rows.h"
#include "k_blocks.h"
#include "layout.h"
#include "phi_registers.h"
#include "staged.h"
#include "starts.h"
#include "dialect/lanes.h"
#include "dialect/operands.h"
#include "dialect/sync.h"
#include "dialect/words.h"

enum { GATED_STREAMS = 8 };  // streams at a time in a threadgroup, at most

// low[T, R] and `up`, the stream's rows of up[n C, R]. The logits are of 16 tokens from `first` on
// and 8 COLUMN_TILES channels from `begin` on: number j of half h of tile k is of token
// 8 h + sum_row(lane, j) and channel COLUMN_TILES sum_column(lane, j) + k.
template <int COLUMN_TILES, typename P, typename Q>
FUNCTION Accumulators<COLUMN_TILES, 1> gate_logits(P low, Q up, int64_t first, int64_t T, int R,
                                                   int C, int begin, int lane) {
    typedef decltype(load_raw<8>(low)) Row;
    typedef decltype(b_operand_for(Row(), BTiles<COLUMN_TILES>())) Operand;
    const int number = 4 * tile_pair(lane);
    const auto starts = starts_of<1>(low + number, first, T, R, lane);
    auto z = zero_accumulators<COLUMN_TILES, 1>();
    for (int at = 0; at < R; at += STEP_CHANNELS) {
        const auto rows = load_steps<1>(starts, at, R - at - number);
        BOperands<Operand, 1> operands;
        operands.at[0] = b_operand_for(
            Row(), load_adjacent_rows<COLUMN_TILES>(up, R, C, begin, at, R - at, lane));
        TOGETHER;
        z = plus(z, multiply<COLUMN_TILES>(rows, operands));
    }
    return z;
}
