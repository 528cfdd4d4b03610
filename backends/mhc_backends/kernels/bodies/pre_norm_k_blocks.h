// pre_norm_k_blocks: `pre_norm` for the fewest tokens, from the sums of K blocks, blocks[T, B,
// WIDTH] (k_block_sums.h). n is at most 4.
//
// x[T, n, C], given[T or 1, n], scale[3], bias[m], h_norm_weight[C] -> y[T, C], h_pre[T, n],
// h_post[T, n], h_res[T, n, n]; if RAW, h[T, C]; and, for the vjp if SAVES, u[T, m] and r[T, 1].
// Unless it MIXES, there is no h_res, m is 2 n and scale has 2 entries. A threadgroup takes whole
// tokens; registers are used as in pre_norm. Every simdgroup makes the
// mappings by itself, a number in each lane; the last one makes H_res. SPLITS splits are added at a
// time.

#pragma once

#include "../common/activate.h"
#include "../common/channels.h"
#include "../common/floats.h"
#include "../common/kept_h.h"
#include "../common/mixed_token.h"
#include "../common/norm.h"
#include "../common/optional.h"
#include "../common/position.h"
#include "../common/project/k_block_sums.h"
#include "../common/streams.h"
#include "../common/sums_for_all.h"
#include "dialect/simd.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int N, bool MIXES, int SPLITS>
struct pre_norm_k_blocks_memory {
    enum { sums = SPLITS * (MIXES * N * N + 2 * N + 1), shared = 2 * MOST_SIMDGROUPS };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int N, int W, bool MIXES, bool RAW, typename X, typename Blocks, typename Weight,
          typename Y, typename H, typename HRes>
FUNCTION bool pre_norm_k_blocks_aligned(X x, Blocks blocks, Weight h_norm_weight, Y y, H h,
                                        HRes h_res) {
    return vectors<W>(x) && vectors<4>(blocks) && vectors<W>(h_norm_weight) && vectors<W>(y) &&
           Optional<RAW, W>::by_vectors(h) && Optional<MIXES, N>::by_vectors(h_res);
}

template <typename ACCESS, int N, int W, bool MIXES, int HELD, bool REST, int BLOCKS, int SPLITS,
          bool GIVEN, bool RAW, bool SAVES, int ITERATIONS, bool LOG, bool FIRST_COLUMNS,
          bool TRANSPOSED, bool EXP_START, bool CLAMPED, typename X, typename Blocks,
          typename Scale, typename Bias, typename Given, typename Weight, typename Y, typename HPre,
          typename HPost, typename HRes, typename H, typename U, typename R>
FUNCTION void pre_norm_k_blocks(X x, int x_shape_2, Blocks blocks, int64_t blocks_shape_0,
                                int blocks_shape_1, Scale scale, Bias bias, Given given,
                                int given_shape_0, Weight h_norm_weight, Y y, HPre h_pre,
                                HPost h_post, HRes h_res, H h, U u, R r, float norm_eps,
                                float pre_eps, float post_scale, float post_eps, float sinkhorn_eps,
                                float clamp_low, float clamp_high, float h_norm_eps,
                                threadgroup float* sums, threadgroup float* shared, Position here) {
    const int64_t T = blocks_shape_0;
    const int C = x_shape_2, count = blocks_shape_1;
    enum { M = (MIXES ? N * N : 0) + 2 * N, WIDTH = BlockSums<M>::WIDTH };

    const int own = first_channel<W>(here), step = next_channel<W>(here);
    const int rest = REST ? own + HELD * step : C;
    int buffer = 0;  // tokens take turns with the halves of `shared`
    const int lane = here.id % SIMD, column = lane < M ? lane : M;
    const int group = column_group<N>(column);
    const float factor = column < M ? float(scale[group]) : 0.0f;
    const float shift = column < M ? float(bias[column]) : 0.0f;

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const auto from = ACCESS::at(x) + token * N * C;
        const auto to = ACCESS::at(y) + token * C;
        auto coming = load_raw_streams<N, W>(from, C, own);  // in flight while the sums are added
        float weights[N];
        UNROLL for (int i = 0; i < N; i++)
            weights[i] = GIVEN ? float(given[row(given_shape_0, token) * N + i]) : 0.0f;

        const float total = sum_all_splits<M, BLOCKS, SPLITS>(
            ACCESS::at(blocks) + token * count * WIDTH, count, column, sums, here);
        const float inverse = inverse_rms(simd_from(total, M), float(N) * C, norm_eps);
        const float mapped =
            activated(group, total, inverse, factor, shift, pre_eps, post_scale, post_eps);
        UNROLL for (int i = 0; i < N; i++) {
            const float weight = simd_from(mapped, i);
            if (!GIVEN) weights[i] = weight;
        }

        const auto kept = keep_h<HELD, N, W>(from, coming, weights, C, own, step, rest);
        const Floats<1> squares =
            sums_for_all(kept.squares, shared + buffer * MOST_SIMDGROUPS, here);
        buffer = 1 - buffer;
        const float inverse_h = inverse_rms(squares.at[0], float(C), h_norm_eps);

        store_normed<RAW, N>(kept, inverse_h, from, weights, ACCESS::at(h_norm_weight), to,
                             ACCESS::at(h) + token * C, C, own, step, rest);

        if (here.id / SIMD == here.threads / SIMD - 1) {
            if (SAVES && lane < M) u[token * M + lane] = total;
            if (SAVES && lane == 0) r[token] = inverse;
            if (lane < N) h_pre[token * N + lane] = mapped;
            if (lane >= N && lane < 2 * N) h_post[token * N + lane - N] = mapped;
            MixedToken<MIXES, N, ITERATIONS, LOG, FIRST_COLUMNS, TRANSPOSED, EXP_START,
                       CLAMPED>::mix(mapped, sinkhorn_eps, clamp_low, clamp_high,
                                     ACCESS::at(h_res) + token * N * N, here);
        }
    }
}
