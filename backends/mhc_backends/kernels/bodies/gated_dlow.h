// gated_dlow: the cotangent of the gates' low rank, dlow = dz @ up, for each stream by itself.
//
// dz[T, n, C], up[n C, R] -> partials[T, P, R]. The sum tree, and what a threadgroup takes, are those
// of gated_project.

#pragma once

#include "../common/load.h"
#include "../common/operands.h"
#include "../common/position.h"
#include "../common/project/accumulate.h"
#include "../common/project/columns.h"
#include "../common/project/k_blocks.h"
#include "../common/project/layout.h"
#include "../common/project/phi_registers.h"
#include "../common/project/staged.h"
#include "../common/project/starts.h"
#include "../common/project/store_products.h"
#include "dialect/lanes.h"
#include "dialect/operands.h"
#include "dialect/sync.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// Whether all arrays begin where whole vectors may be loaded and stored.
template <typename Dz>
FUNCTION bool gated_dlow_aligned(Dz dz, int dz_shape_2) {
    return dz_shape_2 % STEP_CHANNELS == 0 && vectors<8>(dz);
}

template <typename ACCESS, int N, int COLUMN_TILES, int TOKEN_TILES, int STEPS, bool WHOLE,
          typename Dz, typename Up, typename Partials>
FUNCTION void gated_dlow(Dz dz, int64_t dz_shape_0, int dz_shape_2, Up up, int up_shape_1,
                         Partials partials, Position here) {
    const int64_t T = dz_shape_0;
    const int C = dz_shape_2, RANK = up_shape_1;
    const int64_t K = int64_t(N) * C;
    enum {
        TOKENS = TOKEN_TILES * TILE_TOKENS,
        COLUMNS = COLUMN_TILES * TILE_COLUMNS,
        SPLIT = STEPS * STEP_CHANNELS
    };

    typedef decltype(load_raw<8>(ACCESS::at(dz))) Row;
    typedef decltype(b_operand_for(Row(), BTiles<COLUMN_TILES>())) Operand;
    const int lane = here.id % SIMD, simdgroup = here.id / SIMD, channel = 4 * tile_pair(lane);
    const int simdgroups = here.threads / SIMD;
    const int parts = WHOLE ? 1 : (C + SPLIT - 1) / SPLIT;  // of a stream
    const int64_t tiles = (T + TOKENS - 1) / TOKENS;

    // the threadgroups of a part are neighbours, so that they find its rows in the cache
    for (int64_t item = here.group_x; item < tiles * N * parts; item += here.groups_x) {
        const int64_t first = item % tiles * TOKENS;
        const int part = int(item / tiles);
        const int begin = part % parts * SPLIT,
                  end = !WHOLE && begin + SPLIT < C ? begin + SPLIT : C;
        const int64_t stream = int64_t(part / parts) * C;
        const auto starts =
            starts_of<TOKEN_TILES>(ACCESS::at(dz) + stream + channel, first, T, K, lane);

        for (int column = simdgroup * COLUMNS; column < RANK; column += simdgroups * COLUMNS) {
            auto total = zero_accumulators<COLUMN_TILES, TOKEN_TILES>();
            for (int split = begin; split < end; split += SPLIT) {
                auto sums = zero_accumulators<COLUMN_TILES, TOKEN_TILES>();
                for (int c = split; c < split + SPLIT && c < end; c += STEP_CHANNELS) {
                    const auto rows = load_steps<1>(starts, c, C - c - channel);
                    BOperands<Operand, 1> operands;
                    operands.at[0] =
                        b_operand_for(Row(), load_columns<COLUMN_TILES>(up + (stream + c) * RANK,
                                                                        RANK, column, C - c, lane));
                    TOGETHER;
                    sums = plus(sums, multiply<COLUMN_TILES>(rows, operands));
                }
                total = plus(total, sums);
            }
            store_products(partials, first, T, N * parts, part, total, column, RANK, RANK, lane);
        }
    }
}
