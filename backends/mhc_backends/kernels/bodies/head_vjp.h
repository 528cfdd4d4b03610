// The vjp of head from its weights w back to u, the products with phi. With z = u r scale + bias, w
// = sigmoid(z) + pre_eps and s = sigmoid(z): dz = g_w s (1 - s) and du = dz scale r. The root mean
// square adds dx -= pull x, with pull = sum_n(dz scale u) r^3 / K and K = n C, stored in units of
// pull_unit().
//
// u[T, n], r[T, 1], scale[1], bias[n], g_w[T, n] -> du[T, n], pull[T, 1], terms[T, n + 1]. A row of
// terms has dz, whose sum over the tokens is dbias, and the sum of dz u r, whose sum over the
// tokens is dscale. A simdgroup takes as many tokens as its lanes hold: lane b has column b.

#pragma once

#include "../common/position.h"
#include "../common/pull.h"
#include "../common/sigmoid.h"
#include "../common/sinkhorn/lanes.h"
#include "dialect/words.h"

template <int N, int K, typename U, typename R, typename Scale, typename Bias, typename GW,
          typename Du, typename Pull, typename Terms>
FUNCTION void head_vjp(U u, int64_t u_shape_0, R r, Scale scale, Bias bias, GW g_w, Du du,
                       Pull pull, Terms terms, Position here) {
    const int64_t T = u_shape_0;
    const int b = line<N>(here);
    const float by = float(scale[0]);

    const int64_t each = here.threads / Lanes<N>::COUNT;  // tokens of a threadgroup at a time

    for (int64_t tokens = here.group_x * each; tokens < T; tokens += here.groups_x * each) {
        const int64_t token = tokens + here.id / Lanes<N>::COUNT;
        const bool there = token < T;
        const float inverse = there ? float(r[token]) : 0.0f;
        float sum = 0.0f;  // of dz u
        if (there && inside<N>(here)) {
            const float product = float(u[token * N + b]);
            const float s = sigmoid(product * inverse * by + float(bias[b]));
            const float dz = float(g_w[token * N + b]) * s * (1.0f - s);
            sum = dz * product;
            du[token * N + b] = dz * by * inverse;
            terms[token * (N + 1) + b] = dz;
        }
        sum = sum_lines<N>(sum, here);
        if (there && b == 0) {
            terms[token * (N + 1) + N] = inverse * sum;
            pull[token] = pull_of(by * sum, inverse, float(K));
        }
    }
}
