// gated_collapse_vjp: the cotangent of the gates' logits, dz_i = e_i (1 - gate_i) with
// e_i = (g / n) gate_i u_i, gate_i = sigmoid(low @ up_i.T) and u_i = x_i r_i (1 + norm_i). Neither
// the gates nor u is written.
//
// x[T, n, C], norm[n C], up[n C, R], low[T, R], r[T, n], g[T, C] -> dz[T, n, C] in float32, and
// sums[T, n, P], the sums of e over tiles of channels, of which gated_low_vjp makes the cotangent of
// r. A threadgroup takes 16 tokens and COLUMN_TILES tiles of channels; each of its simdgroups takes a
// stream at a time.

#pragma once

#include "../common/floats.h"
#include "../common/load.h"
#include "../common/position.h"
#include "../common/project/gate_logits.h"
#include "../common/project/layout.h"
#include "../common/project/load_within.h"
#include "../common/project/store_within.h"
#include "../common/sigmoid.h"
#include "dialect/lanes.h"
#include "dialect/sync.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
struct gated_collapse_vjp_memory {
    enum { shared = GATED_STREAMS * TILE_TOKENS * TILE_COLUMNS };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int COLUMN_TILES, typename X, typename Norm, typename Up, typename Low, typename G,
          typename Dz>
FUNCTION bool gated_collapse_vjp_aligned(X x, int x_shape_2, Norm norm, Up up, int up_shape_1,
                                         Low low, G g, Dz dz) {
    return x_shape_2 % COLUMN_TILES == 0 && up_shape_1 % STEP_CHANNELS == 0 &&
           vectors<COLUMN_TILES>(x) && vectors<COLUMN_TILES>(norm) && vectors<4>(up) &&
           vectors<8>(low) && vectors<COLUMN_TILES>(g) && vectors<COLUMN_TILES>(dz);
}

template <typename ACCESS, int N, int COLUMN_TILES, typename X, typename Norm, typename Up,
          typename Low, typename R, typename G, typename Dz, typename S>
FUNCTION void gated_collapse_vjp(X x, int64_t x_shape_0, int x_shape_2, Norm norm, Up up,
                                 int up_shape_1, Low low, R r, G g, Dz dz, S sums,
                                 threadgroup float* shared, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2, RANK = up_shape_1;
    enum { COLUMNS = COLUMN_TILES * TILE_COLUMNS };

    const int lane = here.id % SIMD, simdgroup = here.id / SIMD, simdgroups = here.threads / SIMD;
    const int64_t tiles = (T + TILE_TOKENS - 1) / TILE_TOKENS;
    const int parts = (C + COLUMNS - 1) / COLUMNS;
    const auto own = &shared[simdgroup * TILE_TOKENS * TILE_COLUMNS];

    // the threadgroups of the same channels are neighbours, so that they find up in the cache
    for (int64_t item = here.group_x; item < tiles * parts; item += here.groups_x) {
        const int64_t first = item % tiles * TILE_TOKENS;
        const int part = int(item / tiles), begin = part * COLUMNS;  // of the channels
        const int tokens = T - first < TILE_TOKENS ? int(T - first) : TILE_TOKENS;

        for (int i = simdgroup; i < N; i += simdgroups) {
            const int64_t stream = int64_t(i) * C;
            const auto z = gate_logits<COLUMN_TILES>(
                ACCESS::at(low), ACCESS::at(up) + stream * RANK, first, T, RANK, C, begin, lane);
            UNROLL for (int k = 0; k < 4; k++) {
                const int row = 8 * (k / 2) + sum_row(lane, k % 2),
                          column = sum_column(lane, k % 2);
                const int c = begin + COLUMN_TILES * column;
                float sum = 0.0f;
                if (row < tokens) {
                    const int64_t token = first + row, at = token * N * C + stream + c;
                    const float inverse = r[token * N + i];
                    const auto v = load_within<COLUMN_TILES>(ACCESS::at(x) + at, C - c);
                    const auto weight =
                        load_within<COLUMN_TILES>(ACCESS::at(norm) + stream + c, C - c);
                    Floats<COLUMN_TILES> d =
                        load_within<COLUMN_TILES>(ACCESS::at(g) + token * C + c, C - c);
                    UNROLL for (int tile = 0; tile < COLUMN_TILES; tile++) {
                        const float gate = sigmoid(z.at[0].tile[tile].in_half[k / 2].at[k % 2]);
                        const float u = v.at[tile] * inverse * (1.0f + weight.at[tile]);
                        const float e = d.at[tile] / float(N) * gate * u;
                        sum += e;
                        d.at[tile] = e * (1.0f - gate);
                    }
                    store_within(ACCESS::at(dz) + at, d, C - c);
                }
                own[row * TILE_COLUMNS + column] = sum;
            }
            SIMD_BARRIER;
            if (lane < tokens) {
                float sum = 0.0f;
                UNROLL for (int column = 0; column < TILE_COLUMNS; column++)
                    sum += own[lane * TILE_COLUMNS + column];
                sums[((first + lane) * N + i) * parts + part] = sum;
            }
            SIMD_BARRIER;  // the next stream uses the memory again
        }
    }
}
