// gated_dfactors: the gradients of the gates' matrices, sums over the tokens, for each share of them;
// sum_rows adds these up. du^T x (1 + norm) for down and inject, or, OF_UP, x^T du.
//
// x[T, n, C], norm[n C], du[n, T, M] -> terms[S, M, n C]; or, OF_UP, the logits' cotangents x[T, n,
// C] and the low rank du[1, T, M] -> terms[S, n C, M]. A threadgroup takes a share of the tokens,
// 32 channels of one stream in each simdgroup, and a share of the columns, COLUMN_TILES tiles at a
// time.

#pragma once

#include "../common/floats.h"
#include "../common/position.h"
#include "../common/project/dphi_sums.h"
#include "../common/project/layout.h"
#include "../common/project/load_within.h"
#include "../common/project/store_within.h"
#include "dialect/lanes.h"
#include "dialect/operands.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int COLUMN_TILES, int STAGE_STEPS>
struct gated_dfactors_memory {
    enum { operands = STAGE_STEPS * B_FRAGMENTS(COLUMN_TILES) * SIMD };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <bool OF_UP, typename X, typename Norm, typename Terms>
FUNCTION bool gated_dfactors_aligned(X x, int x_shape_2, Norm norm, Terms terms) {
    return x_shape_2 % STEP_CHANNELS == 0 && vectors<4>(x) &&
           (OF_UP || (vectors<4>(norm) && vectors<4>(terms)));
}

template <typename ACCESS, int N, int COLUMN_TILES, int AHEAD, int STAGE_STEPS, bool OF_UP,
          typename X, typename Norm, typename Du, typename Terms>
FUNCTION void gated_dfactors(X x, int64_t x_shape_0, int x_shape_2, Norm norm, Du du,
                             int du_shape_2, Terms terms, threadgroup uint4* operands,
                             Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2, M = du_shape_2;
    const int64_t K = int64_t(N) * C;

    const int lane = here.id % SIMD, simdgroup = here.id / SIMD, simdgroups = here.threads / SIMD;
    const int each = (C + STEP_CHANNELS * simdgroups - 1) / (STEP_CHANNELS * simdgroups);
    const int group = int(here.group_x % (N * each)), i = group / each;
    const int c = (group % each * simdgroups + simdgroup) * STEP_CHANNELS;  // may be beyond C
    const int64_t at = int64_t(i) * C + c + 4 * tile_row(lane);
    const int64_t own = here.group_x / (N * each), begin = own * STAGE_STEPS * SIMD;
    const int64_t iteration =
        here.groups_x / (N * each) * STAGE_STEPS * SIMD;  // all shares, side by side
    enum { COLUMNS = COLUMN_TILES * TILE_COLUMNS };

    for (int column = int(here.group_y) * COLUMNS; column < M;
         column += int(here.groups_y) * COLUMNS) {
        const auto sums = dphi_sums<COLUMN_TILES, AHEAD, STAGE_STEPS>(
            ACCESS::at(x) + at, K, C - c - 4 * tile_row(lane), du + (OF_UP ? 0 : i * T * M), M,
            column, begin, T, iteration, operands, here);
        UNROLL for (int tile = 0; tile < COLUMN_TILES; tile++) {
            UNROLL for (int j = 0; j < 2; j++) {
                const int to = column + tile * TILE_COLUMNS + sum_column(lane, j);
                const int channel = c + 4 * sum_row(lane, j), rest = to < M ? C - channel : 0;
                const int64_t k = int64_t(i) * C + channel;
                Floats<4> out = channels_of(sums, tile, j);
                if (OF_UP) {
                    UNROLL for (int e = 0; e < 4; e++)
                        if (e < rest) terms[(own * K + k + e) * M + to] = out.at[e];
                } else {
                    out = plus(out, product(load_within<4>(ACCESS::at(norm) + k, rest), out));
                    store_within(ACCESS::at(terms) + (own * M + to) * K + k, out, rest);
                }
            }
        }
    }
}
