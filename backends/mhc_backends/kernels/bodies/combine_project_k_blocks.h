// combine_project_k_blocks: `combine_project` for the fewest tokens, without the sums over K blocks,
// as in project_k_blocks.h. n is at most 4.
//
// x[T, n, C], y[T, C], h_post[T or 1, n], h_res[T or 1, n, n], phi[m, n C] -> out[T, n, C],
// blocks[T, B, WIDTH]. A simdgroup takes one K block, 16 tokens and COLUMN_TILES tiles of columns.
// Those of the first columns store what they mix.

#pragma once

#include "../common/channels.h"
#include "../common/floats.h"
#include "../common/held.h"
#include "../common/load.h"
#include "../common/operands.h"
#include "../common/position.h"
#include "../common/project/k_block_sums.h"
#include "../common/project/k_steps.h"
#include "../common/project/layout.h"
#include "../common/project/mix.h"
#include "../common/project/mix_loads.h"
#include "../common/project/phi_numbers.h"
#include "../common/project/starts.h"
#include "../common/project/store_block_sums.h"
#include "../common/project/sums.h"
#include "../common/store_raw.h"
#include "dialect/lanes.h"
#include "dialect/sync.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int N, typename X, typename Y, typename HPost, typename HRes, typename Phi, typename Out>
FUNCTION bool combine_project_k_blocks_aligned(X x, int x_shape_2, Y y, HPost h_post, HRes h_res,
                                               Phi phi, Out out) {
    return x_shape_2 % STEP_CHANNELS == 0 && vectors<8>(x) && vectors<8>(y) && vectors<8>(out) &&
           vectors<4>(phi) && vectors<N>(h_post) && vectors<N * N>(h_res);
}

template <typename ACCESS, int N, int COLUMN_TILES, int STEPS, typename X, typename Y,
          typename HPost, typename HRes, typename Phi, typename Out, typename Blocks>
FUNCTION void combine_project_k_blocks(X x, int64_t x_shape_0, int x_shape_2, Y y, HPost h_post,
                                       int h_post_shape_0, HRes h_res, int h_res_shape_0, Phi phi,
                                       Out out, Blocks blocks, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;
    const int64_t K = int64_t(N) * C;
    const int count = (C + STEP_CHANNELS - 1) / STEP_CHANNELS * N / STEPS;  // K blocks
    enum {
        M = N * N + 2 * N,
        COLUMNS = COLUMN_TILES * TILE_COLUMNS,
        GROUPS = (M + COLUMNS - 1) / COLUMNS,
        PER_SPLIT = N * SPLIT_STEPS / STEPS  // K blocks
    };

    typedef decltype(load_raw<8>(ACCESS::at(x))) Row;
    const int lane = here.id % SIMD, channel = 4 * tile_pair(lane);
    const int simdgroups = here.threads / SIMD;
    const int64_t tiles = (T + TILE_TOKENS - 1) / TILE_TOKENS;

    // the simdgroups of a K block are neighbours, so that they find its streams in the cache
    for (int64_t item = int64_t(here.group_x) * simdgroups + here.id / SIMD;
         item < tiles * count * GROUPS; item += int64_t(here.groups_x) * simdgroups) {
        const int column = int(item % GROUPS) * COLUMNS, k_block = int(item / GROUPS % count);
        const int64_t first = item / GROUPS / count * TILE_TOKENS;
        const int tokens = T - first < TILE_TOKENS ? int(T - first) : TILE_TOKENS;
        const int begin = k_block / PER_SPLIT * SPLIT_CHANNELS;
        const int k_step = k_block % PER_SPLIT * STEPS;
        const int c = begin + step_channel<N, 1>(k_step), i = step_stream<N, 1>(k_step);
        const int rest = C - c - channel;

        const auto from = starts_of<1>(ACCESS::at(x) + channel, first, T, K, lane);
        const auto layer = starts_of<1>(ACCESS::at(y) + channel, first, T, C, lane);
        const auto to = starts_of<1>(ACCESS::at(out) + channel, first, T, K, lane);
        const auto given = load_mix_inputs<N>(from, layer, C, c, rest);
        decltype(hold<N>(ACCESS::at(h_post))) post[2];
        decltype(hold<N * N>(ACCESS::at(h_res))) res[2];
        UNROLL for (int r = 0; r < 2; r++) {
            const int at = 8 * r + tile_row(lane);
            const int64_t token = at < tokens ? first + at : T - 1;
            post[r] = hold<N>(ACCESS::at(h_post) + row(h_post_shape_0, token) * N);
            res[r] = hold<N * N>(ACCESS::at(h_res) + row(h_res_shape_0, token) * N * N);
        }
        const auto numbers = load_phi_numbers<N, 1, COLUMN_TILES, STEPS>(
            ACCESS::at(phi), K, M, C, column, begin, k_step, lane);
        AOperand<Row, STEPS, 1> rows = {};
        UNROLL for (int r = 0; r < 2; r++) {
            if (8 * r >= tokens) continue;
            const int at = 8 * r + tile_row(lane);
            UNROLL for (int k = 0; k < N; k++) {
                if (STEPS < N && k != i) continue;  // a stream of another K block
                const Floats<8> sum =
                    mix_streams<N, true>(times(value(post[r], k), floats(given.layer[r])), res[r],
                                         k * N, given.streams[r], from.at[0][r], C, rest);
                const Row mixed = packed(ACCESS::at(out), sum);
                rows.at[STEPS < N ? 0 : k][0].in_half[r] = mixed;
                if (column == 0 && at < tokens)
                    store_raw_within(to.at[0][r] + int64_t(k) * C + c, mixed, rest);
            }
        }
        const auto phi_operands = b_operands_for(Row(), numbers);
        TOGETHER;
        store_block_sums<M>(blocks + (first * count + k_block) * BlockSums<M>::WIDTH,
                            int64_t(count) * BlockSums<M>::WIDTH,
                            add_k_block(zero_sums<COLUMN_TILES, 1>(), rows, phi_operands), column,
                            tokens, lane);
    }
}
