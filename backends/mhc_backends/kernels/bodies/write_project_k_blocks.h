// write_project_k_blocks: `write_project` for the fewest tokens and the 2 n columns of mappings
// without H_res, without the sums over K blocks, as in project_unmixed_k_blocks.h.
//
// x[T, n, C], y[T, C], h_post[T or 1, n], phi[2 n, n C] -> out[T, n, C], blocks[T, B, WIDTH].

#pragma once

#include "../common/channels.h"
#include "../common/load.h"
#include "../common/position.h"
#include "../common/project/k_block_sums.h"
#include "../common/project/k_blocks.h"
#include "../common/project/layout.h"
#include "../common/project/phi_registers.h"
#include "../common/project/starts.h"
#include "../common/project/store_block_sums.h"
#include "../common/project/sums.h"
#include "../common/project/written.h"
#include "dialect/lanes.h"
#include "dialect/sync.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// Whether all arrays begin where whole vectors may be loaded and stored.
template <typename X, typename Y, typename Phi, typename Out>
FUNCTION bool write_project_k_blocks_aligned(X x, int x_shape_2, Y y, Phi phi, Out out) {
    return x_shape_2 % STEP_CHANNELS == 0 && vectors<8>(x) && vectors<8>(y) && vectors<8>(out) &&
           vectors<4>(phi);
}

template <typename ACCESS, int N, int RUN, typename X, typename Y, typename HPost, typename Phi,
          typename Out, typename Blocks>
FUNCTION void write_project_k_blocks(X x, int64_t x_shape_0, int x_shape_2, Y y, HPost h_post,
                                     int h_post_shape_0, Phi phi, Out out, Blocks blocks,
                                     Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;
    const int64_t K = int64_t(N) * C;
    const int count = (C + RUN * STEP_CHANNELS - 1) / (RUN * STEP_CHANNELS) * N;  // K blocks
    enum { M = 2 * N, PER_SPLIT = N * SPLIT_STEPS / RUN };  // K blocks of a split

    typedef decltype(load_raw<8>(ACCESS::at(x))) Row;
    const int lane = here.id % SIMD, channel = 4 * tile_pair(lane);
    const int simdgroups = here.threads / SIMD;
    const int64_t tiles = (T + TILE_TOKENS - 1) / TILE_TOKENS;

    for (int64_t item = int64_t(here.group_x) * simdgroups + here.id / SIMD; item < tiles * count;
         item += int64_t(here.groups_x) * simdgroups) {
        const int k_block = int(item % count);
        const int64_t first = item / count * TILE_TOKENS;
        const int tokens = T - first < TILE_TOKENS ? int(T - first) : TILE_TOKENS;
        const int begin = k_block / PER_SPLIT * SPLIT_CHANNELS, own = k_block % PER_SPLIT;

        const int stream = own % N, c = own / N * (RUN * STEP_CHANNELS);
        const int rest = C - begin - channel;
        const auto from = starts_of<1>(ACCESS::at(x) + begin + channel, first, T, K, lane);
        const auto layer = starts_of<1>(ACCESS::at(y) + begin + channel, first, T, C, lane);
        const auto to = starts_of<1>(ACCESS::at(out) + begin + channel, first, T, K, lane);
        const auto post = starts_of<1>(h_post, first, T, row(h_post_shape_0, 1) * N, lane);
        const auto rows =
            written(load_k_block<N, RUN>(from, C, own, rest), load_steps<RUN>(layer, c, rest - c),
                    ACCESS::at(out), post, stream);
        store_k_block(to, stream * int64_t(C) + c, rows, tokens, rest - c, lane);
        const auto phi_operands = load_b_operands<N, RUN, 1, RUN>(Row(), ACCESS::at(phi), K, M, C,
                                                                  0, begin, own * RUN, lane);
        TOGETHER;
        store_block_sums<M>(blocks + (first * count + k_block) * BlockSums<M>::WIDTH,
                            int64_t(count) * BlockSums<M>::WIDTH,
                            add_k_block(zero_sums<1, 1>(), rows, phi_operands), 0, tokens, lane);
    }
}
