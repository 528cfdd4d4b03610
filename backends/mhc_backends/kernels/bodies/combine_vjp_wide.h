// The vjp of combine for any n, in one pass over the streams; formulas and arrays as in
// combine_vjp. A threadgroup takes whole tokens. It keeps TILE channels of all streams at a time in
// threadgroup memory; each of the n + n * n sums belongs to one thread.

#pragma once

#include "../common/channels.h"
#include "../common/position.h"
#include "../common/store_one.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int N>
struct combine_vjp_wide_memory {
    enum {
        TILE = 32,
        xs = N * TILE,  // x_j[c] at j * TILE + c
        gs = N * TILE,
        ys = TILE,
        post = N,
        res = N * N,
        sums = N + N * N,
    };
};

template <int N, typename X, typename Y, typename HPost, typename HRes, typename G, typename Dx,
          typename Dy, typename DhPost, typename DhRes>
FUNCTION void combine_vjp_wide(X x, int64_t x_shape_0, int x_shape_2, Y y, HPost h_post,
                               int h_post_shape_0, HRes h_res, int h_res_shape_0, G g, Dx dx, Dy dy,
                               DhPost dh_post, DhRes dh_res, threadgroup float* xs,
                               threadgroup float* gs, threadgroup float* ys,
                               threadgroup float* post, threadgroup float* res,
                               threadgroup float* sums, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;
    const int TILE = combine_vjp_wide_memory<N>::TILE;
    const int SUMS = N + N * N;  // dh_post, then dH_res
    const int first = here.id, step = here.threads;

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const int64_t streams = token * N * C;
        const auto token_post = h_post + row(h_post_shape_0, token) * N;
        const auto token_res = h_res + row(h_res_shape_0, token) * N * N;
        for (int k = first; k < N; k += step) post[k] = float(token_post[k]);
        for (int k = first; k < N * N; k += step) res[k] = float(token_res[k]);
        for (int k = first; k < SUMS; k += step) sums[k] = 0.0f;

        for (int tile = 0; tile < C; tile += TILE) {
            // the tile, with zeros beyond C
            for (int k = first; k < N * TILE; k += step) {
                const int c = tile + k % TILE;
                const int64_t at = streams + int64_t(k / TILE) * C + c;
                xs[k] = c < C ? float(x[at]) : 0.0f;
                gs[k] = c < C ? float(g[at]) : 0.0f;
            }
            for (int k = first; k < TILE; k += step)
                ys[k] = tile + k < C ? float(y[token * C + tile + k]) : 0.0f;
            BARRIER;

            // dx_j = sum_i H_res[i, j] g_i
            for (int k = first; k < N * TILE; k += step) {
                const int j = k / TILE, c = k % TILE;
                if (tile + c >= C) continue;
                float sum = 0.0f;
                for (int i = 0; i < N; i++) sum = fma(res[i * N + j], gs[i * TILE + c], sum);
                store_one(dx + streams + int64_t(j) * C + tile + c, sum);
            }
            // dy = sum_i h_post_i g_i
            for (int c = first; c < TILE; c += step) {
                if (tile + c >= C) continue;
                float sum = 0.0f;
                for (int i = 0; i < N; i++) sum = fma(post[i], gs[i * TILE + c], sum);
                store_one(dy + token * C + tile + c, sum);
            }
            // dh_post_i = g_i . y; dH_res[i, j] = g_i . x_j
            for (int k = first; k < SUMS; k += step) {
                const int i = k < N ? k : (k - N) / N, j = k < N ? 0 : (k - N) % N;
                float sum = sums[k];
                for (int c = 0; c < TILE; c++)
                    sum = fma(gs[i * TILE + c], k < N ? ys[c] : xs[j * TILE + c], sum);
                sums[k] = sum;
            }
            BARRIER;  // the next tile is written over this one
        }

        for (int k = first; k < SUMS; k += step) {  // each thread's own sums
            if (k < N) {
                dh_post[token * N + k] = sums[k];
            } else {
                dh_res[token * N * N + k - N] = sums[k];
            }
        }
    }
}
