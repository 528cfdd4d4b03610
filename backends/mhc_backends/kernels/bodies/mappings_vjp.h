// The vjp of mappings from its outputs back to u, the products with phi. With z = u r scale + bias
// (one scale per group of columns: pre n, post n, res n n) and dz from the cotangents: du = dz
// scale r. The root mean square adds dx -= pull x, with pull = sum_m(dz scale u) r^3 / K and K = n
// C, stored in units of pull_unit().
//
// u[T, m], r[T, 1], scale[3], bias[m], g_pre, g_post[T, n], g_res[T, n, n] -> du[T, m], pull[T, 1],
// terms[T, m + 3]. A row of terms has dz, whose sum over the tokens is dbias, and the sums of dz u
// r over each group, whose sums over the tokens are dscale. LOG, ITERATIONS, FIRST_COLUMNS and
// TRANSPOSED (of the columns of res) are the variant's. A simdgroup takes as many tokens as its
// lanes hold: lane b has column b of pre and of post, and a line of res.

#pragma once

#include "../common/floats.h"
#include "../common/position.h"
#include "../common/pull.h"
#include "../common/sigmoid.h"
#include "../common/sinkhorn/clamped.h"
#include "../common/sinkhorn/lanes.h"
#include "../common/sinkhorn/lines.h"
#include "../common/sinkhorn/pull.h"
#include "../common/sinkhorn/sinkhorn_vjp.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
struct mappings_vjp_memory {
    enum { kept = DIVISORS * DIVISOR_SIMDGROUPS };
};

template <int N, int ITERATIONS, bool LOG, bool FIRST_COLUMNS, bool TRANSPOSED, bool EXP_START,
          bool CLAMPED, int K, typename U, typename R, typename Scale, typename Bias, typename GPre,
          typename GPost, typename GRes, typename Du, typename Pull, typename Terms>
FUNCTION void mappings_vjp(U u, int64_t u_shape_0, R r, Scale scale, Bias bias, GPre g_pre,
                           GPost g_post, GRes g_res, Du du, Pull pull, Terms terms,
                           float post_scale, float sinkhorn_eps, float clamp_low, float clamp_high,
                           threadgroup float* kept, Position here) {
    const int64_t T = u_shape_0;
    const int M = N * N + 2 * N;
    const auto own = own_divisors(&kept[0], here);
    const int b = line<N>(here);

    for (int64_t tokens = first_tokens<N, DIVISOR_SIMDGROUPS>(T, here); tokens < T;
         tokens += next_tokens<N, DIVISOR_SIMDGROUPS>(here)) {
        const int64_t token = tokens + own_token<N>(here);
        const bool there = token < T, mine = there && inside<N>(here);
        const auto products = u + token * M;
        const auto dproducts = du + token * M;
        const auto token_terms = terms + token * (M + 3);
        const float inverse = there ? float(r[token]) : 0.0f;
        Floats<3> sums = zeros<3>();  // of dz u over this lane's columns of each group

        // pre and post
        UNROLL for (int group = 0; group < 2; group++) {
            if (!mine) continue;
            const int column = group * N + b;
            const float by = float(scale[group]), product = float(products[column]);
            const float s = sigmoid(product * inverse * by + float(bias[column]));
            const float g = group == 0 ? float(g_pre[token * N + b])
                                       : post_scale * float(g_post[token * N + b]);
            const float dz = g * s * (1.0f - s);
            sums.at[group] = dz * product;
            dproducts[column] = dz * by * inverse;
            token_terms[column] = dz;
        }

        // res
        const float by = float(scale[2]);
        const Floats<N> product =
            load_line<N, FIRST_COLUMNS, TRANSPOSED>(products + 2 * N, there, here);
        const Floats<N> biases = load_line<N, FIRST_COLUMNS, TRANSPOSED>(bias + 2 * N, there, here);
        const Floats<N> dres =
            load_line<N, FIRST_COLUMNS, false>(g_res + token * N * N, there, here);
        const Floats<N> z = add(biases, by, times(inverse, product));
        Floats<N> from = z;
        if (CLAMPED) from = clamped(z, clamp_low, clamp_high);
        Floats<N> dz =
            sinkhorn_matrix_vjp<N, LOG, EXP_START>(from, dres, here, ITERATIONS, sinkhorn_eps, own);
        if (CLAMPED) dz = clamped_vjp(z, dz, clamp_low, clamp_high);
        if (mine) sums.at[2] = add_dot(0.0f, dz, product);
        store_line<N, FIRST_COLUMNS, TRANSPOSED>(dproducts + 2 * N, times(by * inverse, dz), there,
                                                 here);
        store_line<N, FIRST_COLUMNS, TRANSPOSED>(token_terms + 2 * N, dz, there, here);

        UNROLL for (int group = 0; group < 3; group++)
            sums.at[group] = sum_lines<N>(sums.at[group], here);
        if (there && b == 0) {
            float dr = 0.0f;
            UNROLL for (int group = 0; group < 3; group++) {
                dr += float(scale[group]) * sums.at[group];
                token_terms[M + group] = inverse * sums.at[group];
            }
            pull[token] = pull_of(dr, inverse, float(K));
        }
    }
}
