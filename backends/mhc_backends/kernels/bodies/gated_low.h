// gated_low: the gates' low rank, from the sums of gated_project. A column's z is sum_i r_i (stream
// i's partials, added one by one) / n; low = silu(z) of down's columns, h_post = 2 sigmoid(z) of
// inject's.
//
// partials[T, P, WIDTH], settings[3] = eps, C, R -> low[T, R], r[T, n]; if it INJECTS, h_post[T, n];
// if it SAVES, products[T, n, M], each stream's sums of down's columns and then of inject's. A
// threadgroup takes a token and LOW_COLUMNS columns; its simdgroups share the streams, and their
// last lanes add the squares.

#pragma once

#include "../common/norm.h"
#include "../common/partials.h"
#include "../common/position.h"
#include "../common/sigmoid.h"
#include "dialect/words.h"

enum { LOW_COLUMNS = SIMD - 1, LOW_AT_ONCE = 16 };  // partials that a thread has in flight

// The sizes of the kernel's threadgroup arrays.
template <int N>
struct gated_low_memory {
    enum { sums = N * SIMD };
};

template <int N, bool INJECTS, bool SAVES, typename Partials, typename Settings, typename Low,
          typename R, typename HPost, typename Products>
FUNCTION void gated_low(Partials partials, int64_t partials_shape_0, int partials_shape_1,
                        int partials_shape_2, Settings settings, Low low, R r, HPost h_post,
                        Products products, threadgroup float* sums, Position here) {
    const int64_t T = partials_shape_0;
    const int P = partials_shape_1, WIDTH = partials_shape_2, RANK = int(settings[2]);
    const int parts = P / N, M = INJECTS ? RANK + N : RANK;
    const int lane = here.id % SIMD, simdgroup = here.id / SIMD;
    const int column = int(here.group_y) * LOW_COLUMNS + lane;
    const bool squares = lane == LOW_COLUMNS;
    const int at = squares ? WIDTH - 1 : column < RANK ? column : column - M + WIDTH - 1;

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const auto mapped = h_post + (INJECTS ? token * N : 0);
        const auto kept = products + (SAVES ? token * N * M : 0);
        for (int i = simdgroup; i < N; i += here.threads / SIMD) {
            if (squares || column < M)
                sums[i * SIMD + lane] = sum_one_by_one<LOW_AT_ONCE>(
                    partials + (token * P + i * parts) * WIDTH + at, parts, WIDTH);
            if (SAVES && !squares && column < M) kept[i * M + column] = sums[i * SIMD + lane];
        }
        BARRIER;
        if (simdgroup == 0 && !squares && column < M) {
            float z = 0.0f;
            for (int i = 0; i < N; i++)
                z = fma(inverse_rms(sums[i * SIMD + LOW_COLUMNS], float(settings[1]),
                                    float(settings[0])),
                        sums[i * SIMD + lane], z);
            z /= float(N);
            if (column < RANK)
                low[token * RANK + column] = z * sigmoid(z);
            else
                mapped[column - RANK] = 2.0f * sigmoid(z);
        }
        for (int i = here.id; i < N && here.group_y == 0; i += here.threads)
            r[token * N + i] =
                inverse_rms(sums[i * SIMD + LOW_COLUMNS], float(settings[1]), float(settings[0]));
        BARRIER;  // the next token uses sums again
    }
}
