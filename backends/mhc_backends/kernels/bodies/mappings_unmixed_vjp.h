// The vjp of mappings_unmixed from its outputs back to u, the products with phi, as in
// mappings_vjp.h without H_res.
//
// u[T, 2 n], r[T, 1], scale[2], bias[2 n], g_pre, g_post[T, n] -> du[T, 2 n], pull[T, 1], terms[T,
// 2 n + 2]. A row of terms has dz, whose sum over the tokens is dbias, and the sums of dz u r over
// each group, whose sums over the tokens are dscale. A simdgroup takes as many tokens as its lanes
// hold: lane b has column b of pre and of post.

#pragma once

#include "../common/floats.h"
#include "../common/position.h"
#include "../common/pull.h"
#include "../common/sigmoid.h"
#include "../common/sinkhorn/lanes.h"
#include "dialect/words.h"

template <int N, int K, typename U, typename R, typename Scale, typename Bias, typename GPre,
          typename GPost, typename Du, typename Pull, typename Terms>
FUNCTION void mappings_unmixed_vjp(U u, int64_t u_shape_0, R r, Scale scale, Bias bias, GPre g_pre,
                                   GPost g_post, Du du, Pull pull, Terms terms, float post_scale,
                                   Position here) {
    const int64_t T = u_shape_0;
    const int M = 2 * N, b = line<N>(here);
    const int64_t each = here.threads / Lanes<N>::COUNT;  // tokens of a threadgroup at a time

    for (int64_t tokens = here.group_x * each; tokens < T; tokens += here.groups_x * each) {
        const int64_t token = tokens + here.id / Lanes<N>::COUNT;
        const bool there = token < T;
        const float inverse = there ? float(r[token]) : 0.0f;
        const auto token_terms = terms + token * (M + 2);
        Floats<2> sums = zeros<2>();  // of dz u over each group
        UNROLL for (int group = 0; group < 2; group++) {
            if (there && inside<N>(here)) {
                const int column = group * N + b;
                const float by = float(scale[group]), product = float(u[token * M + column]);
                const float s = sigmoid(product * inverse * by + float(bias[column]));
                const float g = group == 0 ? float(g_pre[token * N + b])
                                           : post_scale * float(g_post[token * N + b]);
                const float dz = g * s * (1.0f - s);
                sums.at[group] = dz * product;
                du[token * M + column] = dz * by * inverse;
                token_terms[column] = dz;
            }
            sums.at[group] = sum_lines<N>(sums.at[group], here);
        }
        if (there && b == 0) {
            float dr = 0.0f;
            UNROLL for (int group = 0; group < 2; group++) {
                dr += float(scale[group]) * sums.at[group];
                token_terms[M + group] = inverse * sums.at[group];
            }
            pull[token] = pull_of(dr, inverse, float(K));
        }
    }
}
