// gated_dx: the gradient of the streams that are normalised and gated. With u_i = x_i r_i (1 +
// norm_i): du_i = (g / n) gate_i + dz @ (down, inject)_i, and dx_i = r_i (du_i (1 + norm_i) -
// x_i r_i pulled_i / C), where pulled_i is u_i . du_i. Neither u nor du is written.
//
// x[T, n, C], norm[n C], up[n C, R], low[T, R], r[T, n], g[T, C], down[R, n C], inject[n, n C],
// dz[T, D] as gated_low_vjp has it, pulled[T, n] -> dx[T, n, C], dnorm[P, n C], the sums of
// du x r of each 16 tokens. A threadgroup takes 16 tokens and 4 tiles of channels, one for each lane;
// each of its simdgroups takes a stream at a time.

#pragma once

#include "../common/floats.h"
#include "../common/load.h"
#include "../common/operands.h"
#include "../common/position.h"
#include "../common/project/accumulate.h"
#include "../common/project/adjacent_columns.h"
#include "../common/project/gate_logits.h"
#include "../common/project/k_blocks.h"
#include "../common/project/layout.h"
#include "../common/project/load_within.h"
#include "../common/project/phi_registers.h"
#include "../common/project/staged.h"
#include "../common/project/starts.h"
#include "../common/project/store_within.h"
#include "../common/sigmoid.h"
#include "dialect/lanes.h"
#include "dialect/operands.h"
#include "dialect/sync.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int COLUMN_TILES>
struct gated_dx_memory {
    enum { shared = GATED_STREAMS * 8 * COLUMN_TILES * TILE_COLUMNS };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int COLUMN_TILES, bool INJECTS, typename X, typename Norm, typename Up, typename Low,
          typename G, typename Down, typename Inject, typename Dz, typename Dx>
FUNCTION bool gated_dx_aligned(X x, int x_shape_2, Norm norm, Up up, int up_shape_1, Low low, G g,
                               Down down, Inject inject, Dz dz, Dx dx) {
    return x_shape_2 % COLUMN_TILES == 0 && up_shape_1 % STEP_CHANNELS == 0 &&
           vectors<COLUMN_TILES>(x) && vectors<COLUMN_TILES>(norm) && vectors<4>(up) &&
           vectors<8>(low) && vectors<COLUMN_TILES>(g) && vectors<COLUMN_TILES>(down) &&
           (!INJECTS || vectors<COLUMN_TILES>(inject)) && vectors<8>(dz) &&
           vectors<COLUMN_TILES>(dx);
}

template <typename ACCESS, int N, int COLUMN_TILES, bool INJECTS, typename X, typename Norm,
          typename Up, typename Low, typename R, typename G, typename Down, typename Inject,
          typename Dz, typename Pulled, typename Dx, typename Dnorm>
FUNCTION void gated_dx(X x, int64_t x_shape_0, int x_shape_2, Norm norm, Up up, int up_shape_1,
                       Low low, R r, G g, Down down, Inject inject, Dz dz, int dz_shape_1,
                       Pulled pulled, Dx dx, Dnorm dnorm, threadgroup float* shared,
                       Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2, RANK = up_shape_1, D = dz_shape_1;
    const int64_t K = int64_t(N) * C;
    enum { COLUMNS = COLUMN_TILES * TILE_COLUMNS };

    typedef decltype(load_raw<8>(ACCESS::at(dz))) Row;
    typedef decltype(b_operand_for(Row(), BTiles<COLUMN_TILES>())) Operand;
    const int lane = here.id % SIMD, simdgroup = here.id / SIMD, number = 4 * tile_pair(lane);
    const int simdgroups = here.threads / SIMD;
    const int injected = (RANK + STEP_CHANNELS - 1) / STEP_CHANNELS * STEP_CHANNELS;
    const int64_t tiles = (T + TILE_TOKENS - 1) / TILE_TOKENS;
    const auto own = &shared[simdgroup * 8 * COLUMNS];

    // the threadgroups of the same channels are neighbours, so that they find up in the cache
    for (int64_t item = here.group_x; item < tiles * ((C + COLUMNS - 1) / COLUMNS);
         item += here.groups_x) {
        const int64_t tile_of_tokens = item % tiles, first = tile_of_tokens * TILE_TOKENS;
        const int begin = int(item / tiles) * COLUMNS;  // of the channels
        const int tokens = T - first < TILE_TOKENS ? int(T - first) : TILE_TOKENS;
        const auto starts = starts_of<1>(ACCESS::at(dz) + number, first, T, D, lane);

        for (int i = simdgroup; i < N; i += simdgroups) {
            const int64_t stream = int64_t(i) * C;
            const auto z = gate_logits<COLUMN_TILES>(
                ACCESS::at(low), ACCESS::at(up) + stream * RANK, first, T, RANK, C, begin, lane);
            auto through = zero_accumulators<COLUMN_TILES, 1>();  // the products
            for (int at = 0; at < D; at += STEP_CHANNELS) {
                const auto rows = load_steps<1>(starts, at, D - at - number);
                const auto numbers =
                    INJECTS && at >= injected
                        ? load_adjacent_columns<COLUMN_TILES>(ACCESS::at(inject), K, N,
                                                              at - injected, stream + begin,
                                                              C - begin, lane)
                        : load_adjacent_columns<COLUMN_TILES>(ACCESS::at(down), K, RANK, at,
                                                              stream + begin, C - begin, lane);
                BOperands<Operand, 1> operands;
                operands.at[0] = b_operand_for(Row(), numbers);
                TOGETHER;
                through = plus(through, multiply<COLUMN_TILES>(rows, operands));
            }
            UNROLL for (int j = 0; j < 2; j++) {
                const int from = COLUMN_TILES * sum_column(lane, j), c = begin + from;
                Floats<COLUMN_TILES> terms = zeros<COLUMN_TILES>();  // of dnorm
                UNROLL for (int h = 0; h < 2; h++) {
                    const int row = 8 * h + sum_row(lane, j);
                    if (row < tokens) {
                        const int64_t token = first + row, at = token * K + stream + c;
                        const float inverse = r[token * N + i];
                        const float pull = pulled[token * N + i] / float(C);
                        const auto v = load_within<COLUMN_TILES>(ACCESS::at(x) + at, C - c);
                        const auto weight =
                            load_within<COLUMN_TILES>(ACCESS::at(norm) + stream + c, C - c);
                        Floats<COLUMN_TILES> d =
                            load_within<COLUMN_TILES>(ACCESS::at(g) + token * C + c, C - c);
                        UNROLL for (int tile = 0; tile < COLUMN_TILES; tile++) {
                            const float gate = sigmoid(z.at[0].tile[tile].in_half[h].at[j]);
                            const float du = d.at[tile] / float(N) * gate +
                                             through.at[0].tile[tile].in_half[h].at[j];
                            const float scaled = v.at[tile] * inverse;
                            terms.at[tile] = fma(du, scaled, terms.at[tile]);
                            d.at[tile] = inverse * (du * (1.0f + weight.at[tile]) - scaled * pull);
                        }
                        store_within(ACCESS::at(dx) + at, d, C - c);
                    }
                }
                UNROLL for (int tile = 0; tile < COLUMN_TILES; tile++)
                    own[sum_row(lane, j) * COLUMNS + from + tile] = terms.at[tile];
            }
            SIMD_BARRIER;
            if (begin + lane < C) {  // a lane for each of the COLUMNS
                float sum = 0.0f;
                UNROLL for (int row = 0; row < 8; row++)
                    sum += own[row * COLUMNS + lane];
                dnorm[tile_of_tokens * K + stream + begin + lane] = sum;
            }
            SIMD_BARRIER;  // the next stream uses the memory again
        }
    }
}
