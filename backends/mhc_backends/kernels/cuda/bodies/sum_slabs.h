// sum_slabs: the sums over the slabs of project_vjp's dmix, one by one.
//
// dmix[B, T, n n + n] -> dh_res[T, n, n], dh_post[T, n]. A thread takes a number of a token.

#pragma once

#include "../../common/position.h"
#include "dialect/words.h"

template <int N, typename Dmix, typename DhRes, typename DhPost>
FUNCTION void sum_slabs(Dmix dmix, int dmix_shape_0, int64_t dmix_shape_1, DhRes dh_res,
                        DhPost dh_post, Position here) {
    enum { SUMS = N * N + N, AT_ONCE = 8 };  // loads in flight
    const int slabs = dmix_shape_0;
    const int64_t count = dmix_shape_1 * SUMS;
    const int64_t step = int64_t(here.groups_x) * here.threads;
    for (int64_t at = int64_t(here.group_x) * here.threads + here.id; at < count; at += step) {
        float sum = 0.0f;
        for (int begin = 0; begin < slabs; begin += AT_ONCE) {
            float some[AT_ONCE];
            UNROLL for (int k = 0; k < AT_ONCE; k++)
                some[k] = begin + k < slabs ? float(dmix[(begin + k) * count + at]) : 0.0f;
            UNROLL for (int k = 0; k < AT_ONCE; k++)
                sum += some[k];
        }
        const int64_t token = at / SUMS;
        const int number = int(at % SUMS);
        if (number < N * N)
            dh_res[token * N * N + number] = sum;
        else
            dh_post[token * N + number - N * N] = sum;
    }
}
