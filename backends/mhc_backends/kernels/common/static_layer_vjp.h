// The last stage of static_layer's vjp.

#pragma once

#include "collapse.h"
#include "floats.h"
#include "rms_norm_vjp.h"
#include "store.h"
#include "streams.h"
#include "dialect/words.h"

// Stores dx_j = sum_i H_res[i, j] g_i + h_pre_j dh. Adds x_j . dh, g_i . y and g_i . x_j to `sums`,
// which has dh_pre, dh_post and dH_res in turn. Returns dweight = dy h r.
template <int N, int W, typename P, typename V, typename H>
FUNCTION Floats<W> static_pullback(P dx, int C, Streams<N, W> x, Streams<N, W> g, float r,
                                   float pulled, Floats<W> weight, V sums, H pre, H post, H res) {
    const Floats<W> h = collapse(pre, x), dy = collapse(post, g);
    const Floats<W> scaled = times(r, h), y = product(scaled, weight);
    const Floats<W> dh = rms_norm_pullback(h, weight, dy, r, pulled);

    UNROLL for (int j = 0; j < N; j++) {
        Floats<W> dx_j = times(pre[j], dh);
        UNROLL for (int i = 0; i < N; i++)
            dx_j = add(dx_j, res[i * N + j], g.at[i]);
        store(dx + int64_t(j) * C, dx_j);
    }
    UNROLL for (int i = 0; i < N; i++) {
        sums[i] = add_dot(sums[i], x.at[i], dh);
        sums[N + i] = add_dot(sums[N + i], g.at[i], y);
        UNROLL for (int j = 0; j < N; j++)
            sums[2 * N + i * N + j] = add_dot(sums[2 * N + i * N + j], g.at[i], x.at[j]);
    }
    return product(dy, scaled);
}
