// project_dphi: phi's gradient, dphi = du^T x, for each share of the tokens; sum_rows adds them up.
//
// x[T, n, C], du[T, m] -> dphi[S, m, n C]. A threadgroup takes a share of the tokens and some N
// tiles; a simdgroup takes one N tile, 32 channels of one stream, and COLUMN_TILES tiles of columns
// at a time. The A operand is x transposed: a lane holds 4 channels of 8 tokens. The simdgroups
// share du in threadgroup memory, STAGE_STEPS K steps of 32 tokens at a time.

#pragma once

#include "../common/position.h"
#include "../common/project/dphi_sums.h"
#include "../common/project/layout.h"
#include "../common/project/n_tiles.h"
#include "../common/project/store_within.h"
#include "dialect/lanes.h"
#include "dialect/operands.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int COLUMN_TILES, int STAGE_STEPS>
struct project_dphi_memory {
    enum { operands = STAGE_STEPS * B_FRAGMENTS(COLUMN_TILES) * SIMD };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <typename X, typename Dphi>
FUNCTION bool project_dphi_aligned(X x, int x_shape_2, Dphi dphi) {
    return x_shape_2 % STEP_CHANNELS == 0 && vectors<4>(x) && vectors<4>(dphi);
}

template <typename ACCESS, int N, int COLUMN_TILES, int AHEAD, int STAGE_STEPS, typename X,
          typename Du, typename Dphi>
FUNCTION void project_dphi(X x, int64_t x_shape_0, int x_shape_2, Du du, int du_shape_1, Dphi dphi,
                           threadgroup uint4* operands, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2, M = du_shape_1;
    const int64_t K = int64_t(N) * C;

    const int lane = here.id % SIMD, simdgroup = here.id / SIMD, simdgroups = here.threads / SIMD;
    const int channel = 4 * tile_row(lane);
    const int n_tiles = n_tile_count<N>(C, simdgroups);
    const int n_tile = int(here.group_x % n_tiles) * simdgroups + simdgroup;
    const int i = n_tile_stream<N>(n_tile),
              c = n_tile_channel<N>(n_tile);  // from C on there is nothing
    const int rest = C - c - channel;
    const int64_t at = int64_t(i) * C + c + channel;
    const int64_t own = here.group_x / n_tiles, begin = own * STAGE_STEPS * SIMD;
    const int64_t iteration =
        here.groups_x / n_tiles * STAGE_STEPS * SIMD;  // all shares, side by side

    for (int column = 0; column < M; column += COLUMN_TILES * TILE_COLUMNS) {
        const auto sums = dphi_sums<COLUMN_TILES, AHEAD, STAGE_STEPS>(
            ACCESS::at(x) + at, K, rest, du, M, column, begin, T, iteration, operands, here);
        UNROLL for (int tile = 0; tile < COLUMN_TILES; tile++) {
            UNROLL for (int j = 0; j < 2; j++) {
                const int to = column + tile * TILE_COLUMNS + sum_column(lane, j);
                const int channel = c + 4 * sum_row(lane, j);
                if (to < M)
                    store_within(ACCESS::at(dphi) + (own * M + to) * K + int64_t(i) * C + channel,
                                 channels_of(sums, tile, j), C - channel);
            }
        }
    }
}
