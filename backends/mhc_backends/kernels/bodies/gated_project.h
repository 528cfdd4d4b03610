// gated_project: the products of u_i = x_i r_i (1 + norm_i) with down and inject, for each stream by
// itself and without r_i: x_i . ((1 + norm_i) down_i), and x_i . x_i, from which gated_low makes
// r_i. So u is never written, and x is multiplied as it is in memory.
//
// x[T, n, C], norm[n C], down[R, n C], inject[n, n C] -> partials[T, P, WIDTH], with the squares in
// the last column. The columns of down come first. Those of inject, if it INJECTS, begin at the next
// multiple of COLUMN_TILES tiles; what is between them has no meaning.
//
// The sum tree: a K block is a K step, 32 channels of a stream; a split is STEPS K steps of a
// stream; the splits of a stream are added one by one. A threadgroup takes TOKEN_TILES tiles of 16
// tokens and a split, or a WHOLE stream; its simdgroups share the columns.

#pragma once

#include "../common/load.h"
#include "../common/operands.h"
#include "../common/position.h"
#include "../common/project/add_split.h"
#include "../common/project/k_blocks.h"
#include "../common/project/layout.h"
#include "../common/project/phi_registers.h"
#include "../common/project/scaled_phi.h"
#include "../common/project/staged.h"
#include "../common/project/starts.h"
#include "../common/project/store_sums.h"
#include "../common/project/sums.h"
#include "dialect/lanes.h"
#include "dialect/sync.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// Whether all arrays begin where whole vectors may be loaded and stored.
template <bool INJECTS, typename X, typename Norm, typename Down, typename Inject>
FUNCTION bool gated_project_aligned(X x, int x_shape_2, Norm norm, Down down, Inject inject) {
    return x_shape_2 % STEP_CHANNELS == 0 && vectors<8>(x) && vectors<4>(norm) &&
           vectors<4>(down) && (!INJECTS || vectors<4>(inject));
}

template <typename ACCESS, int N, int COLUMN_TILES, int TOKEN_TILES, int STEPS, bool WHOLE,
          bool INJECTS, typename X, typename Norm, typename Down, typename Inject,
          typename Partials>
FUNCTION void gated_project(X x, int64_t x_shape_0, int x_shape_2, Norm norm, Down down,
                            int64_t down_shape_0, Inject inject, Partials partials, Position here) {
    const int64_t T = x_shape_0;
    const int64_t rank = down_shape_0;
    const int C = x_shape_2, R = int(rank);
    const int64_t K = int64_t(N) * C;
    enum {
        TOKENS = TOKEN_TILES * TILE_TOKENS,
        COLUMNS = COLUMN_TILES * TILE_COLUMNS,
        INJECT_GROUPS = INJECTS ? (N + COLUMNS - 1) / COLUMNS : 0,
        SPLIT = STEPS * STEP_CHANNELS
    };

    typedef decltype(load_raw<8>(ACCESS::at(x))) Row;
    typedef decltype(b_operand_for(Row(), BTiles<COLUMN_TILES>())) Operand;
    const int lane = here.id % SIMD, simdgroup = here.id / SIMD, channel = 4 * tile_pair(lane);
    const int simdgroups = here.threads / SIMD;
    const int groups = (R + COLUMNS - 1) / COLUMNS, M = INJECTS ? groups * COLUMNS + N : R;
    const int parts = WHOLE ? 1 : (C + SPLIT - 1) / SPLIT;  // of a stream
    const int64_t tiles = (T + TOKENS - 1) / TOKENS;

    // the threadgroups of a part are neighbours, so that they find its columns in the cache
    for (int64_t item = here.group_x; item < tiles * N * parts; item += here.groups_x) {
        const int64_t first = item % tiles * TOKENS;
        const int part = int(item / tiles), i = part / parts;
        const int begin = part % parts * SPLIT,
                  end = !WHOLE && begin + SPLIT < C ? begin + SPLIT : C;
        const int64_t stream = int64_t(i) * C;
        const auto starts =
            starts_of<TOKEN_TILES>(ACCESS::at(x) + stream + channel, first, T, K, lane);

        for (int group = simdgroup; group < groups + INJECT_GROUPS; group += simdgroups) {
            const bool injects = INJECTS && group >= groups;
            auto total = zero_sums<COLUMN_TILES, TOKEN_TILES>();
            for (int split = begin; split < end; split += SPLIT) {
                auto sums = zero_sums<COLUMN_TILES, TOKEN_TILES>();
                for (int c = split; c < split + SPLIT && c < end; c += STEP_CHANNELS) {
                    const auto rows = load_steps<1>(starts, c, C - c - channel);
                    const auto numbers =
                        injects ? load_scaled_phi<COLUMN_TILES>(
                                      ACCESS::at(inject), ACCESS::at(norm), K, N,
                                      (group - groups) * COLUMNS, stream + c, C - c, lane)
                                : load_scaled_phi<COLUMN_TILES>(ACCESS::at(down), ACCESS::at(norm),
                                                                K, R, group * COLUMNS, stream + c,
                                                                C - c, lane);
                    BOperands<Operand, 1> operands;
                    operands.at[0] = b_operand_for(Row(), numbers);
                    TOGETHER;
                    sums = add_k_block(sums, rows, operands);
                }
                total = add_split(total, sums, lane);
            }
            store_sums(partials, first, T, N * parts, part, total, group * COLUMNS, M, lane);
        }
    }
}
