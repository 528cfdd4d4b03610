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
#include "../common/project/phi_registers.h"
#include "../common/project/raw_within.h"
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
template <int N, typename X, typename Y, typename HRes, typename Phi, typename Out>
FUNCTION bool combine_project_few_aligned(X x, int x_shape_2, Y y, HRes h_res, Phi phi, Out out) {
    return x_shape_2 % STEP_CHANNELS == 0 && vectors<8>(x) && vectors<8>(y) && vectors<8>(out) &&
           vectors<4>(phi) && vectors<N>(h_res);
}

template <typename ACCESS, int N, int COLUMN_TILES, int STEPS, typename X, typename Y,
          typename HPost, typename HRes, typename Phi, typename Out, typename Partials>
FUNCTION void combine_project_few(X x, int64_t x_shape_0, int x_shape_2, Y y, HPost h_post,
                                  int h_post_shape_0, HRes h_res, int h_res_shape_0, Phi phi,
                                  int phi_shape_0, Out out, Partials partials,
                                  threadgroup float* numbers, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2, M = phi_shape_0;
    const int64_t K = int64_t(N) * C;
    const bool KEPT = N <= 4;  // the streams are in registers, else they are read again

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
                    AOperand<Row, STEPS, 1> rows;
                    UNROLL for (int r = 0; r < 2; r++) {
                        const int own = 8 * r + tile_row(lane);
                        const int64_t token = own < tokens ? first + own : T - 1;
                        const auto from = ACCESS::at(x) + token * K + c + channel;
                        const auto streams = load_streams_within<KEPT ? N : 1>(from, C, rest);
                        const Floats<8> layer = floats(
                            load_raw_within<8>(ACCESS::at(y) + token * C + c + channel, rest));
                        UNROLL for (int k = 0; k < STEPS; k++) {
                            const int i = step_stream<N, 1>(k_step + k);
                            const float post = float(h_post[row(h_post_shape_0, token) * N + i]);
                            const auto res = hold<N, KEPT>(ACCESS::at(h_res) +
                                                           (row(h_res_shape_0, token) * N + i) * N);
                            const Floats<8> sum = mix_streams<N, KEPT>(times(post, layer), res, 0,
                                                                       streams, from, C, rest);
                            const Row mixed = packed(ACCESS::at(out), sum);
                            const auto to =
                                ACCESS::at(out) + token * K + int64_t(i) * C + c + channel;
                            if (column == 0 && own < tokens) store_raw_within(to, mixed, rest);
                            rows.at[k][0].in_half[r] = mixed;
                        }
                    }
                    const auto phi_operands = load_b_operands<N, 1, COLUMN_TILES, STEPS>(
                        Row(), ACCESS::at(phi), K, M, C, column, begin, k_step, lane);
                    const auto k_block = k_blocks + simdgroup * NUMBERS;
                    TOGETHER;
                    put_block_sums(k_block,
                                   add_k_block(zero_sums<COLUMN_TILES, 1>(), rows, phi_operands),
                                   tokens, lane);
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
