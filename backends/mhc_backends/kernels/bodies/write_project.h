// write_project: combine without H_res, x'_i = x_i + h_post_i y, and then the results of `project`
// for x', as rounded to the streams' type, bit for bit.
//
// x[T, n, C], y[T, C], h_post[T or 1, n], phi[m, n C] -> out[T, n, C], partials[T, P, m + 1].
// Threadgroups share the work, phi and the pipeline buffers as in project.h. y's numbers of a K
// block stay in registers for all streams.

#pragma once

#include "../common/access.h"
#include "../common/channels.h"
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
#include "../common/project/written.h"
#include "dialect/copies.h"
#include "dialect/lanes.h"
#include "dialect/operands.h"
#include "dialect/sync.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int COLUMN_TILES, int STAGE_STEPS, int BUFFER_FRAGMENTS>
struct write_project_memory {
    enum { operands = STAGE_STEPS * B_FRAGMENTS(COLUMN_TILES) * SIMD + BUFFER_FRAGMENTS };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <typename X, typename Y, typename Phi, typename Out>
FUNCTION bool write_project_aligned(X x, int x_shape_2, Y y, Phi phi, Out out) {
    return x_shape_2 % STEP_CHANNELS == 0 && vectors<8>(x) && vectors<8>(y) && vectors<8>(out) &&
           vectors<4>(phi);
}

template <typename ACCESS, int N, int RUN, int COLUMN_TILES, int AHEAD, int STAGE_STEPS, typename X,
          typename Y, typename HPost, typename Phi, typename Out, typename Partials>
FUNCTION void write_project(X x, int64_t x_shape_0, int x_shape_2, Y y, HPost h_post,
                            int h_post_shape_0, Phi phi, int phi_shape_0, Out out,
                            Partials partials, threadgroup uint4* operands, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2, M = phi_shape_0;
    const int64_t K = int64_t(N) * C;

    typedef decltype(load_raw<8>(ACCESS::at(x))) Row;
    const bool ALIGNED = Address<decltype(ACCESS::at(x))>::ALIGNED;
    const int OPERAND = decltype(b_operand_for(Row(), BTiles<COLUMN_TILES>()))::FRAGMENTS * SIMD;
    const int BUFFER = Buffer<RUN, 1, Row>::FRAGMENTS, K_BLOCK = RUN * STEP_CHANNELS;
    const int lane = here.id % SIMD, simdgroup = here.id / SIMD, channel = 4 * tile_pair(lane);
    const Schedule schedule = schedule_of(C, here.threads / SIMD * TILE_TOKENS, here);
    const int begin = schedule.begin_channel, rest = C - begin - channel;
    const int k_blocks = (schedule.end_channel - begin + K_BLOCK - 1) / K_BLOCK * N;
    const bool once =
        STAGE_STEPS == N * SPLIT_STEPS && M <= COLUMN_TILES * TILE_COLUMNS;  // phi is put there
    const auto buffers = &operands[STAGE_STEPS * OPERAND + simdgroup * AHEAD * BUFFER];

    for (int64_t iteration = schedule.begin; iteration < T; iteration += schedule.step) {
        const int64_t first = iteration + simdgroup * TILE_TOKENS;
        const auto from = starts_of<1>(ACCESS::at(x) + begin + channel, first, T, K, lane);
        const auto layer = starts_of<1>(ACCESS::at(y) + begin + channel, first, T, C, lane);
        const auto to = starts_of<1>(ACCESS::at(out) + begin + channel, first, T, K, lane);
        const auto post = starts_of<1>(h_post, first, T, row(h_post_shape_0, 1) * N, lane);

        for (int column = 0; column < M; column += COLUMN_TILES * TILE_COLUMNS) {
            auto sums = zero_sums<COLUMN_TILES, 1>();
            AOperand<Row, RUN, 1> layers;
            UNROLL for (int k_block = 0; k_block < AHEAD; k_block++)
                if (ALIGNED && AHEAD)
                    start_k_block<N, RUN>(Row(), buffers + k_block * BUFFER, from, C, k_block, rest,
                                          lane);
            for (int k_block = 0; k_block < k_blocks; k_block++) {
                const int k_step = k_block * RUN, staged = k_step % STAGE_STEPS;
                const int stream = k_block % N, c = k_block / N * K_BLOCK;
                if (staged == 0 && (!once || iteration == schedule.begin))
                    stage_phi<N, RUN, COLUMN_TILES, 2>(&operands[0], Row(), ACCESS::at(phi), K, M,
                                                       C, column, begin, k_step, STAGE_STEPS, here);
                if (stream == 0) layers = load_steps<RUN>(layer, c, rest - c);
                AOperand<Row, RUN, 1> rows;
                if (ALIGNED && AHEAD) {
                    const int ahead = k_block + AHEAD;
                    const auto buffer = buffers + k_block % (AHEAD + !AHEAD) * BUFFER;
                    end_copies<AHEAD - !!AHEAD>();
                    SIMD_BARRIER;
                    rows = take_k_block<RUN, 1>(Row(), buffer, lane);
                    SIMD_BARRIER;
                    if (ahead < k_blocks)
                        start_k_block<N, RUN>(Row(), buffer, from, C, ahead, rest, lane);
                    else
                        mark_copies();
                } else {
                    rows = load_k_block<N, RUN>(from, C, k_block, rest);
                }
                rows = written(rows, layers, ACCESS::at(out), post, stream);
                if (column == 0)
                    store_k_block(to, stream * int64_t(C) + c, rows, T - first, rest - c, lane);
                TOGETHER;
                sums = add_k_block(
                    sums, rows,
                    staged_operand<COLUMN_TILES>(Row(), &operands[staged * OPERAND], lane));
            }
            store_sums(partials, first, T, schedule.splits, schedule.split, sums, column, M, lane);
        }
    }
}
