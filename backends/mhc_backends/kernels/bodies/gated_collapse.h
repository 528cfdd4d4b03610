// gated_collapse: the streams collapsed by gates for each channel: h = mean_i sigmoid(z_i) u_i with
// z = low @ up.T and u_i = x_i r_i (1 + norm_i). Neither z nor u is written.
//
// x[T, n, C], norm[n C], up[n C, R], low[T, R], r[T, n] -> h[T, C]. A threadgroup takes 16 tokens and
// COLUMN_TILES tiles of channels. Each of its simdgroups takes a stream at a time, whose gated
// numbers go through threadgroup memory, where they are added in the order of the streams.

#pragma once

#include "../common/floats.h"
#include "../common/position.h"
#include "../common/project/gate_logits.h"
#include "../common/project/layout.h"
#include "../common/project/load_within.h"
#include "../common/sigmoid.h"
#include "../common/store_one.h"
#include "dialect/lanes.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int COLUMN_TILES>
struct gated_collapse_memory {
    enum { gated = (GATED_STREAMS + 1) * TILE_TOKENS * COLUMN_TILES * TILE_COLUMNS };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int COLUMN_TILES, typename X, typename Norm, typename Up, typename Low>
FUNCTION bool gated_collapse_aligned(X x, int x_shape_2, Norm norm, Up up, int up_shape_1,
                                     Low low) {
    return x_shape_2 % COLUMN_TILES == 0 && up_shape_1 % STEP_CHANNELS == 0 &&
           vectors<COLUMN_TILES>(x) && vectors<COLUMN_TILES>(norm) && vectors<4>(up) &&
           vectors<8>(low);
}

template <typename ACCESS, int N, int COLUMN_TILES, typename X, typename Norm, typename Up,
          typename Low, typename R, typename H>
FUNCTION void gated_collapse(X x, int64_t x_shape_0, int x_shape_2, Norm norm, Up up,
                             int up_shape_1, Low low, R r, H h, threadgroup float* gated,
                             Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2, RANK = up_shape_1;
    enum { COLUMNS = COLUMN_TILES * TILE_COLUMNS, NUMBERS = TILE_TOKENS * COLUMNS };

    const int lane = here.id % SIMD, simdgroup = here.id / SIMD, simdgroups = here.threads / SIMD;
    const int64_t tiles = (T + TILE_TOKENS - 1) / TILE_TOKENS;
    const auto totals = &gated[GATED_STREAMS * NUMBERS];

    // the threadgroups of the same channels are neighbours, so that they find up in the cache
    for (int64_t item = here.group_x; item < tiles * ((C + COLUMNS - 1) / COLUMNS);
         item += here.groups_x) {
        const int64_t first = item % tiles * TILE_TOKENS;
        const int begin = int(item / tiles) * COLUMNS;  // of the channels
        const int tokens = T - first < TILE_TOKENS ? int(T - first) : TILE_TOKENS;

        for (int done = 0; done < N; done += simdgroups) {
            const int i = done + simdgroup;
            if (i < N) {
                const int64_t stream = int64_t(i) * C;
                const auto z =
                    gate_logits<COLUMN_TILES>(ACCESS::at(low), ACCESS::at(up) + stream * RANK,
                                              first, T, RANK, C, begin, lane);
                UNROLL for (int k = 0; k < 4; k++) {
                    const int row = 8 * (k / 2) + sum_row(lane, k % 2);
                    const int own = COLUMN_TILES * sum_column(lane, k % 2), c = begin + own;
                    if (row < tokens) {
                        const int64_t token = first + row;
                        const float inverse = r[token * N + i];
                        const Floats<COLUMN_TILES> v = load_within<COLUMN_TILES>(
                            ACCESS::at(x) + token * N * C + stream + c, C - c);
                        const Floats<COLUMN_TILES> weight =
                            load_within<COLUMN_TILES>(ACCESS::at(norm) + stream + c, C - c);
                        UNROLL for (int tile = 0; tile < COLUMN_TILES; tile++)
                            gated[simdgroup * NUMBERS + row * COLUMNS + own + tile] =
                                sigmoid(z.at[0].tile[tile].in_half[k / 2].at[k % 2]) *
                                (v.at[tile] * inverse * (1.0f + weight.at[tile]));
                    }
                }
            }
            BARRIER;
            for (int at = here.id; at < tokens * COLUMNS; at += here.threads) {
                float sum = done == 0 ? 0.0f : totals[at];
                for (int s = 0; s < simdgroups && done + s < N; s++) sum += gated[s * NUMBERS + at];
                totals[at] = sum;
                const int c = begin + at % COLUMNS;
                if (done + simdgroups >= N && c < C)
                    store_one(h + (first + at / COLUMNS) * C + c, sum / float(N));
            }
            BARRIER;  // the next streams use the memory again
        }
    }
}
