// The rest of static_layer's vjp for many streams, after the RMS norm's vjp has computed dh: dx_j =
// sum_i H_res[i, j] g_i + h_pre_j dh; dh_pre_j = x_j . dh; dh_post_i = g_i . y; dH_res[i, j] = g_i
// . x_j.
//
// x, g[T, n, C], y, dh[T, C], h_pre[n], h_res[n, n] -> dx[T, n, C] and sums[shares, 2 n + n * n],
// of dh_pre, dh_post and dH_res: a threadgroup takes a share of the tokens and writes one row of
// sums. It keeps TILE channels of all streams in threadgroup memory at a time. A thread takes ROWS
// streams at once, so that it reads the other factor once for all of them.

#pragma once

#include "../common/position.h"
#include "../common/store_one.h"
#include "../common/within.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int N>
struct static_layer_vjp_wide_memory {
    enum {
        TILE = N <= 8 ? 128
        : N <= 16     ? 64
                      : 32,
        STRIDE = TILE + 1,      // neighbours in another stream are in another bank
        xs = (N + 1) * STRIDE,  // x_j[c] at j * STRIDE + c, and dh after the streams
        gs = (N + 1) * STRIDE,  // g, and y
        pre = N,
        res = N * N,
        own = 2 * N + N * N,
    };
};

template <int N, typename X, typename G, typename Y, typename Dh, typename HPre, typename HRes,
          typename Dx, typename SumRows>
FUNCTION void static_layer_vjp_wide(X x, int64_t x_shape_0, int x_shape_2, G g, Y y, Dh dh,
                                    HPre h_pre, HRes h_res, Dx dx, SumRows sums,
                                    threadgroup float* xs, threadgroup float* gs,
                                    threadgroup float* pre, threadgroup float* res,
                                    threadgroup float* own, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;
    const int TILE = static_layer_vjp_wide_memory<N>::TILE;
    const int STRIDE = static_layer_vjp_wide_memory<N>::STRIDE;
    const int SUMS = 2 * N + N * N;
    const int ROWS = 4, BLOCKS = (N + ROWS - 1) / ROWS;  // beyond N the last stream is taken again
    const int first = here.id, step = here.threads;
    for (int k = first; k < N; k += step) pre[k] = float(h_pre[k]);
    for (int k = first; k < N * N; k += step) res[k] = float(h_res[k]);
    for (int k = first; k < SUMS; k += step) own[k] = 0.0f;

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const int64_t at = token * N * C;
        for (int tile = 0; tile < C; tile += TILE) {
            // the tile, with zeros beyond C
            for (int k = first; k < N * TILE; k += step) {
                const int i = k / TILE, c = k % TILE;
                const int64_t from = at + int64_t(i) * C + tile + c;
                xs[i * STRIDE + c] = tile + c < C ? float(x[from]) : 0.0f;
                gs[i * STRIDE + c] = tile + c < C ? float(g[from]) : 0.0f;
            }
            for (int c = first; c < TILE; c += step) {
                const int64_t from = token * C + tile + c;
                xs[N * STRIDE + c] = tile + c < C ? float(dh[from]) : 0.0f;
                gs[N * STRIDE + c] = tile + c < C ? float(y[from]) : 0.0f;
            }
            BARRIER;

            // dx_j = sum_i H_res[i, j] g_i + h_pre_j dh
            for (int k = first; k < BLOCKS * TILE; k += step) {
                const int j0 = k / TILE * ROWS, c = k % TILE;
                if (tile + c >= C) continue;
                float dxs[ROWS];
                UNROLL for (int r = 0; r < ROWS; r++)
                    dxs[r] = pre[within<N>(j0 + r)] * xs[N * STRIDE + c];
                for (int i = 0; i < N; i++) {
                    const float g_i = gs[i * STRIDE + c];
                    UNROLL for (int r = 0; r < ROWS; r++)
                        dxs[r] = fma(res[i * N + within<N>(j0 + r)], g_i, dxs[r]);
                }
                UNROLL for (int r = 0; r < ROWS; r++) {
                    if (j0 + r < N) store_one(dx + at + int64_t(j0 + r) * C + tile + c, dxs[r]);
                }
            }
            // x_j . dh, g_i . y, g_i . x_j: block b is of column b % (N + 2) of [dh, y, x_0, x_1,
            // ...]
            for (int b = first; b < BLOCKS * (N + 2); b += step) {
                const int i0 = b / (N + 2) * ROWS, column = b % (N + 2);
                const auto rows = column == 0 ? xs : gs;
                const auto other = column == 0   ? xs + N * STRIDE
                                   : column == 1 ? gs + N * STRIDE
                                                 : xs + (column - 2) * STRIDE;
                float parts[ROWS];
                UNROLL for (int r = 0; r < ROWS; r++)
                    parts[r] = 0.0f;
                for (int c = 0; c < TILE; c++) {
                    UNROLL for (int r = 0; r < ROWS; r++)
                        parts[r] = fma(rows[within<N>(i0 + r) * STRIDE + c], other[c], parts[r]);
                }
                UNROLL for (int r = 0; r < ROWS; r++) {
                    const int i = i0 + r, j = column - 2;
                    if (i < N) own[column < 2 ? column * N + i : 2 * N + i * N + j] += parts[r];
                }
            }
            BARRIER;  // the next tile is written over this one
        }
    }
    for (int k = first; k < SUMS; k += step) sums[int64_t(here.group_x) * SUMS + k] = own[k];
}
