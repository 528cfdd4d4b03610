// The vjp of rms_norm: dx = r (weight g - x r pulled), pulled = mean(x r weight g); dweight = sum_T
// g x r.
//
// x, g[T, C], weight[C], eps[1] -> dx[T, C] and dweight[shares, C]: a threadgroup takes a share of
// the tokens and writes one row of sums. Registers are used as in rms_norm.

#pragma once

#include "../common/channels.h"
#include "../common/floats.h"
#include "../common/load.h"
#include "../common/norm.h"
#include "../common/position.h"
#include "../common/raw.h"
#include "../common/rms_norm_vjp.h"
#include "../common/store.h"
#include "../common/streams.h"
#include "../common/sums_for_all.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
struct rms_norm_vjp_memory {
    enum { shared = 2 * 2 * MOST_SIMDGROUPS };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <int W, typename X, typename Weight, typename G, typename Dx, typename Dweight>
FUNCTION bool rms_norm_vjp_aligned(X x, Weight weight, G g, Dx dx, Dweight dweight) {
    return vectors<W>(x) && vectors<W>(weight) && vectors<W>(g) && vectors<W>(dx) &&
           vectors<W>(dweight);
}

template <typename ACCESS, int W, int HELD, bool REST, typename X, typename Weight, typename Eps,
          typename G, typename Dx, typename Dweight>
FUNCTION void rms_norm_vjp(X x, int64_t x_shape_0, int x_shape_1, Weight weight, Eps eps, G g,
                           Dx dx, Dweight dweight, threadgroup float* shared, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_1;

    const int first = first_channel<W>(here), step = next_channel<W>(here);
    const int rest = REST ? first + HELD * step : C;
    const auto row_of_dweight = ACCESS::at(dweight) + int64_t(here.group_x) * C;
    int buffer = 0;  // tokens take turns with the halves of `shared`

    Floats<W> dweights[HELD];
    UNROLL for (int k = 0; k < HELD; k++)
        dweights[k] = zeros<W>();

    for (int64_t token = here.group_x; token < T; token += here.groups_x) {
        const int64_t at = token * C;

        // x . x and (x weight) . g
        decltype(load_raw_streams<1, W>(ACCESS::at(x), C, 0)) xs[HELD];
        decltype(load_raw_streams<1, W>(ACCESS::at(g), C, 0)) gs[HELD];
        Floats<2> norm = zeros<2>();
        UNROLL for (int k = 0; k < HELD; k++) {
            const int c = first + k * step;
            xs[k] = load_raw_streams<1, W>(ACCESS::at(x) + at, C, c);
            gs[k] = load_raw_streams<1, W>(ACCESS::at(g) + at, C, c);
        }
        UNROLL for (int k = 0; k < HELD; k++) {
            const int c = first + k * step;
            const Floats<W> v = floats(xs[k]).at[0], dy = floats(gs[k]).at[0];
            norm.at[0] = add_squares(norm.at[0], v);
            if (c < C)
                norm.at[1] = add_dot(norm.at[1], product(v, load<W>(ACCESS::at(weight) + c)), dy);
        }
        for (int c = rest; c < C; c += step) {
            const Floats<W> again = load<W>(ACCESS::at(x) + at + c);
            norm.at[0] = add_squares(norm.at[0], again);
            norm.at[1] = add_dot(norm.at[1], product(again, load<W>(ACCESS::at(weight) + c)),
                                 load<W>(ACCESS::at(g) + at + c));
        }
        norm = sums_for_all(norm, shared + buffer * 2 * MOST_SIMDGROUPS, here);
        buffer = 1 - buffer;
        const float r = inverse_rms(norm.at[0], float(C), float(eps[0]));
        const float pulled = r * norm.at[1] / float(C);

        UNROLL for (int k = 0; k < HELD; k++) {
            const int c = first + k * step;
            if (c < C) {
                const Floats<W> v = floats(xs[k]).at[0], dy = floats(gs[k]).at[0];
                store(ACCESS::at(dx) + at + c,
                      rms_norm_pullback(v, load<W>(ACCESS::at(weight) + c), dy, r, pulled));
                dweights[k] = add(dweights[k], 1.0f, product(dy, times(r, v)));
            }
        }
        for (int c = rest; c < C; c += step) {
            const Floats<W> again = load<W>(ACCESS::at(x) + at + c),
                            dy = load<W>(ACCESS::at(g) + at + c);
            store(ACCESS::at(dx) + at + c,
                  rms_norm_pullback(again, load<W>(ACCESS::at(weight) + c), dy, r, pulled));
            // registers cannot be indexed: the sums of earlier tokens are in this thread's row
            Floats<W> sum = product(dy, times(r, again));
            if (token != here.group_x) sum = add(sum, 1.0f, load<W>(row_of_dweight + c));
            store(row_of_dweight + c, sum);
        }
    }

    UNROLL for (int k = 0; k < HELD; k++) {
        if (first + k * step < C) store(row_of_dweight + first + k * step, dweights[k]);
    }
}
