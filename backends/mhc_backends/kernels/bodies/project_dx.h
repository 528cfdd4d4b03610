// project_dx: the streams' gradient through the projection, dx = du . phi - pull x. WITH_H adds w_i
// dh, the gradient through h = sum_i w_i x_i; WITH_G adds g, another gradient of the streams.
//
// x[T, n, C], phi[m, n C], du[T, m], pull[T, 1] in units of pull_unit(), w[T or 1, n], dh[T, C],
// g[T, n, C] -> dx[T, n, C]. A threadgroup takes a share of the tokens and some N tiles (64
// channels of all streams if n = 4); a simdgroup takes one N tile, 32 channels of one stream. If m
// <= 32, the simdgroup keeps phi in registers, and du goes through threadgroup memory.

#pragma once

#include "../common/channels.h"
#include "../common/floats.h"
#include "../common/fragments.h"
#include "../common/load.h"
#include "../common/position.h"
#include "../common/project/dx.h"
#include "../common/project/layout.h"
#include "../common/project/mix.h"
#include "../common/project/n_tiles.h"
#include "../common/project/raw_within.h"
#include "../common/pull.h"
#include "../common/raw.h"
#include "../common/store_raw.h"
#include "dialect/lanes.h"
#include "dialect/mma.h"
#include "dialect/sync.h"
#include "dialect/unroll.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int COLUMNS>
struct project_dx_memory {
    enum {
        DEPTHS = (COLUMNS + DEPTH - 1) / DEPTH,
        KEPT = DEPTHS <= 4,
        STAGE_TILES = 4,  // of tokens, at a time
        operands = KEPT ? STAGE_TILES * DEPTHS * A_FRAGMENTS * SIMD : 1,
    };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <bool WITH_H, bool WITH_G, typename X, typename Phi, typename Dh, typename G, typename Dx>
FUNCTION bool project_dx_aligned(X x, int x_shape_2, Phi phi, Dh dh, G g, Dx dx) {
    return x_shape_2 % STEP_CHANNELS == 0 && vectors<8>(x) && vectors<4>(phi) && vectors<8>(dx) &&
           (!WITH_H || vectors<8>(dh)) && (!WITH_G || vectors<8>(g));
}

template <typename ACCESS, int N, int COLUMNS, bool WITH_H, bool WITH_G, typename X, typename Phi,
          typename Du, typename Pull, typename Weights, typename Dh, typename G, typename Dx>
FUNCTION void project_dx(X x, int64_t x_shape_0, int x_shape_2, Phi phi, Du du, Pull pull,
                         Weights w, int w_shape_0, Dh dh, G g, Dx dx, threadgroup uint4* operands,
                         Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;
    const int64_t K = int64_t(N) * C;
    typedef project_dx_memory<COLUMNS> Memory;
    const int M = COLUMNS, DEPTHS = Memory::DEPTHS, STAGE_TILES = Memory::STAGE_TILES;
    const bool KEPT = Memory::KEPT;

    const int lane = here.id % SIMD, simdgroup = here.id / SIMD, simdgroups = here.threads / SIMD;
    const int channel = 4 * tile_pair(lane), OPERAND = A_FRAGMENTS * SIMD;
    const int n_tiles = n_tile_count<N>(C, simdgroups);
    const int n_tile = int(here.group_x % n_tiles) * simdgroups + simdgroup;
    const int i = n_tile_stream<N>(n_tile),
              c = n_tile_channel<N>(n_tile);  // from C on there is nothing
    const int rest = C - c - channel;
    const int64_t at = int64_t(i) * C + c;
    const int64_t tiles = (T + TILE_TOKENS - 1) / TILE_TOKENS;
    const int64_t iteration = here.groups_x / n_tiles * STAGE_TILES;  // all shares, side by side

    KeptPhi<KEPT ? DEPTHS : 1> kept;
    UNROLL for (int depth = 0; depth < (KEPT ? DEPTHS : 0); depth++)
        kept.at[depth] = load_phi_fragments(ACCESS::at(phi), K, M, depth * DEPTH, at, C - c, lane);

    for (int64_t stage = here.group_x / n_tiles * STAGE_TILES; stage < tiles; stage += iteration) {
        if (KEPT) {
            BARRIER;  // the stage before is done
            for (int buffer = simdgroup; buffer < STAGE_TILES * DEPTHS; buffer += simdgroups) {
                const int64_t upper = (stage + buffer / DEPTHS) * TILE_TOKENS + tile_row(lane);
                const AFragment a = load_a_fragment(du, M, buffer % DEPTHS * DEPTH, upper, T, lane);
                UNROLL for (int k = 0; k < A_FRAGMENTS; k++)
                    operands[buffer * OPERAND + k * SIMD + lane] = a.frag[k];
            }
            BARRIER;
        }
        for (int64_t tile = stage; tile < stage + STAGE_TILES && tile < tiles && c < C; tile++) {
            const int64_t first = tile * TILE_TOKENS + tile_row(lane);
            const int64_t tokens[2] = {first < T ? first : T - 1,
                                       first + 8 < T ? first + 8 : T - 1};

            // all loads of the tile are in flight before the first is waited for
            decltype(load_raw<8>(ACCESS::at(x))) xs[2];
            decltype(load_raw<8>(ACCESS::at(dh))) layers[2];
            decltype(load_raw<8>(ACCESS::at(g))) gs[2];
            float pulls[2], weights[2];
            UNROLL for (int r = 0; r < 2; r++) {
                const int64_t from = tokens[r] * K + at + channel;
                xs[r] = load_raw_within<8>(ACCESS::at(x) + from, rest);
                if (WITH_H)
                    layers[r] =
                        load_raw_within<8>(ACCESS::at(dh) + tokens[r] * C + c + channel, rest);
                if (WITH_G) gs[r] = load_raw_within<8>(ACCESS::at(g) + from, rest);
                pulls[r] = pull[tokens[r]];
                if (WITH_H) weights[r] = float(w[row(w_shape_0, tokens[r]) * N + i]);
            }

            Floats<4> products[4];
            UNROLL for (int t = 0; t < 4; t++)
                products[t] = zeros<4>();
            UNROLL_FEW(DEPTHS) for (int depth = 0; depth < DEPTHS; depth++) {
                if (KEPT) {
                    const auto shared =
                        &operands[int(tile - stage) * DEPTHS * OPERAND + depth * OPERAND];
                    AFragment a;
                    UNROLL for (int k = 0; k < A_FRAGMENTS; k++)
                        a.frag[k] = shared[k * SIMD + lane];
                    TOGETHER;
                    UNROLL for (int t = 0; t < 4; t++)
                        products[t] = multiply(products[t], a, kept.at[KEPT ? depth : 0].at[t]);
                } else {  // long sums in pieces, because tensor cores truncate what they add
                    const int column = depth * DEPTH;
                    const AFragment a = load_a_fragment(du, M, column, first, T, lane);
                    const PhiFragments b =
                        load_phi_fragments(ACCESS::at(phi), K, M, column, at, C - c, lane);
                    TOGETHER;
                    UNROLL for (int t = 0; t < 4; t++)
                        products[t] = plus(products[t], multiply(zeros<4>(), a, b.at[t]));
                }
            }

            UNROLL for (int r = 0; r < 2; r++) {
                Floats<8> sum;
                UNROLL for (int k = 0; k < 8; k++)
                    sum.at[k] = products[k % 4].at[2 * r + k / 4];
                sum = add(sum, -pulls[r], times(pull_unit(), floats(xs[r])));
                if (WITH_H) sum = add(sum, weights[r], floats(layers[r]));
                if (WITH_G) sum = plus(sum, floats(gs[r]));
                const auto to = ACCESS::at(dx) + tokens[r] * K + at + channel;
                if (first + 8 * r < T) store_raw_within(to, packed(ACCESS::at(dx), sum), rest);
            }
        }
    }
}
