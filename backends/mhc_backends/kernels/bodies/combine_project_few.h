// combine_project_few: the same results as `combine_project`, bit for bit, for few tokens.
//
// x[T, n, C], y[T, C], h_post[T or 1, n], h_res[T or 1, n, n], phi[m, n C] -> out[T, n, C],
// partials[T, P, m + 1]. Threadgroups and simdgroups share the work as in project_few.h.

#pragma once

#include "../common/channels.h"
#include "../common/floats.h"
#include "../common/held.h"
#include "../common/load.h"
#include "../common/operands.h"
#include "../common/position.h"
#include "../common/project/block_sums.h"
#include "../common/project/k_steps.h"
#include "../common/project/layout.h"
#include "../common/project/mix.h"
#include "../common/project/mix_loads.h"
#include "../common/project/phi_numbers.h"
#include "../common/project/raw_within.h"
#include "../common/project/starts.h"
#include "../common/project/sums.h"
#include "../common/raw.h"
#include "../common/store_raw.h"
#include "../common/streams.h"
#include "dialect/lanes.h"
#include "dialect/sync.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int SCRATCH>
struct combine_project_few_memory {
    enum { numbers = SCRATCH };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int N, typename X, typename Y, typename HPost, typename HRes, typename Phi, typename Out>
FUNCTION bool combine_project_few_aligned(X x, int x_shape_2, Y y, HPost h_post, HRes h_res,
                                          Phi phi, Out out) {
    return x_shape_2 % STEP_CHANNELS == 0 && vectors<8>(x) && vectors<8>(y) && vectors<8>(out) &&
           vectors<4>(phi) && vectors<N>(h_post) && vectors<N * N>(h_res);
}

template <typename ACCESS, int N, int COLUMN_TILES, int AT_ONCE, int STEPS, typename X, typename Y,
          typename HPost, typename HRes, typename Phi, typename Out, typename Partials>
FUNCTION void combine_project_few(X x, int64_t x_shape_0, int x_shape_2, Y y, HPost h_post,
                                  int h_post_shape_0, HRes h_res, int h_res_shape_0, Phi phi,
                                  int phi_shape_0, Out out, Partials partials,
                                  threadgroup float* numbers, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2, M = phi_shape_0;
    const int64_t K = int64_t(N) * C;
    const bool KEPT = N <= 4;            // the streams are in registers, else they are read again
    const int MIXED = KEPT ? N : STEPS;  // streams, of which a K block has one or all

    typedef decltype(load_raw<8>(ACCESS::at(x))) Row;
    const int lane = here.id % SIMD, simdgroup = here.id / SIMD, channel = 4 * tile_pair(lane);
    const int simdgroups = here.threads / SIMD;
    const int P = (C + SPLIT_CHANNELS - 1) / SPLIT_CHANNELS;
    const int NUMBERS = TILE_TOKENS * Width<COLUMN_TILES>::NUMBERS;  // of a K block
    const auto totals = &numbers[0], k_blocks = &numbers[NUMBERS];

    for (int64_t item = here.group_x; item < (T + TILE_TOKENS - 1) / TILE_TOKENS * P;
         item += here.groups_x) {
        const int split = int(item % P), begin = split * SPLIT_CHANNELS;
        const int end = begin + SPLIT_CHANNELS < C ? begin + SPLIT_CHANNELS : C;
        const int count = (end - begin + STEP_CHANNELS - 1) / STEP_CHANNELS * N / STEPS;
        const int64_t first = item / P * TILE_TOKENS;
        const int tokens = T - first < TILE_TOKENS ? int(T - first) : TILE_TOKENS;

        for (int column = 0; column < M; column += COLUMN_TILES * TILE_COLUMNS) {
            for (int done = 0; done < count; done += simdgroups) {
                if (done + simdgroup < count) {
                    const int k_step = (done + simdgroup) * STEPS;
                    const int c = begin + step_channel<N, 1>(k_step);
                    const int rest = C - c - channel;
                    const auto from = starts_of<1>(ACCESS::at(x) + channel, first, T, K, lane);
                    const auto layer = starts_of<1>(ACCESS::at(y) + channel, first, T, C, lane);
                    const auto to = starts_of<1>(ACCESS::at(out) + channel, first, T, K, lane);
                    // all that can be loaded now is on its way before the first sum
                    const auto given = load_mix_inputs<KEPT ? N : 1>(from, layer, C, c, rest);
                    decltype(hold<N, KEPT>(ACCESS::at(h_post))) post[2];
                    decltype(hold<N * N, KEPT>(ACCESS::at(h_res))) res[2];
                    UNROLL for (int r = 0; r < 2; r++) {
                        const int64_t own = first + 8 * r + tile_row(lane);
                        const int64_t token = own < T ? own : T - 1;
                        post[r] =
                            hold<N, KEPT>(ACCESS::at(h_post) + row(h_post_shape_0, token) * N);
                        res[r] = hold<N * N, KEPT>(ACCESS::at(h_res) +
                                                   row(h_res_shape_0, token) * N * N);
                    }
                    PhiNumbers<AT_ONCE, STEPS> phi_numbers;
                    if (AT_ONCE == COLUMN_TILES)
                        phi_numbers = load_phi_numbers<N, 1, AT_ONCE, STEPS>(
                            ACCESS::at(phi), K, M, C, column, begin, k_step, lane);
                    AOperand<Row, STEPS, 1> rows;
                    UNROLL for (int k = 0; k < 2 * MIXED; k++) {
                        const int r = k / MIXED, b = STEPS < MIXED ? 0 : k % MIXED;
                        const int i = MIXED == N ? k % MIXED : step_stream<N, 1>(k_step + b);
                        if (STEPS < MIXED && i != step_stream<N, 1>(k_step)) continue;
                        const Floats<8> sum = mix_streams<N, KEPT>(
                            times(value(post[r], i), floats(given.layer[r])), res[r], i * N,
                            given.streams[r], from.at[0][r] + c, C, rest);
                        rows.at[b][0].in_half[r] = packed(ACCESS::at(out), sum);
                        if (column == 0 && first + 8 * r + tile_row(lane) < T)
                            store_raw_within(to.at[0][r] + int64_t(i) * C + c,
                                             rows.at[b][0].in_half[r], rest);
                    }
                    const auto k_block = k_blocks + simdgroup * NUMBERS;
                    UNROLL_FEW(1) for (int tile = 0; tile < COLUMN_TILES; tile += AT_ONCE) {
                        if (AT_ONCE < COLUMN_TILES)
                            phi_numbers = load_phi_numbers<N, 1, AT_ONCE, STEPS>(
                                ACCESS::at(phi), K, M, C, column + tile * TILE_COLUMNS, begin,
                                k_step, lane);
                        const auto phi_operands = b_operands_for(Row(), phi_numbers);
                        TOGETHER;
                        put_block_sums<COLUMN_TILES>(
                            k_block, add_k_block(zero_sums<AT_ONCE, 1>(), rows, phi_operands), tile,
                            tokens, lane);
                    }
                }
                BARRIER;
                const int made = count - done < simdgroups ? count - done : simdgroups;
                add_k_blocks<COLUMN_TILES>(totals, k_blocks, made, tokens, done == 0, here);
                BARRIER;  // the K blocks, and with the last ones the totals, are whole
            }
            store_totals<COLUMN_TILES>(totals, partials + (first * P + split) * (M + 1),
                                       int64_t(P) * (M + 1), column, M, tokens, here);
        }
    }
}
