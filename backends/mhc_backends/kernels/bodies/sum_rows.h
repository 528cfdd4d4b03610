// sum_rows: the sum over the rows of a[R, K] in float32, in an order that depends on R and K alone:
// the second stage of sums over all tokens.
//
// Threadgroup x sums an equal share of the rows into out[x, K]; threadgroup y takes some columns.
// Threads beyond the width of those columns take other rows.

#pragma once

#include "../common/position.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
struct sum_rows_memory {
    enum { shared = SIMD * MOST_SIMDGROUPS };
};

template <typename A, typename Out>
FUNCTION void sum_rows(A a, int64_t a_shape_0, int a_shape_1, Out out, threadgroup float* shared,
                       Position here) {
    const int64_t R = a_shape_0;
    const int K = a_shape_1;
    const int64_t share = (R + here.groups_x - 1) / here.groups_x;
    const int64_t begin = here.group_x * share, end = begin + share < R ? begin + share : R;
    const int width = K < int(here.threads) ? K : int(here.threads);
    const int lanes =
        here.threads / width;  // threads per column; a rest of the threads has no column
    const int lane = here.id / width;
    const int column = int(here.group_y) * width + int(here.id) % width;

    float sum = 0.0f;
    if (lane < lanes && column < K) {
        for (int64_t r = begin + lane; r < end; r += lanes) sum += float(a[r * K + column]);
    }
    shared[here.id] = sum;
    BARRIER;
    for (int count = lanes; count > 1;) {  // fold the upper half of the lanes onto the lower one
        const int upper = (count + 1) / 2;
        if (lane + upper < count) shared[here.id] += shared[here.id + upper * width];
        BARRIER;
        count = upper;
    }
    if (lane == 0 && column < K) out[int64_t(here.group_x) * K + column] = shared[here.id];
}
