// project: the sums over n C that the mappings need, x . phi and x . x (eqs. 14-15), as split-K
// partials that common/partials.h adds up.
//
// x[T, n, C], phi[m, n C] -> partials[T, P, m + 1], with the squares in the last column. A
// threadgroup is persistent: it keeps one split and iterates over tokens; each of its simdgroups
// takes TOKEN_TILES tiles of 16 tokens at a time. The simdgroups share the B operands of phi in
// threadgroup memory: those of a pipeline stage of STAGE_STEPS K steps or, if they fit, those of
// the whole split, once for all tokens. A K block is RUN K steps; while one is multiplied, the next
// AHEAD are being copied to as many pipeline buffers.

#pragma once

#include "../common/access.h"
#include "../common/load.h"
#include "../common/operands.h"
#include "../common/position.h"
#include "../common/project/k_block_copies.h"
#include "../common/project/k_blocks.h"
#include "../common/project/layout.h"
#include "../common/project/schedule.h"
#include "../common/project/stage_phi.h"
#include "../common/project/staged.h"
#include "../common/project/starts.h"
#include "../common/project/store_sums.h"
#include "../common/project/sums.h"
#include "dialect/copies.h"
#include "dialect/lanes.h"
#include "dialect/operands.h"
#include "dialect/sync.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int COLUMN_TILES, int STAGE_STEPS, int BUFFER_FRAGMENTS>
struct project_memory {
    enum { operands = STAGE_STEPS * B_FRAGMENTS(COLUMN_TILES) * SIMD + BUFFER_FRAGMENTS };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <typename X, typename Phi>
FUNCTION bool project_aligned(X x, int x_shape_2, Phi phi) {
    return x_shape_2 % STEP_CHANNELS == 0 && vectors<8>(x) && vectors<4>(phi);
}

template <typename ACCESS, int N, int RUN, int COLUMN_TILES, int TOKEN_TILES, int AHEAD,
          int STAGE_STEPS, typename X, typename Phi, typename Partials>
FUNCTION void project(X x, int64_t x_shape_0, int x_shape_2, Phi phi, int phi_shape_0,
                      Partials partials, threadgroup uint4* operands, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2, M = phi_shape_0;
    const int64_t K = int64_t(N) * C;

    typedef decltype(load_raw<8>(ACCESS::at(x))) Row;
    const bool ALIGNED = Address<decltype(ACCESS::at(x))>::ALIGNED;
    const int OPERAND = decltype(b_operand_for(Row(), BTiles<COLUMN_TILES>()))::FRAGMENTS * SIMD;
    const int BUFFER = Buffer<RUN, TOKEN_TILES, Row>::FRAGMENTS, K_BLOCK = RUN * STEP_CHANNELS;
    const int lane = here.id % SIMD, simdgroup = here.id / SIMD, channel = 4 * tile_pair(lane);
    const Schedule schedule = schedule_of(C, here.threads / SIMD * TOKEN_TILES * TILE_TOKENS, here);
    const int begin = schedule.begin_channel, rest = C - begin - channel;
    const int k_blocks = (schedule.end_channel - begin + K_BLOCK - 1) / K_BLOCK * N;
    const bool once =
        STAGE_STEPS == N * SPLIT_STEPS && M <= COLUMN_TILES * TILE_COLUMNS;  // phi is put there
    // The copies of an iteration's first K blocks start before the previous iteration ends.
    const bool flows = once && k_blocks % (AHEAD + !AHEAD) == 0;
    const auto buffers = &operands[STAGE_STEPS * OPERAND + simdgroup * AHEAD * BUFFER];

    for (int64_t iteration = schedule.begin; iteration < T; iteration += schedule.step) {
        const int64_t first = iteration + simdgroup * TOKEN_TILES * TILE_TOKENS,
                      next = first + schedule.step;
        const auto starts =
            starts_of<TOKEN_TILES>(ACCESS::at(x) + begin + channel, first, T, K, lane);

        for (int column = 0; column < M; column += COLUMN_TILES * TILE_COLUMNS) {
            auto sums = zero_sums<COLUMN_TILES, TOKEN_TILES>();
            UNROLL for (int k_block = 0; k_block < AHEAD; k_block++)
                if (ALIGNED && (!flows || iteration == schedule.begin))
                    start_k_block<N, RUN>(Row(), buffers + k_block * BUFFER, starts, C, k_block,
                                          rest, lane);
            for (int k_block = 0; k_block < k_blocks; k_block++) {
                const int k_step = k_block * RUN, staged = k_step % STAGE_STEPS;
                if (staged == 0 && (!once || iteration == schedule.begin))
                    stage_phi<N, RUN, COLUMN_TILES, 2>(&operands[0], Row(), ACCESS::at(phi), K, M,
                                                       C, column, begin, k_step, STAGE_STEPS, here);
                AOperand<Row, RUN, TOKEN_TILES> rows;
                if (ALIGNED && AHEAD) {
                    const int ahead = k_block + AHEAD;
                    const auto buffer = buffers + k_block % (AHEAD + !AHEAD) * BUFFER;
                    end_copies<AHEAD - !!AHEAD>();
                    SIMD_BARRIER;
                    rows = take_k_block<RUN, TOKEN_TILES>(Row(), buffer, lane);
                    SIMD_BARRIER;
                    if (ahead < k_blocks)
                        start_k_block<N, RUN>(Row(), buffer, starts, C, ahead, rest, lane);
                    else if (flows && next < T)
                        start_k_block<N, RUN>(
                            Row(), buffer,
                            starts_of<TOKEN_TILES>(ACCESS::at(x) + begin + channel, next, T, K,
                                                   lane),
                            C, ahead - k_blocks, rest, lane);
                    else
                        mark_copies();
                } else {
                    rows = load_k_block<N, RUN>(starts, C, k_block, rest);
                }
                TOGETHER;
                sums = add_k_block(
                    sums, rows,
                    staged_operand<COLUMN_TILES>(Row(), &operands[staged * OPERAND], lane));
            }
            store_sums(partials, first, T, schedule.splits, schedule.split, sums, column, M, lane);
        }
    }
}
