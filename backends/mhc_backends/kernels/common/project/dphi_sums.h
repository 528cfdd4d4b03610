// The product dphi = du^T x over a share of the tokens.

#pragma once

#include "../load.h"
#include "../operands.h"
#include "../position.h"
#include "accumulate.h"
#include "dphi.h"
#include "staged.h"
#include "dialect/lanes.h"
#include "dialect/operands.h"
#include "dialect/sync.h"
#include "dialect/words.h"

// The sums of a simdgroup: of channels 0 and 1 of a lane's four, and of 2 and 3.
template <int COLUMN_TILES>
struct DphiSums {
    Accumulators<COLUMN_TILES, 1> at[2];
};

// The four sums of adjacent channels in column `sum_column(lane, j)` of a tile.
template <int COLUMN_TILES>
FUNCTION Floats<4> channels_of(DphiSums<COLUMN_TILES> sums, int tile, int j) {
    Floats<4> out;
    UNROLL for (int k = 0; k < 4; k++)
        out.at[k] = sums.at[k / 2].at[0].tile[tile].in_half[k % 2].at[j];
    return out;
}

// Multiplies 32 channels of x[T, K], of which a lane has four from `x` on (there are `rest`), by
// COLUMN_TILES tiles of du[T, M]'s columns from `column` on. The share begins at token `begin` and
// goes on every `iteration` tokens. All threads must come here: the simdgroups share du in
// `operands`, STAGE_STEPS K steps of 32 tokens at a time.
template <int COLUMN_TILES, int AHEAD, int STAGE_STEPS, typename P, typename Du, typename S>
FUNCTION DphiSums<COLUMN_TILES> dphi_sums(P x, int64_t K, int rest, Du du, int M, int column,
                                          int64_t begin, int64_t T, int64_t iteration, S operands,
                                          Position here) {
    typedef decltype(load_raw<8>(x)) Row;
    const int OPERAND = decltype(b_operand_for(Row(), BTiles<COLUMN_TILES>()))::FRAGMENTS * SIMD;
    const int lane = here.id % SIMD, simdgroup = here.id / SIMD, simdgroups = here.threads / SIMD;
    DphiSums<COLUMN_TILES> sums;
    UNROLL for (int s = 0; s < 2; s++)
        sums.at[s] = zero_accumulators<COLUMN_TILES, 1>();

    decltype(load_tokens(x, K, 0, 0, 0, 0)) tokens[AHEAD + 1];
    if (AHEAD) tokens[0] = load_tokens(x, K, begin, T, rest, lane);
    for (int64_t stage = begin; stage < T; stage += iteration) {
        BARRIER;  // those before have been read
        for (int k = simdgroup; k < STAGE_STEPS; k += simdgroups) {
            const auto numbers = load_du<COLUMN_TILES>(du, M, column, stage + k * SIMD, T, lane);
            put(&operands[k * OPERAND], b_operand_for(Row(), numbers), lane);
        }
        BARRIER;
        for (int k = 0; k < STAGE_STEPS; k += 2) {
            UNROLL for (int side = 0; side < 2; side++) {
                const int k_step = k + side;
                const int64_t first = stage + k_step * SIMD;
                const int64_t next = !AHEAD                     ? first
                                     : k_step + 1 < STAGE_STEPS ? first + SIMD
                                                                : stage + iteration;
                if (next < T) tokens[AHEAD ? 1 - side : 0] = load_tokens(x, K, next, T, rest, lane);
                if (first < T) {
                    const auto shared =
                        staged_operand<COLUMN_TILES>(Row(), &operands[k_step * OPERAND], lane);
                    TOGETHER;
                    UNROLL for (int s = 0; s < 2; s++) {
                        AOperand<Row, 1, 1> rows;
                        UNROLL for (int h = 0; h < 2; h++)
                            rows.at[0][0].in_half[h] =
                                transposed(tokens[AHEAD ? side : 0], 2 * s + h);
                        sums.at[s] = plus(sums.at[s], multiply<COLUMN_TILES>(rows, shared));
                    }
                }
            }
        }
    }
    return sums;
}
