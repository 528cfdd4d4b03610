// write_project_few: the same results as `write_project`, bit for bit, for few tokens.
//
// x[T, n, C], y[T, C], h_post[T or 1, n], phi[m, n C] -> out[T, n, C], partials[T, P, m + 1].
// Threadgroups and simdgroups share the work as in project_few.h.

#pragma once

#include "../common/channels.h"
#include "../common/load.h"
#include "../common/position.h"
#include "../common/project/block_sums.h"
#include "../common/project/k_blocks.h"
#include "../common/project/layout.h"
#include "../common/project/phi_registers.h"
#include "../common/project/starts.h"
#include "../common/project/sums.h"
#include "../common/project/written.h"
#include "dialect/lanes.h"
#include "dialect/sync.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int SCRATCH>
struct write_project_few_memory {
    enum { numbers = SCRATCH };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <typename X, typename Y, typename Phi, typename Out>
FUNCTION bool write_project_few_aligned(X x, int x_shape_2, Y y, Phi phi, Out out) {
    return x_shape_2 % STEP_CHANNELS == 0 && vectors<8>(x) && vectors<8>(y) && vectors<8>(out) &&
           vectors<4>(phi);
}

template <typename ACCESS, int N, int RUN, int COLUMN_TILES, typename X, typename Y, typename HPost,
          typename Phi, typename Out, typename Partials>
FUNCTION void write_project_few(X x, int64_t x_shape_0, int x_shape_2, Y y, HPost h_post,
                                int h_post_shape_0, Phi phi, int phi_shape_0, Out out,
                                Partials partials, threadgroup float* numbers, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2, M = phi_shape_0;
    const int64_t K = int64_t(N) * C;

    typedef decltype(load_raw<8>(ACCESS::at(x))) Row;
    const int lane = here.id % SIMD, simdgroup = here.id / SIMD, channel = 4 * tile_pair(lane);
    const int simdgroups = here.threads / SIMD;
    const int P = (C + SPLIT_CHANNELS - 1) / SPLIT_CHANNELS, K_BLOCK = RUN * STEP_CHANNELS;
    const int NUMBERS = TILE_TOKENS * Width<COLUMN_TILES>::NUMBERS;  // of a K block
    const auto totals = &numbers[0], k_blocks = &numbers[NUMBERS];

    for (int64_t item = here.group_x; item < (T + TILE_TOKENS - 1) / TILE_TOKENS * P;
         item += here.groups_x) {
        const int split = int(item % P), begin = split * SPLIT_CHANNELS, rest = C - begin - channel;
        const int end = begin + SPLIT_CHANNELS < C ? begin + SPLIT_CHANNELS : C;
        const int count = (end - begin + K_BLOCK - 1) / K_BLOCK * N;
        const int64_t first = item / P * TILE_TOKENS;
        const int tokens = T - first < TILE_TOKENS ? int(T - first) : TILE_TOKENS;
        const auto from = starts_of<1>(ACCESS::at(x) + begin + channel, first, T, K, lane);
        const auto layer = starts_of<1>(ACCESS::at(y) + begin + channel, first, T, C, lane);
        const auto to = starts_of<1>(ACCESS::at(out) + begin + channel, first, T, K, lane);
        const auto post = starts_of<1>(h_post, first, T, row(h_post_shape_0, 1) * N, lane);

        for (int column = 0; column < M; column += COLUMN_TILES * TILE_COLUMNS) {
            for (int done = 0; done < count; done += simdgroups) {
                if (done + simdgroup < count) {
                    const int own = done + simdgroup, stream = own % N, c = own / N * K_BLOCK;
                    const auto rows =
                        written(load_k_block<N, RUN>(from, C, own, rest),
                                load_steps<RUN>(layer, c, rest - c), ACCESS::at(out), post, stream);
                    if (column == 0)
                        store_k_block(to, stream * int64_t(C) + c, rows, tokens, rest - c, lane);
                    const auto phi_operands = load_b_operands<N, RUN, COLUMN_TILES, RUN>(
                        Row(), ACCESS::at(phi), K, M, C, column, begin, own * RUN, lane);
                    const auto k_block = k_blocks + simdgroup * NUMBERS;
                    TOGETHER;
                    put_block_sums<COLUMN_TILES>(
                        k_block, add_k_block(zero_sums<COLUMN_TILES, 1>(), rows, phi_operands), 0,
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
