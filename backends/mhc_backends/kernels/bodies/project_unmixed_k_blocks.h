// project_unmixed_k_blocks: project_k_blocks for the 2 n columns of mappings without H_res.
//
// x[T, n, C], phi[2 n, n C] -> blocks[T, B, WIDTH] (k_block_sums.h), which pre_unmixed_k_blocks adds
// up. A simdgroup takes one K block and 16 tokens. n is at most 4: one tile has all columns.

#pragma once

#include "../common/load.h"
#include "../common/position.h"
#include "../common/project/k_block_sums.h"
#include "../common/project/k_blocks.h"
#include "../common/project/layout.h"
#include "../common/project/phi_registers.h"
#include "../common/project/starts.h"
#include "../common/project/store_block_sums.h"
#include "../common/project/sums.h"
#include "dialect/lanes.h"
#include "dialect/sync.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// Whether all arrays begin where whole vectors may be loaded and stored.
template <typename X, typename Phi>
FUNCTION bool project_unmixed_k_blocks_aligned(X x, int x_shape_2, Phi phi) {
    return x_shape_2 % STEP_CHANNELS == 0 && vectors<8>(x) && vectors<4>(phi);
}

template <typename ACCESS, int N, int RUN, typename X, typename Phi, typename Blocks>
FUNCTION void project_unmixed_k_blocks(X x, int64_t x_shape_0, int x_shape_2, Phi phi,
                                       Blocks blocks, Position here) {
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

        const auto starts = starts_of<1>(ACCESS::at(x) + begin + channel, first, T, K, lane);
        const auto rows = load_k_block<N, RUN>(starts, C, own, C - begin - channel);
        const auto phi_operands = load_b_operands<N, RUN, 1, RUN>(Row(), ACCESS::at(phi), K, M, C,
                                                                  0, begin, own * RUN, lane);
        TOGETHER;
        store_block_sums<M>(blocks + (first * count + k_block) * BlockSums<M>::WIDTH,
                            int64_t(count) * BlockSums<M>::WIDTH,
                            add_k_block(zero_sums<1, 1>(), rows, phi_operands), 0, tokens, lane);
    }
}
