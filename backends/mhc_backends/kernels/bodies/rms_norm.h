// rms_norm: y = x r weight, with r = 1 / sqrt(mean(x^2) + eps).
//
// x[T, C], weight[C], eps[1] -> y[T, C]. A threadgroup takes whole tokens. Between the two uses of
// x, a thread keeps its first HELD accesses in registers; if there is a REST, it reads the others
// again.

#pragma once

#include "../common/channels.h"
#include "../common/floats.h"
#include "../common/load.h"
#include "../common/norm.h"
#include "../common/position.h"
#include "../common/raw.h"
#include "../common/store.h"
#include "../common/streams.h"
#include "../common/sums_for_all.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
struct rms_norm_memory {
    enum { shared = 2 * MOST_SIMDGROUPS };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int W, typename X, typename Weight, typename Y>
FUNCTION bool rms_norm_aligned(X x, Weight weight, Y y) {
    return vectors<W>(x) && vectors<W>(weight) && vectors<W>(y);
}

template <typename ACCESS, int W, int HELD, bool REST, typename X, typename Weight, typename Eps,
          typename Y>
FUNCTION void rms_norm(X x, int64_t x_shape_0, int x_shape_1, Weight weight, Eps eps, Y y,
                       threadgroup float* shared, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_1;

    const int first = first_channel<W>(here), step = next_channel<W>(here);
    const int rest = REST ? first + HELD * step : C;
    int buffer = 0;  // tokens take turns with the halves of `shared`

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const auto from = ACCESS::at(x) + token * C;
        const auto to = ACCESS::at(y) + token * C;

        decltype(load_raw_streams<1, W>(from, C, 0)) kept[HELD];
        Floats<1> squares = zeros<1>();
        UNROLL for (int k = 0; k < HELD; k++)
            kept[k] = load_raw_streams<1, W>(from, C, first + k * step);
        UNROLL for (int k = 0; k < HELD; k++) {
            const Floats<W> v = floats(kept[k]).at[0];
            squares.at[0] = add_squares(squares.at[0], v);
        }
        for (int c = rest; c < C; c += step) {
            const Floats<W> again = load<W>(from + c);
            squares.at[0] = add_squares(squares.at[0], again);
        }
        squares = sums_for_all(squares, shared + buffer * MOST_SIMDGROUPS, here);
        buffer = 1 - buffer;
        const float r = inverse_rms(squares.at[0], float(C), float(eps[0]));

        UNROLL for (int k = 0; k < HELD; k++) {
            const int c = first + k * step;
            if (c < C)
                store(to + c,
                      product(times(r, floats(kept[k]).at[0]), load<W>(ACCESS::at(weight) + c)));
        }
        for (int c = rest; c < C; c += step)
            store(to + c, product(times(r, load<W>(from + c)), load<W>(ACCESS::at(weight) + c)));
    }
}
