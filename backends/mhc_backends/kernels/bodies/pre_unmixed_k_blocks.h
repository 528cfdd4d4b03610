// pre_unmixed_k_blocks: `pre_unmixed` for the fewest tokens, from the sums of K blocks, blocks[T, B,
// WIDTH] (k_block_sums.h). n is at most 4.
//
// x[T, n, C], given[T or 1, n], scale[2], bias[2 n] -> h[T, C], h_pre[T, n], h_post[T, n] and, for
// the vjp if SAVES, u[T, 2 n] and r[T, 1]. A threadgroup takes a token, or some of its channels:
// then each threadgroup of the token adds up its sums, and the first one stores the mappings. Every
// simdgroup makes the mappings by itself, a number in each lane. SPLITS splits are added at a time.

#pragma once

#include "../common/activate.h"
#include "../common/channels.h"
#include "../common/collapse.h"
#include "../common/floats.h"
#include "../common/norm.h"
#include "../common/position.h"
#include "../common/project/k_block_sums.h"
#include "../common/raw.h"
#include "../common/store.h"
#include "../common/streams.h"
#include "dialect/simd.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int N, int SPLITS>
struct pre_unmixed_k_blocks_memory {
    enum { sums = SPLITS * (2 * N + 1) };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int W, typename X, typename Blocks, typename H>
FUNCTION bool pre_unmixed_k_blocks_aligned(X x, Blocks blocks, H h) {
    return vectors<W>(x) && vectors<4>(blocks) && vectors<W>(h);
}

template <typename ACCESS, int N, int W, int BLOCKS, int SPLITS, bool GIVEN, bool SAVES, typename X,
          typename Blocks, typename Scale, typename Bias, typename Given, typename H, typename HPre,
          typename HPost, typename U, typename R>
FUNCTION void pre_unmixed_k_blocks(X x, int x_shape_2, Blocks blocks, int64_t blocks_shape_0,
                                   int blocks_shape_1, Scale scale, Bias bias, Given given,
                                   int given_shape_0, H h, HPre h_pre, HPost h_post, U u, R r,
                                   float norm_eps, float pre_eps, float post_scale, float post_eps,
                                   threadgroup float* sums, Position here) {
    const int64_t T = blocks_shape_0;
    const int C = x_shape_2, count = blocks_shape_1;
    enum { M = 2 * N, WIDTH = BlockSums<M>::WIDTH };

    const int own = first_channel<W>(here), step = next_channel<W>(here);
    const int lane = here.id % SIMD, column = lane < M ? lane : M, group = column / N;
    const float factor = column < M ? float(scale[group]) : 0.0f;
    const float shift = column < M ? float(bias[column]) : 0.0f;

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        auto coming = load_raw_streams<N, W>(ACCESS::at(x) + token * N * C, C,
                                             own);  // in flight while the sums are added
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
        for (int c = own; c < C; c += step) {
            const auto streams = coming;
            coming = load_raw_streams<N, W>(ACCESS::at(x) + token * N * C, C, c + step);
            store(ACCESS::at(h) + token * C + c, collapse(weights, floats(streams)));
        }

        if (here.group_y == 0 && here.id < SIMD) {
            if (SAVES && lane < M) u[token * M + lane] = total;
            if (SAVES && lane == 0) r[token] = inverse;
            if (lane < N) h_pre[token * N + lane] = mapped;
            if (lane >= N && lane < M) h_post[token * N + lane - N] = mapped;
        }
    }
}
