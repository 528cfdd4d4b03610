// combine_project: combine, x'_i = sum_j H_res[i, j] x_j + h_post_i y (eq. 3), and then the results
// of `project` for x', as rounded to the streams' type.
//
// x[T, n, C], y[T, C], h_post[T or 1, n], h_res[T or 1, n, n], phi[m, n C] -> out[T, n, C],
// partials[T, P, m + 1]. A threadgroup keeps one split; each of its simdgroups takes 16 tokens at a
// time. They share phi as in project.h. A K block is one K step of each of STEPS streams; while 32
// channels of all streams are mixed and multiplied, the next AHEAD times 32 are being copied.

#pragma once

#include "../common/access.h"
#include "../common/channels.h"
#include "../common/floats.h"
#include "../common/held.h"
#include "../common/load.h"
#include "../common/operands.h"
#include "../common/position.h"
#include "../common/project/layout.h"
#include "../common/project/mix.h"
#include "../common/project/mix_inputs.h"
#include "../common/project/mix_loads.h"
#include "../common/project/pipeline.h"
#include "../common/project/schedule.h"
#include "../common/project/stage_phi.h"
#include "../common/project/staged.h"
#include "../common/project/starts.h"
#include "../common/project/store_sums.h"
#include "../common/project/sums.h"
#include "../common/raw.h"
#include "../common/store_raw.h"
#include "dialect/copies.h"
#include "dialect/lanes.h"
#include "dialect/operands.h"
#include "dialect/sync.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int COLUMN_TILES, int STAGE_STEPS, int BUFFER_FRAGMENTS>
struct combine_project_memory {
    enum { operands = STAGE_STEPS * B_FRAGMENTS(COLUMN_TILES) * SIMD + BUFFER_FRAGMENTS };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int N, typename X, typename Y, typename HPost, typename HRes, typename Phi, typename Out>
FUNCTION bool combine_project_aligned(X x, int x_shape_2, Y y, HPost h_post, HRes h_res, Phi phi,
                                      Out out) {
    return x_shape_2 % STEP_CHANNELS == 0 && vectors<8>(x) && vectors<8>(y) && vectors<8>(out) &&
           vectors<4>(phi) && vectors<N>(h_post) && vectors<N * N>(h_res);
}

template <typename ACCESS, int N, int COLUMN_TILES, int STEPS, int AHEAD, int STAGE_STEPS,
          typename X, typename Y, typename HPost, typename HRes, typename Phi, typename Out,
          typename Partials>
FUNCTION void combine_project(X x, int64_t x_shape_0, int x_shape_2, Y y, HPost h_post,
                              int h_post_shape_0, HRes h_res, int h_res_shape_0, Phi phi,
                              int phi_shape_0, Out out, Partials partials,
                              threadgroup uint4* operands, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2, M = phi_shape_0;
    const int64_t K = int64_t(N) * C;
    const bool KEPT = N <= 4;            // the streams are in registers, else they are read again
    const int MIXED = KEPT ? N : STEPS;  // streams at a time

    typedef decltype(load_raw<8>(ACCESS::at(x))) Row;
    const bool ALIGNED = Address<decltype(ACCESS::at(x))>::ALIGNED;
    const int OPERAND = decltype(b_operand_for(Row(), BTiles<COLUMN_TILES>()))::FRAGMENTS * SIMD;
    const int lane = here.id % SIMD, simdgroup = here.id / SIMD, channel = 4 * tile_pair(lane);
    const Schedule schedule = schedule_of(C, here.threads / SIMD * TILE_TOKENS, here);
    const int begin = schedule.begin_channel, end = schedule.end_channel;
    const bool once =
        STAGE_STEPS == N * SPLIT_STEPS && M <= COLUMN_TILES * TILE_COLUMNS;  // phi is put there
    const int BUFFER = 2 * (MIXED + 1) * RowFragments<Row>::COUNT * SIMD;
    const auto buffer = &operands[STAGE_STEPS * OPERAND + simdgroup * AHEAD * BUFFER];

    for (int64_t iteration = schedule.begin; iteration < T; iteration += schedule.step) {
        const int64_t first = iteration + simdgroup * TILE_TOKENS, next = first + schedule.step;
        const auto from = starts_of<1>(ACCESS::at(x) + channel, first, T, K, lane);
        const auto layer = starts_of<1>(ACCESS::at(y) + channel, first, T, C, lane);
        const auto to = starts_of<1>(ACCESS::at(out) + channel, first, T, K, lane);
        decltype(hold<N, KEPT>(ACCESS::at(h_post))) post[2];
        decltype(hold<N * N, KEPT>(ACCESS::at(h_res))) res[2];
        bool stores[2];
        UNROLL for (int r = 0; r < 2; r++) {
            const int64_t token = first + 8 * r + tile_row(lane);
            const int64_t own = token < T ? token : T - 1;
            post[r] = hold<N, KEPT>(ACCESS::at(h_post) + row(h_post_shape_0, own) * N);
            res[r] = hold<N * N, KEPT>(ACCESS::at(h_res) + row(h_res_shape_0, own) * N * N);
            stores[r] = token < T;
        }

        for (int column = 0; column < M; column += COLUMN_TILES * TILE_COLUMNS) {
            auto sums = zero_sums<COLUMN_TILES, 1>();
            if (ALIGNED && AHEAD && (!once || iteration == schedule.begin))
                start_mix_inputs<MIXED>(Row(), buffer, from, layer, C, begin, lane);
            for (int c = begin; c < end; c += STEP_CHANNELS) {
                const int rest = C - c - channel;
                MixInputs<KEPT ? N : 1, Row> given;
                if (!(ALIGNED && AHEAD))
                    given = load_mix_inputs<KEPT ? N : 1>(from, layer, C, c, rest);

                for (int i = 0; i < N; i += MIXED) {
                    const int k_step = (c - begin) / STEP_CHANNELS * N + i,
                              staged = k_step % STAGE_STEPS;
                    if (staged == 0 && (!once || iteration == schedule.begin))
                        stage_phi<N, 1, COLUMN_TILES, 1>(&operands[0], Row(), ACCESS::at(phi), K, M,
                                                         C, column, begin, k_step, STAGE_STEPS,
                                                         here);
                    if (ALIGNED && AHEAD) {
                        end_copies<0>();
                        SIMD_BARRIER;
                        given = take_mix_inputs<KEPT ? N : 1>(Row(), buffer, lane);
                        SIMD_BARRIER;
                        if (c + STEP_CHANNELS < end)
                            start_mix_inputs<MIXED>(Row(), buffer, from, layer, C,
                                                    c + STEP_CHANNELS, lane);
                        else if (once && next < T)
                            start_mix_inputs<MIXED>(
                                Row(), buffer,
                                starts_of<1>(ACCESS::at(x) + channel, next, T, K, lane),
                                starts_of<1>(ACCESS::at(y) + channel, next, T, C, lane), C, begin,
                                lane);
                    }
                    AOperand<Row, MIXED, 1> mixed;
                    UNROLL for (int k = 0; k < 2 * MIXED; k++) {
                        const int r = k / MIXED, stream = k % MIXED;
                        const Floats<8> sum = mix_streams<N, KEPT>(
                            times(value(post[r], i + stream), floats(given.layer[r])), res[r],
                            (i + stream) * N, given.streams[r], from.at[0][r] + c, C, rest);
                        mixed.at[stream][0].in_half[r] = packed(ACCESS::at(out), sum);
                        if (column == 0 && stores[r])
                            store_raw_within(to.at[0][r] + int64_t(i + stream) * C + c,
                                             mixed.at[stream][0].in_half[r], rest);
                    }
                    UNROLL for (int k_block = 0; k_block < MIXED; k_block += STEPS) {
                        AOperand<Row, STEPS, 1> rows;
                        UNROLL for (int b = 0; b < STEPS; b++)
                            rows.at[b][0] = mixed.at[k_block + b][0];
                        const auto operand = &operands[(staged + k_block) * OPERAND];
                        TOGETHER;
                        sums = add_k_block(sums, rows,
                                           staged_operand<COLUMN_TILES>(Row(), operand, lane));
                    }
                }
            }
            store_sums(partials, first, T, schedule.splits, schedule.split, sums, column, M, lane);
        }
    }
}
